"""Proves on the user's training that overlap changes no number, or names the first number that differs."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_overlap.bench.runs import Runs
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError, check_count
from lightning_overlap.plan import Plan, resolve
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import share
from lightning_overlap.ranks.world import all_gather_objects, rank, world_size
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.torch_seams import parameters_of

CLOSE, CLOSE_HALF = 1e-5, 1e-2
"""Largest relative difference that another order of sums explains, in fp32 and with 16-bit activations."""


@dataclass
class Record:
    """The numbers of a run on one rank.

    Attributes:
        losses: the loss of each batch.
        norms: the norm of this rank's gradients at each step.
        weights: the final weights by name, of which this rank has all or a part.
        read: for each batch, digests of the weights that forward read, by name.
        batches: the training batches.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    read: list[dict[str, str]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)


class _Recorder(Callback):
    """Records a run. It waits for transfers only if it records the weights that forward reads."""

    def __init__(self, *, batches: bool = False, weights: bool = False) -> None:
        self.record = Record()
        self._batches, self._weights = batches, weights
        self._squares: list[float] = []
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._stepped))
        if self._weights:
            for prefix, part in module.named_modules():
                if names := list(parameters_of(part)):
                    self._hooks.append(part.register_forward_pre_hook(_Reads(self.record.read, prefix, names)))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batches:
            self.record.batches.append(copy.deepcopy(move_data_to_device(batch, "cpu")))
        self.record.read.append({})

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        # Lightning has divided it by the batches of an accumulation window.
        self.record.losses.append(math.nan if loss is None else float(loss) * trainer.accumulate_grad_batches)
        if self._squares:
            # An exact sum: a step in backward and a step after it have different orders.
            self.record.norms.append(math.sqrt(math.fsum(self._squares)))
            self._squares.clear()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()

    def after(self, module: LightningModule) -> Record:
        """Adds the final weights, which are complete after a fit, and returns the record."""
        self.record.weights = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
        return self.record

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [g.to_dense() if g.is_sparse else g for g in gradients]
        self._squares += [g.double().square().sum().item() for g in dense]


class _Reads:
    """A forward pre-hook that records digests of a module's parameters, read as the module reads them."""

    def __init__(self, read: list[dict[str, str]], prefix: str, names: Sequence[str]) -> None:
        self._read, self._prefix, self._names = read, prefix, names

    def __call__(self, part: nn.Module, args: Any) -> None:
        for name in self._names:
            weight = getattr(part, name)
            if weight is not None and self._read:
                self._read[-1].setdefault(f"{self._prefix}.{name}".lstrip("."), digest(weight.detach()))


def digest(x: Tensor) -> str:
    """Returns a hash of a tensor's bits."""
    return hashlib.blake2b(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


@dataclass
class Verdict:
    """The result of a comparison, the same on every rank.

    Attributes:
        compared: a sentence about the two runs.
        differences: sentences, one for the first difference of each kind; empty if the runs are equal.
    """

    compared: str
    differences: list[str]

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return not self.differences

    def __str__(self) -> str:
        return "\n".join([f"{self.compared}: {'equal' if self.equal else 'DIFFERS'}", *[f"  {d}" for d in self.differences]])


def verify(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    strategy: OverlapStrategy,
    trainer: dict[str, Any],
    *,
    steps: int = 5,
    against: Literal["off", "single"] = "off",
) -> list[Verdict]:
    """Trains with overlap on and off, with ``against="single"`` also on one process, and compares the runs. Collective.

    With overlap on and off all bits of losses, norms of gradients and weights must be equal. Under modes that do not keep bits, since
    they split products, losses and weights must be close. One process trains on the batches of all ranks by accumulation; losses and
    weights must be close in fp32. Dropout must be off in that comparison: one process draws other random numbers.

    Args:
        model: as in :class:`Runs`.
        datamodule: as in :class:`Runs`.
        strategy: as in :class:`Runs`.
        trainer: as in :class:`Runs`.
        steps: the number of steps of each run.
        against: ``"single"``: compare with one process, too.

    Returns:
        A verdict for each comparison.

    Raises:
        ConfigError: ``steps`` is less than 1, there is only one rank, or nothing overlaps and ``against`` is not ``"single"``.
    """
    check_count("steps", steps)
    runs = Runs(model, datamodule, strategy, trainer)
    plans: list[Plan] = []

    def run(overlap: str, **looks: bool) -> Record:
        recorder = _Recorder(**looks)
        module = copy.deepcopy(model)
        ours = runs.ours(overlap=overlap)
        runs.fit(ours, steps, recorder, module)
        plans.append(ours.plan)
        return recorder.after(module)

    on = run(strategy.config.overlap, batches=against == "single")
    if world_size() == 1:
        raise ConfigError("one rank communicates nothing, so there is nothing to compare. Set more devices")
    close = CLOSE if "16" not in str(trainer.get("precision")) else CLOSE_HALF
    verdicts = []
    if _overlaps(plans[0], strategy.config):
        kinds = [mode.mode_type for mode in plans[0].modes if mode.name in plans[0].choices and mode.mode_type is not None]
        exact = all(kind.keeps_bits or kind.overlap_keeps_bits for kind in kinds)
        verdicts.append(_compare_off(on, run, strategy.config.overlap, close, exact=exact))
    elif against != "single":
        raise ConfigError(
            "nothing overlaps in this plan, so overlap on and off are the same run, and to compare them proves nothing. Set "
            "overlap: auto, or compare with one process (against='single', --against single)"
        )
    if against == "single":
        verdicts.append(_compare_single(on, runs, steps, close))
    return verdicts


def _compare_single(on: Record, runs: Runs, steps: int, close: float) -> Verdict:
    """Trains one process on the batches of all ranks, and compares a run with it."""
    single, mesh = _single(runs, on.batches, steps), _mesh(runs)
    far = _far(on, single, single.losses[mesh.index("samples") :: mesh.size("samples")], close, "on one process")
    return Verdict(f"{world_size()} ranks and one process, losses and weights to {close:g}", _shared(far))


def _overlaps(plan: Plan, config: OverlapConfig) -> bool:
    """Whether overlap="off" would change the plan."""
    off = resolve(replace(config, overlap="off"), plan.facts)
    return {name: each.value for name, each in plan.features().items()} != {name: each.value for name, each in off.features().items()}


def _compare_off(on: Record, run: Callable[..., Record], overlap: str, close: float, *, exact: bool) -> Verdict:
    """Trains without overlap, and compares a run with that.

    Args:
        on: the run.
        run: trains with a value of ``overlap``.
        overlap: the configured value.
        close: the largest relative difference that rounding explains.
        exact: all modes keep bits, so no difference is allowed.
    """
    off = run("off")
    differences = _shared(
        _differences(on, off, "with overlap", "without") if exact else _far(on, off, off.losses, close, "without overlap")
    )
    if differences and exact:
        # Only after a difference, since to record weights takes time, in which a late transfer may complete.
        weights = _shared(_weights_read(run(overlap, weights=True), run("off", weights=True)))
        differences += weights[:1] or ["a run that records the weights that forward reads has no difference in them: timing matters"]
    counted = f"{len(on.losses)} losses, {len(on.norms)} norms of gradients and {len(on.weights)} parameters"
    precision = "bit by bit" if exact else f"to {close:g}"
    return Verdict(f"overlap on and off, {counted} on each of {world_size()} ranks, {precision}", differences)


def _shared(mine: list[str]) -> list[str]:
    """Returns the differences of all ranks. Collective."""
    return [f"rank {rank}: {sentence}" for rank, sentences in enumerate(all_gather_objects(mine)) for sentence in sentences]


def _differences(first: Record, second: Record, this: str, that: str) -> list[str]:
    """Lists the first difference of each kind."""
    differences = []
    for what, a, b in (("loss of batch", first.losses, second.losses), ("norm of the gradients of step", first.norms, second.norms)):
        if len(a) != len(b):
            differences.append(f"{len(a)} of '{what}' {this}, {len(b)} {that}")
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y and not (math.isnan(x) and math.isnan(y)):
                differences.append(f"{what} {i} is {x!r} {this}, {y!r} {that}")
                break
    other = [name for name, weight in first.weights.items() if digest(weight) != digest(second.weights[name])]
    if other:
        differences.append(f"{len(other)} of {len(first.weights)} parameters differ at the end, the first is {other[0]}")
    return differences


def _weights_read(first: Record, second: Record) -> list[str]:
    """Returns a sentence about the first weight that forward read with another value; an empty list without one."""
    for batch, (a, b) in enumerate(zip(first.read, second.read, strict=False)):
        for name, bits in a.items():
            if b.get(name) != bits:
                return [f"{name} is the first weight that forward reads with another value, in batch {batch}"]
    return []


def _single(runs: Runs, mine: list[Any], steps: int) -> Record:
    """Trains on this rank alone, with the batches of all ranks."""
    everyone = all_gather_objects(mine)
    different = next(row for row in _mesh(runs).sets("samples") if 0 in row)  # other ranks had the same batches as one of these
    batches = [batch for together in zip(*(everyone[r] for r in different), strict=True) for batch in together]
    each = len(batches) // steps  # batches of all ranks in an accumulation window
    recorder = _Recorder()
    alone = SingleDeviceStrategy(runs.strategy.root_device)
    module = copy.deepcopy(runs.model)
    share([*module.parameters(), *module.buffers()])
    # Every rank trains, so that collectives of metrics complete. Clipping, precision and other arguments are the user's.
    runs.fit(
        alone, steps, recorder, module, devices=1, num_nodes=1, plugins=None, sync_batchnorm=False, limit_train_batches=1.0,
        accumulate_grad_batches=each, train_dataloaders=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
    )  # fmt: skip
    return recorder.after(module)


def _mesh(runs: Runs) -> ParallelMesh:
    return ParallelMesh(runs.strategy.config.degrees(world_size()), rank())


def _far(ours: Record, other: Record, losses: Sequence[float], close: float, where: str) -> list[str]:
    """Lists the first loss and the first weight that are not close to the other's; ``losses`` are of the same batches."""
    differences = []
    for i, (x, y) in enumerate(zip(ours.losses, losses, strict=True)):
        if not math.isclose(x, y, rel_tol=close, abs_tol=close) and not (math.isnan(x) and math.isnan(y)):
            differences.append(f"loss of batch {i} is {x!r}, {where} {y!r}")
            break
    for name, weight in ours.weights.items():
        a, b = weight.double(), other.weights[name].double()
        if not (far := ((a - b).norm() / b.norm().clamp_min(close)).item()) <= close:
            differences.append(f"{name} differs by {far:.1e} (norm of the difference over its norm) at the end")
            break
    return differences
