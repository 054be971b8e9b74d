"""Proves on the user's own training that overlap changes no number, or names the first one that differs."""

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
"""Relative difference from one process that another order of the same sums explains, in fp32 and with 16-bit activations."""


@dataclass
class Record:
    """The numbers of a run on one rank.

    Attributes:
        losses: of each batch.
        norms: of the gradients that each step was made with, on this rank.
        weights: by name, at the end; those that this rank holds.
        read: for each batch, digests of the weights as forward read them, by name.
        batches: what was trained on.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    read: list[dict[str, str]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)


class _Recorder(Callback):
    """Records a run. It waits for no transfer, unless it also records the weights that forward reads."""

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
            # Exact whatever the order, in which a step in backward and one after it differ.
            self.record.norms.append(math.sqrt(math.fsum(self._squares)))
            self._squares.clear()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()

    def after(self, module: LightningModule) -> Record:
        """The record, completed by the weights, which are whole on every rank after a fit."""
        self.record.weights = {name: p.detach().cpu().clone() for name, p in module.named_parameters()}
        return self.record

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        dense = [g.to_dense() if g.is_sparse else g for g in gradients]
        self._squares += [g.double().square().sum().item() for g in dense]


class _Reads:
    """Before a module's forward: digests of its own parameters, read as the module reads them."""

    def __init__(self, read: list[dict[str, str]], prefix: str, names: Sequence[str]) -> None:
        self._read, self._prefix, self._names = read, prefix, names

    def __call__(self, part: nn.Module, args: Any) -> None:
        for name in self._names:
            weight = getattr(part, name)
            if weight is not None and self._read:
                self._read[-1].setdefault(f"{self._prefix}.{name}".lstrip("."), digest(weight.detach()))


def digest(x: Tensor) -> str:
    """Of its bits."""
    return hashlib.blake2b(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


@dataclass
class Verdict:
    """The result of a comparison, the same on every rank.

    Attributes:
        compared: in words.
        differences: in words, the first of each kind; empty if there are none.
    """

    compared: str
    differences: list[str]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
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
    """Trains with overlap on and off, and with ``against="single"`` on one process too, and compares.

    Collective: every rank calls it. On and off must be equal in every bit: losses, the norms of gradients, weights. Under modes that
    do not keep bits, whose products in pieces round otherwise, losses and weights must be close. One process gets the batches of all
    ranks, in accumulation; losses and weights must be close in fp32 (another order of the same sums; random numbers, dropout's say,
    are drawn otherwise).

    Args:
        model: as in :class:`Runs`.
        datamodule: as in :class:`Runs`.
        strategy: as in :class:`Runs`.
        trainer: as in :class:`Runs`.
        steps: the number of steps of each run.
        against: ``"single"`` compares with one process, too.

    Returns:
        A verdict for each comparison.

    Raises:
        ConfigError: ``steps`` is less than 1, there is one rank only, or nothing overlaps and there is nothing else to compare with.
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
        raise ConfigError("on one rank nothing is communicated, and there is nothing to compare: ask for more devices")
    close = CLOSE if "16" not in str(trainer.get("precision")) else CLOSE_HALF
    verdicts = []
    if _overlaps(plans[0], strategy.config):
        exact = all(mode.mode_type is None or mode.mode_type.keeps_bits for mode in plans[0].modes if mode.name in plans[0].choices)
        verdicts.append(_on_and_off(on, run, strategy.config.overlap, close, exact=exact))
    elif against != "single":
        raise ConfigError(
            "nothing overlaps in this plan, so that overlap on and off are the same run, and comparing them proves nothing: ask for "
            "overlap (overlap: auto), or compare with one process (against='single', --against single)"
        )
    if against == "single":
        verdicts.append(_ranks_and_one(on, runs, steps, close))
    return verdicts


def _ranks_and_one(on: Record, runs: Runs, steps: int, close: float) -> Verdict:
    """Compares a run with one process on the batches of all ranks, which is trained here."""
    single, mesh = _single(runs, on.batches, steps), _mesh(runs)
    far = _far(on, single, single.losses[mesh.index("samples") :: mesh.size("samples")], close, "on one process")
    return Verdict(f"{world_size()} ranks and one process, losses and weights to {close:g}", _shared(far))


def _overlaps(plan: Plan, config: OverlapConfig) -> bool:
    """Whether overlap="off" would change anything of a plan."""
    off = resolve(replace(config, overlap="off"), plan.facts)
    return {name: each.value for name, each in plan.features().items()} != {name: each.value for name, each in off.features().items()}


def _on_and_off(on: Record, run: Callable[..., Record], overlap: str, close: float, *, exact: bool) -> Verdict:
    """Compares a run with its twin without overlap, which is trained here.

    Args:
        on: the run.
        run: trains, given what ``overlap`` is.
        overlap: of the run, as configured.
        close: the relative difference that rounding explains.
        exact: rounding explains nothing, since all modes keep bits.
    """
    off = run("off")
    differences = _shared(
        _differences(on, off, "with overlap", "without") if exact else _far(on, off, off.losses, close, "without overlap")
    )
    if differences and exact:
        # Only now, because it takes time in which a transfer that is late may arrive.
        looked = _shared(_weights_read(run(overlap, weights=True), run("off", weights=True)))
        differences += looked[:1] or ["while they are looked at, the weights that forward reads do not differ: a matter of timing"]
    counted = f"{len(on.losses)} losses, {len(on.norms)} norms of gradients and {len(on.weights)} parameters"
    how = "bit by bit" if exact else f"to {close:g}"
    return Verdict(f"overlap on and off, {counted} on each of {world_size()} ranks, {how}", differences)


def _shared(mine: list[str]) -> list[str]:
    """Gives all ranks the differences that each has found."""
    return [f"rank {rank}: {sentence}" for rank, sentences in enumerate(all_gather_objects(mine)) for sentence in sentences]


def _differences(first: Record, second: Record, this: str, that: str) -> list[str]:
    """The first of each kind, in words."""
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
    """The first parameter that forward read otherwise, in words."""
    for batch, (a, b) in enumerate(zip(first.read, second.read, strict=False)):
        for name, bits in a.items():
            if b.get(name) != bits:
                return [f"{name} is the first weight that forward reads otherwise, in batch {batch}"]
    return []


def _single(runs: Runs, mine: list[Any], steps: int) -> Record:
    """This rank trains alone, on the batches of all ranks."""
    everyone = all_gather_objects(mine)
    different = next(row for row in _mesh(runs).sets("samples") if 0 in row)  # the other ranks have had the same batches
    batches = [batch for together in zip(*(everyone[r] for r in different), strict=True) for batch in together]
    each = len(batches) // steps  # of all ranks and of an accumulation window
    recorder = _Recorder()
    alone = SingleDeviceStrategy(runs.strategy.root_device)
    module = copy.deepcopy(runs.model)
    share([*module.parameters(), *module.buffers()])
    # Every rank does the same, so that metrics that meet find each other. Clipping, precision and the rest are the user's.
    runs.fit(
        alone, steps, recorder, module, devices=1, num_nodes=1, plugins=None, sync_batchnorm=False, limit_train_batches=1.0,
        accumulate_grad_batches=each, train_dataloaders=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
    )  # fmt: skip
    return recorder.after(module)


def _mesh(runs: Runs) -> ParallelMesh:
    return ParallelMesh(runs.strategy.config.degrees(world_size()), rank())


def _far(ours: Record, other: Record, losses: Sequence[float], close: float, where: str) -> list[str]:
    """The first of each kind that is not close to the other's, whose ``losses`` are those of the same batches, in words."""
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
