"""Where the strategy meets Lightning's loops: the only file that uses private names of Lightning and torchmetrics."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
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
    raise ImportError(f"this version of lightning lacks a part that is needed ({error}). {SUPPORTED}") from error

__all__ = ["MultiProcessingLauncher", "SubprocessScriptLauncher", "TunerExit"]


class PrivateName(NamedTuple):
    """A private attribute of a library's class.

    Attributes:
        owner: the class.
        name: of the attribute; one that instances have is set by ``owner.__init__``.
        use: what it is here for.
    """

    owner: type
    name: str
    use: str


PRIVATE_NAMES = (
    PrivateName(_TrainingEpochLoop, "_broadcast_sigterm_tensor", "a blocking broadcast before every batch, replaced"),
    PrivateName(_SignalConnector, "_sigterm_notifier_fn", "a broadcast inside the signal handler, replaced"),
    PrivateName(_SignalConnector, "_slurm_sigusr_handler_fn", "a checkpoint inside the signal handler, put off to the next batch"),
    PrivateName(Precision, "_after_closure", "on_before_optimizer_step and clipping, called between backward and step"),
    PrivateName(_AutomaticOptimization, "_make_closure", "zeroes gradients after training_step, which here runs backward"),
    PrivateName(_AutomaticOptimization, "_make_zero_grad_fn", "called before training_step instead"),
    PrivateName(_AutomaticOptimization, "_training_step", "calls the strategy's"),
    PrivateName(_AutomaticOptimization, "_make_backward_fn", "calls the strategy's"),
    PrivateName(Trainer, "_results", "what self.log writes to"),
    PrivateName(Trainer, "_logger_connector", "knows in which hook self.log is called"),
    PrivateName(Trainer, "_signal_connector", "whose handlers are replaced"),
    PrivateName(_LoggerConnector, "should_reset_tensors", "asked before a value is logged"),
    PrivateName(_LoggerConnector, "_current_fx", "the hook in which self.log is called, set for values of other ranks"),
    PrivateName(_ResultCollection, "log", "kept apart for each microbatch"),
    PrivateName(LightningModule, "_compiler_ctx", "says that a module was compiled"),
    PrivateName(Metric, "_forward_cache", "a metric's value for the last batch, which self.log logs"),
    PrivateName(DDPStrategy, "_configure_launcher", "overridden: launchers tell the other ranks of an error"),
    PrivateName(DDPStrategy, "_launcher", "set"),
    PrivateName(DDPStrategy, "_start_method", "which launcher"),
    PrivateName(DDPStrategy, "_timeout", "how long a transfer may take"),
    PrivateName(DDPStrategy, "_layer_sync", "how batch norms are converted"),
    PrivateName(DDPStrategy, "_precision_plugin", "set, with clipping over all ranks"),
    PrivateName(DDPStrategy, "_checkpoint_io", "set, with one that a crash leaves a good checkpoint of"),
    PrivateName(DDPStrategy, "_get_process_group_backend", "gloo or nccl, by the device"),
)
"""Every private name of Lightning and torchmetrics that this package uses. Strategies use theirs by inheritance; all others are used
in this file only."""


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

GRADIENT_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_before_zero_grad",
)


def gradient_readers(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """The user's hooks that run between backward and the optimizer's step, where gradients are read or changed."""
    found = []
    for owner, base in ((module, LightningModule), *((c, Callback) for c in trainer.callbacks)):  # type: ignore[attr-defined]
        own = type(owner).__module__.startswith("lightning.pytorch.")  # Lightning's own hooks look at no gradients
        for hook in GRADIENT_HOOKS:
            # LambdaCallback has its hooks on the instance.
            if hook in vars(owner) or (not own and getattr(type(owner), hook, None) is not getattr(base, hook, None)):
                found.append(f"{type(owner).__name__}.{hook}")
    return tuple(found)


CLIPPING = frozenset(["clip_grad_norm_", "clip_grad_norm", "clip_grads_with_norm_"])
"""Functions of torch that scale gradients by a norm over all of them."""


def clippers(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """The user's hooks that clip gradients by torch's functions, which know nothing of what other ranks have."""
    owners = {type(owner).__name__: owner for owner in (module, *trainer.callbacks)}  # type: ignore[attr-defined]
    found = []
    for reader in gradient_readers(trainer, module):
        owner, hook = reader.split(".")
        function = inspect.unwrap(getattr(owners[owner], hook))
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None and CLIPPING.intersection(names_in(code)):
            found.append(reader)
    return tuple(found)


def warn_of_parts(facts: Facts) -> None:
    """Says of which hooks see a part of the gradients, where a rank has a part of the model."""
    readers = [reader for reader in facts.gradient_readers if not reader.endswith(("zero_grad", ".optimizer_step"))]
    if readers:
        rank_zero_warn(
            f"{', '.join(readers)} may read gradients, and a rank has those of its part of the model: under tensor_parallel pieces of "
            "cut weights, under pipeline_parallel its stages'. What goes element by element is right; a norm or a sum over gradients "
            "is of this rank's part, and differs from rank to rank. For clipping use gradient_clip_val, or call "
            "self.clip_gradients(...) in configure_gradient_clipping, which count all parts"
        )


def unfreezers(trainer: Trainer) -> tuple[str, ...]:
    """Callbacks that give the optimizer more parameters while training."""
    return tuple(type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning))  # type: ignore[attr-defined]


def averagers(trainer: Trainer) -> tuple[str, ...]:
    """Callbacks that read and write all weights while training."""
    kinds = (StochasticWeightAveraging, WeightAveraging)
    return tuple(type(c).__name__ for c in trainer.callbacks if isinstance(c, kinds))  # type: ignore[attr-defined]


def is_compiled(module: LightningModule) -> bool:
    """Whether code that runs past Python is in the module: ``torch.compile``, or TorchScript."""
    # Lightning sets it on the instance when it takes a compiled module apart.
    return getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(part, ScriptModule) or torch_seams.is_compiled(part) for part in module.modules()
    )


def adapt_precision(
    plugin: Precision,
    stepped_parameters: Callable[..., Any],
    clip_by_norm: Callable[..., None],
    run_backward: Callable[[Callable[[], None]], None],
) -> None:
    """Has the plugin clip and run backward as sharded training needs it.

    Args:
        plugin: changed in place.
        stepped_parameters: what an optimizer steps: shards, where the modes shard its state.
        clip_by_norm: clips by the norm over all ranks.
        run_backward: takes the plugin's backward, calls it or not, and does what must be over before ``on_after_backward`` is called.
            ``Strategy.backward`` is not overridden for that: tests and callbacks replace it, to count its calls.
    """
    plugin.main_params = stepped_parameters  # type: ignore[method-assign]
    plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign]
    plugin.backward = partial(_backward, plugin, run_backward)  # type: ignore[method-assign]


def _backward(plugin: Precision, run_backward: Callable[[Callable[[], None]], None], *args: Any, **kwargs: Any) -> None:
    """Stands for ``plugin.backward``. A function of the module, so that the plugin can be pickled for spawned processes."""
    run_backward(partial(plain_backward, plugin, *args, **kwargs))


def plain_backward(plugin: Precision, *args: Any, **kwargs: Any) -> None:
    """The plugin's backward, as its class defines it: without what :func:`adapt_precision` has put around it."""
    type(plugin).backward(plugin, *args, **kwargs)


def after_closure(plugin: Precision, model: LightningModule, optimizer: Any) -> None:
    """``on_before_optimizer_step`` and clipping."""
    plugin._after_closure(model, optimizer)


def facts_of(trainer: Trainer, module: LightningModule, config: OverlapConfig, **known: Any) -> Facts:
    """The facts of a run; ``known`` are those that the caller has (ranks, device, backend, optimizers)."""
    found = [mode.look(module, config.of(mode), config.parallel_plan) for mode in config.modes]
    return Facts(
        of_modes=tuple(facts for facts in found if facts is not None),
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
    """Gradients are zeroed before ``training_step``, for one that runs backward too, and not between the two."""
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
    """Stands for the ``log`` of a trainer's results while steps run: what a thread logs goes to its own receiver.

    Args:
        write: the results' own ``log``.
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
        """Inside, this thread's logs go to ``receive``."""
        before = getattr(self._threads, "receive", self._write)
        self._threads.receive = receive
        try:
            yield
        finally:
            self._threads.receive = before


_LOG_LOCK = threading.Lock()
"""Held while a router is put in the place of a results' ``log``, or taken away: another thread's step may do the same."""


@contextlib.contextmanager
def logs_go_to(trainer: Trainer, keep: Callable[..., None] | None) -> Iterator[None]:
    """Inside, what this thread passes to ``self.log`` goes to ``keep`` and not to the trainer's results; with None, nowhere."""
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
    """Writes to the trainer's results as ``self.log`` does when it is called in ``hook``; nothing where there are no results."""
    results = trainer._results
    if results is None:
        return
    if trainer._logger_connector.should_reset_tensors(hook):
        results.reset(metrics=False, fx=hook)
    trainer._logger_connector._current_fx = hook
    results.log(hook, name, value, **options)


def last_value(metric: Metric) -> Any:
    """A metric's value for the last batch, which its ``forward`` has kept."""
    return metric._forward_cache


def set_last_value(metric: Metric, value: Any) -> None:
    """Sets what ``forward`` would have kept: what ``self.log`` logs of a metric in a step."""
    metric._forward_cache = value


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
