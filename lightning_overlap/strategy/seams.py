"""The seam to Lightning's loops: the only file that uses private names of Lightning and torchmetrics."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.jit import ScriptModule
from torchmetrics import Metric

from lightning_overlap import torch_seams
from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.strategy.probe import names_in

SUPPORTED = "lightning_overlap supports lightning>=2.6,<2.7 and torchmetrics>=1.9: install one of these."
try:
    from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
    from lightning.pytorch.utilities.exceptions import _TunerExitException as TunerExit
except ImportError as error:
    raise ImportError(f"lightning_overlap needs a name that this version of lightning lacks ({error}). {SUPPORTED}") from error

__all__ = ["MultiProcessingLauncher", "SubprocessScriptLauncher", "TunerExit"]


class PrivateName(NamedTuple):
    """A private attribute of a library's class.

    Attributes:
        owner: the class.
        name: of the attribute, set in the class or by ``owner.__init__``.
        use: its purpose here.
    """

    owner: type
    name: str
    use: str


PRIVATE_NAMES = (
    PrivateName(_TrainingEpochLoop, "_broadcast_sigterm_tensor", "a blocking broadcast before every batch, replaced"),
    PrivateName(_SignalConnector, "_sigterm_notifier_fn", "a broadcast inside the signal handler, replaced"),
    PrivateName(_SignalConnector, "_slurm_sigusr_handler_fn", "a checkpoint inside the signal handler, postponed to the next batch"),
    PrivateName(Precision, "_after_closure", "on_before_optimizer_step and clipping, called between backward and step"),
    PrivateName(_AutomaticOptimization, "_make_closure", "zeroes gradients after training_step, which runs backward under a driver"),
    PrivateName(_AutomaticOptimization, "_make_zero_grad_fn", "called before training_step instead"),
    PrivateName(_AutomaticOptimization, "_training_step", "calls the strategy's training_step"),
    PrivateName(_AutomaticOptimization, "_make_backward_fn", "calls the strategy's backward"),
    PrivateName(Trainer, "_results", "self.log writes to it"),
    PrivateName(Trainer, "_logger_connector", "has the hook in which self.log is called"),
    PrivateName(Trainer, "_signal_connector", "its handlers are replaced"),
    PrivateName(_LoggerConnector, "should_reset_tensors", "asked before a value is logged"),
    PrivateName(_LoggerConnector, "_current_fx", "the hook in which self.log is called, set for values of other ranks"),
    PrivateName(_ResultCollection, "log", "kept separately for each microbatch"),
    PrivateName(LightningModule, "_compiler_ctx", "shows that a module was compiled"),
    PrivateName(Metric, "_forward_cache", "a metric's value for the last batch, logged by self.log"),
    PrivateName(DDPStrategy, "_configure_launcher", "overridden: launchers announce an error to the other ranks"),
    PrivateName(DDPStrategy, "_launcher", "set"),
    PrivateName(DDPStrategy, "_start_method", "decides the launcher"),
    PrivateName(DDPStrategy, "_timeout", "how long a transfer may take"),
    PrivateName(DDPStrategy, "_layer_sync", "how batch norms are converted"),
    PrivateName(DDPStrategy, "_precision_plugin", "set, with clipping over all ranks"),
    PrivateName(DDPStrategy, "_checkpoint_io", "set, to an IO whose last checkpoint survives a crash"),
    PrivateName(DDPStrategy, "_get_process_group_backend", "gloo or nccl, by the device"),
)
"""Every private name of Lightning and torchmetrics in this package. Strategies inherit theirs; only this file uses the others."""


def refuse_missing(names: Sequence[PrivateName]) -> None:
    """Checks that the installed libraries have these names.

    Raises:
        ImportError: one is missing.
    """
    for owner, name, use in names:
        makers = [inspect.unwrap(maker) for kind in owner.__mro__ if inspect.isfunction(maker := vars(kind).get("__init__"))]
        if not hasattr(owner, name) and not any(name in names_in(maker.__code__) for maker in makers):
            library = owner.__module__.partition(".")[0]
            raise ImportError(f"this version of {library} has no {owner.__name__}.{name} ({use}). {SUPPORTED}")


refuse_missing(PRIVATE_NAMES)


def hide_deprecation() -> None:
    """Hides a deprecation of torch's that Lightning's own code causes, once in each process, and that no user can act on."""
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", module=r"lightning\.pytorch\.")


GRADIENT_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_before_zero_grad",
)


def gradient_readers(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """Lists the user's hooks between backward and the optimizer's step, where gradients may be read or changed."""
    readers = []
    for owner, base in ((module, LightningModule), *((c, Callback) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        is_lightnings = type(owner).__module__.startswith("lightning.pytorch.")  # Lightning's own hooks read no gradients
        for hook in GRADIENT_HOOKS:
            # LambdaCallback has its hooks on the instance.
            if hook in vars(owner) or (not is_lightnings and getattr(type(owner), hook, None) is not getattr(base, hook, None)):
                readers.append(f"{type(owner).__name__}.{hook}")
    return tuple(readers)


CLIPPING = frozenset(["clip_grad_norm_", "clip_grad_norm", "clip_grads_with_norm_"])
"""Functions of torch that scale gradients by a norm over all of them."""


def clippers(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """Lists the user's hooks that clip by torch's functions, which do not include the gradients of other ranks in the norm."""
    owners = {type(owner).__name__: owner for owner in (module, *trainer.callbacks)}  # type: ignore[attr-defined]
    clipping = []
    for reader in gradient_readers(trainer, module):
        owner, hook = reader.split(".")
        function = inspect.unwrap(getattr(owners[owner], hook))
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None and CLIPPING.intersection(names_in(code)):
            clipping.append(reader)
    return tuple(clipping)


def warn_of_gradient_parts(facts: Facts) -> None:
    """Warns of hooks that see only this rank's part of the gradients, where a mode shards the model."""
    readers = [reader for reader in facts.gradient_readers if not reader.endswith(("zero_grad", ".optimizer_step"))]
    if readers:
        rank_zero_warn(
            f"{', '.join(readers)} may read gradients, and a rank has only those of its part of the model. Elementwise code is right. "
            "A norm or a sum over gradients covers this rank's part only. For clipping set gradient_clip_val, or call "
            "self.clip_gradients(...) in configure_gradient_clipping: both count all parts"
        )


def unfreezers(trainer: Trainer) -> tuple[str, ...]:
    """Lists callbacks that add parameters to the optimizer during training."""
    return tuple(type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning))  # type: ignore[attr-defined]


def averagers(trainer: Trainer) -> tuple[str, ...]:
    """Lists callbacks that read and write all weights during training."""
    kinds = (StochasticWeightAveraging, WeightAveraging)
    return tuple(type(c).__name__ for c in trainer.callbacks if isinstance(c, kinds))  # type: ignore[attr-defined]


def is_compiled(module: LightningModule) -> bool:
    """Whether a part of the module is compiled, by ``torch.compile`` or TorchScript."""
    # Lightning sets the attribute when it unwraps a compiled module.
    return getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(part, ScriptModule) or torch_seams.is_compiled(part) for part in module.modules()
    )


def adapt_precision(
    plugin: Precision,
    stepped_parameters: Callable[..., Any],
    clip_by_norm: Callable[..., None],
    run_backward: Callable[[Callable[[], None]], None],
) -> None:
    """Makes the plugin clip the parameters that this rank updates, by the norm over all ranks, and run backward as the modes need it.

    Args:
        plugin: Lightning's precision plugin, changed in place.
        stepped_parameters: gives the parameters that an optimizer updates on this rank.
        clip_by_norm: clips by the norm over all ranks.
        run_backward: is called with the plugin's backward, and completes gradients before ``on_after_backward`` is called.
            ``Strategy.backward`` is not overridden for that, because tests and callbacks replace it to count its calls.
    """
    plugin.main_params = stepped_parameters  # type: ignore[method-assign]
    plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign]
    plugin.backward = partial(_backward, plugin, run_backward)  # type: ignore[method-assign]


def _backward(plugin: Precision, run_backward: Callable[[Callable[[], None]], None], *args: Any, **kwargs: Any) -> None:
    """Takes the place of ``plugin.backward``. A module-level function, so that the plugin can be pickled for spawned processes."""
    run_backward(partial(plain_backward, plugin, *args, **kwargs))


def plain_backward(plugin: Precision, *args: Any, **kwargs: Any) -> None:
    """Runs backward as the plugin's class defines it, without what :func:`adapt_precision` adds."""
    type(plugin).backward(plugin, *args, **kwargs)


def after_closure(plugin: Precision, model: LightningModule, optimizer: Any) -> None:
    """Calls ``on_before_optimizer_step`` and clips gradients."""
    plugin._after_closure(model, optimizer)


def facts_of(trainer: Trainer, module: LightningModule, config: OverlapConfig, **known: Any) -> Facts:
    """Collects the facts of a run.

    Args:
        trainer: Lightning's Trainer.
        module: the user's module.
        config: the request.
        known: facts of the caller: ranks, device, backend, optimizers.
    """
    of_modes = [mode.look(module, config.of(mode), config.parallel_plan) for mode in config.modes]
    return Facts(
        of_modes=tuple(facts for facts in of_modes if facts is not None),
        precision=str(trainer.precision),
        gradient_clip_val=trainer.gradient_clip_val,
        automatic_optimization=module.automatic_optimization,
        gradient_readers=gradient_readers(trainer, module),
        clippers=clippers(trainer, module),
        unfreezers=unfreezers(trainer),
        averagers=averagers(trainer),
        compiled=is_compiled(module),
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        **known,
    )


@contextlib.contextmanager
def zeroing_first(trainer: Trainer) -> Iterator[None]:
    """Inside, gradients are zeroed before ``training_step`` and not after it, because a driver's ``training_step`` runs backward."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Closure:
        zero_grad = loop._make_zero_grad_fn(batch_idx, optimizer)

        def step() -> Any:
            if zero_grad is not None:
                zero_grad()
            return loop._training_step(kwargs)

        return Closure(step, loop._make_backward_fn(optimizer))

    loop._make_closure = make_closure  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loop._make_closure


class _LogRouter:
    """Replaces the ``log`` of a trainer's results while steps run, and sends each thread's values to the thread's receiver.

    Args:
        write: the results' own ``log``, the receiver of all other threads.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._threads = threading.local()
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        receive: Callable[..., None] = getattr(self._threads, "receive", self._write)
        receive(*args, **kwargs)

    @contextlib.contextmanager
    def to(self, receive: Callable[..., None]) -> Iterator[None]:
        """Inside, ``receive`` gets the values that this thread logs."""
        before = getattr(self._threads, "receive", self._write)
        self._threads.receive = receive
        try:
            yield
        finally:
            self._threads.receive = before


_LOG_LOCK = threading.Lock()
"""Held while a router replaces ``log`` or is removed, because steps of several threads do so."""


@contextlib.contextmanager
def logs_go_to(trainer: Trainer, keep: Callable[..., None] | None) -> Iterator[None]:
    """Inside, ``keep`` gets the values that this thread logs, and not the trainer's results; with None, they are dropped."""
    results = trainer._results
    if results is None:
        yield
        return
    with _LOG_LOCK:
        if not isinstance(results.log, _LogRouter):
            results.log = _LogRouter(results.log)
        router: Any = results.log
        router.users += 1
    try:
        with router.to(keep or (lambda *_, **__: None)):
            yield
    finally:
        with _LOG_LOCK:
            router.users -= 1
            if not router.users:
                del results.log


def write_log(trainer: Trainer, hook: str, name: str, value: Any, **options: Any) -> None:
    """Writes to the trainer's results, if there are any, as ``self.log`` does when it is called in ``hook``."""
    results = trainer._results
    if results is None:
        return
    if trainer._logger_connector.should_reset_tensors(hook):
        results.reset(metrics=False, fx=hook)
    trainer._logger_connector._current_fx = hook
    results.log(hook, name, value, **options)


def last_value(metric: Metric) -> Any:
    """Returns a metric's value for the last batch, which its ``forward`` caches."""
    return metric._forward_cache


def set_last_value(metric: Metric, value: Any) -> None:
    """Sets a metric's value for the last batch, which ``self.log`` logs in a step."""
    metric._forward_cache = value


class Preemption:
    """Makes SIGTERM and SLURM's requeue signal act on all ranks at the same batch, without a wait in any batch.

    Each batch posts the sum over the ranks of two flags (stop, requeue), and reads the sum that the batch before it has posted.
    Lightning's own handlers run collectives inside the signal handler, when other ranks may be at any other point.

    Args:
        trainer: Lightning's Trainer. Its methods are replaced until :meth:`close`.
        group: all ranks, on the CPU, so that reading the sum does not wait for a device.
    """

    def __init__(self, trainer: Trainer, group: Group) -> None:
        self._trainer = trainer
        self._group = group
        self._requests = [0, 0]  # to stop (SIGTERM), to requeue (SLURM's signal)
        self._pending: Pending | None = None
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        self._requeue = connector._slurm_sigusr_handler_fn
        connector._sigterm_notifier_fn = lambda *_: self._request(0)  # type: ignore[method-assign]
        connector._slurm_sigusr_handler_fn = lambda *_: self._request(1)  # type: ignore[method-assign]
        loop._broadcast_sigterm_tensor = self._before_batch  # type: ignore[method-assign]

    def _request(self, index: int) -> None:
        self._requests[index] = 1

    def _before_batch(self) -> None:
        before, self._pending = self._pending, self._group.all_reduce(torch.tensor(self._requests), label="signals")
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
        """Acts, after the last batch, on signals that arrived since the batch before it."""
        for _ in range(2):  # reads the last batch's sum, then a final one
            self._before_batch()

    def close(self, *, complete: bool = True) -> None:
        """Restores Lightning's methods. Waits for the transfer under way, if ``complete``."""
        if complete:
            if self._pending is not None:
                self._pending.wait()
            self._group.close()
        del self._trainer._signal_connector._sigterm_notifier_fn
        del self._trainer._signal_connector._slurm_sigusr_handler_fn
        del self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
