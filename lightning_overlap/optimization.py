"""Where the strategy meets Lightning's loops. The only file that touches Lightning's private names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_overlap.modes.base import OverlapMode
    from lightning_overlap.strategy import OverlapStrategy

PRIVATE_NAMES: tuple[tuple[type, str, str], ...] = (
    (_TrainingEpochLoop, "_broadcast_sigterm_tensor", "a blocking broadcast before every batch, replaced"),
    (_SignalConnector, "_sigterm_notifier_fn", "a broadcast inside the signal handler, replaced"),
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
    """SIGTERM on any rank stops all ranks at the same batch, and no batch waits for it.

    Each batch posts an all-reduce of "asked to stop" and reads the one that the batch before it has posted.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._asked = False
        self._group: Any = None
        self._flag: Tensor | None = None
        self._work: Any = None
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        connector._sigterm_notifier_fn = self._on_sigterm  # type: ignore[method-assign, assignment]
        loop._broadcast_sigterm_tensor = self._check  # type: ignore[method-assign]

    def _on_sigterm(self, *_: Any) -> None:
        # Only a flag: a collective inside a signal handler meets other ranks in the middle of something else. And one of
        # our own, since Lightning's would stop this rank alone.
        self._asked = True

    def _check(self) -> None:
        if self._group is None:
            # gloo, so that reading the flag never waits for the device
            self._group = dist.new_group(backend="gloo")
        stop = False
        if self._work is not None:
            self._work.wait()
            assert self._flag is not None, "the flag is set with its transfer"
            stop = bool(self._flag.item())
        self._flag = torch.tensor([int(self._asked)])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        if stop:
            self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    def close(self, *, complete: bool = True) -> None:
        """Lightning's own methods come back; the last flag is taken in, if ``complete``."""
        if self._work is not None and complete:
            self._work.wait()
        self._work = None
        with contextlib.suppress(AttributeError):  # removed already
            del self._trainer._signal_connector._sigterm_notifier_fn
            del self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor


@contextlib.contextmanager
def held(modes: list[OverlapMode]) -> Iterator[None]:
    """Every mode holds its gradient synchronisation."""
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode.hold_gradient_sync())
        yield
