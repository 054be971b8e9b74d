"""Where the strategy meets Lightning's loops. The only file that touches Lightning's private names."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_overlap.comm import Group, Pending
    from lightning_overlap.modes.base import OverlapMode
    from lightning_overlap.strategy import OverlapStrategy

PRIVATE_NAMES: tuple[tuple[type, str, str], ...] = (
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor", "a blocking broadcast before every batch, replaced"),
    (_SignalConnector, "_sigterm_notifier_fn", "a broadcast inside the signal handler, replaced"),
    (_SignalConnector, "_slurm_sigusr_handler_fn", "a checkpoint inside the signal handler, put off to the next batch"),
    (Precision, "_after_closure", "on_before_optimizer_step and clipping, called between backward and step"),
)
for _owner, _name, _use in PRIVATE_NAMES:
    if not hasattr(_owner, _name):
        raise ImportError(
            f"this version of lightning has no {_owner.__name__}.{_name} ({_use}). "
            "lightning_overlap supports lightning>=2.6,<2.7: install one of these."
        )

GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")


def gradient_readers(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """The user's hooks that run between backward and the optimizer's step, where gradients are read or changed."""
    found = []
    for owner, base in ((module, LightningModule), *((c, Callback) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        if type(owner).__module__.startswith("lightning.pytorch."):
            continue  # Lightning's own callbacks go through the optimizer, whose parameters are the shards
        for hook in GRADIENT_HOOKS:
            if getattr(type(owner), hook, None) is not getattr(base, hook, None):
                found.append(f"{type(owner).__name__}.{hook}")
    return tuple(found)


class OverlapPrecision:
    """Mixed into the precision plugin: the step, and clipping by norm, where gradients are sharded.

    Lightning runs backward inside ``optimizer.step``, so that gradients would be finished too late to be handed over.
    Here the closure runs first; hooks, clipping and the step follow.
    """

    strategy: OverlapStrategy

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any) -> Any:
        if not self.strategy.modes:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)  # type: ignore[misc]
        result = closure()
        plain: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._after_closure(model, optimizer)  # type: ignore[attr-defined]
        for mode in self.strategy.modes:
            mode.before_step(plain)
        optimizer.step(**kwargs)
        for mode in self.strategy.modes:
            mode.after_step(plain)
        return result

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if not self.strategy.modes:
            super().clip_grad_by_norm(optimizer, clip_val)  # type: ignore[misc]
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.zeros((), device=self.strategy.root_device)
        if grads:
            squares += torch.stack([g.float().norm() ** 2 for g in grads]).sum()
        for mode in self.strategy.modes:
            squares = mode.reduce_norm(squares)
        # As torch.nn.utils.clip_grad_norm_: a tensor, so that nothing waits for the device.
        scale = (clip_val / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)


_mixed: dict[type, type] = {}


def with_overlap(plugin: Precision, strategy: OverlapStrategy) -> Precision:
    """The plugin with :class:`OverlapPrecision` mixed in. It keeps its name, under which its state is saved."""
    if not isinstance(plugin, OverlapPrecision):
        stock = type(plugin)
        if stock not in _mixed:
            _mixed[stock] = type(stock.__name__, (OverlapPrecision, stock), {"__qualname__": stock.__qualname__})
        plugin.__class__ = _mixed[stock]
    plugin.strategy = strategy  # type: ignore[attr-defined]
    return plugin


class Preemption:
    """Signals act on all ranks at the same batch, and no batch waits for them.

    Each batch posts a sum of "has this rank been asked to stop, to requeue?" and reads the one that the batch before it has
    posted. Lightning's handlers run collectives inside the signal handler, where other ranks are in the middle of something else.

    Args:
        trainer: whose methods are replaced until :meth:`close`.
        group: all ranks, on the CPU, so that reading the sum never waits for a device.
    """

    def __init__(self, trainer: Trainer, group: Group) -> None:
        self._trainer = trainer
        self._group = group
        self._asked = [0, 0]  # to stop (SIGTERM), to requeue (SLURM's signal)
        self._pending: Pending | None = None
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        self._requeue = connector._slurm_sigusr_handler_fn
        connector._sigterm_notifier_fn = lambda *_: self._ask(0)  # type: ignore[method-assign]
        connector._slurm_sigusr_handler_fn = lambda *_: self._ask(1)  # type: ignore[method-assign]
        loop._broadcast_sigterm_tensor = self._before_batch  # type: ignore[method-assign]

    def _ask(self, what: int) -> None:
        self._asked[what] = 1

    def _before_batch(self) -> None:
        before, self._pending = self._pending, self._group.all_reduce(torch.tensor(self._asked), label="signals")
        if before is not None:
            self._act(before)

    def _act(self, pending: Pending) -> None:
        stop, requeue = pending.wait().tolist()
        if requeue and self._requeue is not None:
            self._requeue(signal.SIGUSR1, None)  # type: ignore[arg-type]
            self._requeue = None  # type: ignore[assignment]
        if stop:
            self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    def finish(self) -> None:
        """After the last batch: what was asked since then is agreed and done."""
        for _ in range(2):  # takes in the last batch's sum, then a last one
            self._before_batch()

    def close(self, *, complete: bool = True) -> None:
        """Lightning's own methods come back; the last sum is taken in, if ``complete``."""
        if complete:
            if self._pending is not None:
                self._pending.wait()
            self._group.close()
        del self._trainer._signal_connector._sigterm_notifier_fn
        del self._trainer._signal_connector._slurm_sigusr_handler_fn
        del self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor


@contextlib.contextmanager
def held(modes: list[OverlapMode]) -> Iterator[None]:
    """Every mode holds its gradient synchronisation."""
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode.hold_gradient_sync())
        yield
