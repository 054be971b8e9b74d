"""Evaluation, hooks and metrics where only one rank of a pipeline has the loss.

Ranks that share a batch (under tensor and pipeline parallelism) update a metric with the same samples. Torchmetrics sums over the
world and would count each sample once per rank, so here metrics sum over the ranks that see different data. With a pipeline, a metric
computes on the rank that has the loss, and the other ranks receive the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torchmetrics import Metric

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.base import Driver
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.group import Group
from lightning_overlap.strategy.logs import LogRecord, current_value, numbers_of, sendable_options, write_logs
from lightning_overlap.strategy.seams import logs_go_to


class Mirror:
    """Sends the results of the rank with the loss to every rank of a pipeline: of evaluation steps, metrics and hooks.

    Args:
        module: the user's module. Its metrics and hooks are replaced until :meth:`remove`.
        driver: the mode that runs the steps.
    """

    def __init__(self, module: LightningModule, driver: Driver) -> None:
        self._module, self._driver = module, driver
        self._in_step = False
        self._metrics = MirroredMetrics(module, driver, lambda: self._in_step)
        self._replacements = ExitStack()
        self._replacements.enter_context(explaining(module, driver))
        if driver.evaluates_loss_on_one_rank:
            self._replacements.enter_context(failing_together(module, driver))

    def add_metrics(self) -> None:
        """Mirrors the metrics that were added to the module since the last step."""
        self._metrics.add()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Encloses a step of the user, inside which metrics compute on each rank alone."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def remove(self) -> None:
        """Restores the user's metrics and hooks."""
        self._replacements.close()
        self._metrics.remove()


def mirrored_step(strategy: Strategy, module: LightningModule, driver: Driver, step: Callable[[], Any]) -> Any:
    """Runs a validation step to its end on the rank with the loss; every rank logs and returns its numbers. Collective.

    Args:
        strategy: Lightning's strategy, which reduces logged values.
        module: the user's module.
        driver: the mode that ends the step before the loss on the other ranks.
        step: calls ``validation_step``.

    Returns:
        The numbers in the output of ``validation_step``.
    """

    def run() -> tuple[Any, list[LogRecord]]:
        records: list[LogRecord] = []
        output = None

        def keep(hook: str, name: str, value: Any, **options: Any) -> None:
            records.append(LogRecord(hook, name, current_value(value), sendable_options(options)))

        with logs_go_to(module.trainer, keep), driver.evaluating():
            output = step()
        if isinstance(output, Mapping):
            return numbers_of(output, "validation_step", "on_validation_batch_end"), records
        return numbers_of({"output": output}, "validation_step", "on_validation_batch_end").get("output"), records

    if not driver.has_the_loss:
        run()  # until the driver ends it; an error here is not sent to the others
    output, records = driver.with_the_loss(run)
    write_logs(strategy, module, records)
    return output


class _FailsTogether:
    """An ``on_validation_epoch_end`` that raises on all ranks if it fails on one without the loss. Copies have the plain hook."""

    def __init__(self, module: LightningModule, driver: Driver) -> None:
        self._module, self._driver = module, driver
        self.__wrapped__ = module.on_validation_epoch_end

    def __call__(self) -> None:
        failure: Exception | None = None
        try:
            self.__wrapped__()
        except Exception as error:
            failure = error
        message = self._driver.error_without_loss(f"{type(failure).__name__}: {failure}" if failure else None)
        if message is not None:
            raise ConfigError(
                f"on_validation_epoch_end failed on a rank without the last stage ({message}). With "
                "pipeline_parallel.evaluation='last_stage', validation_step stops inside the model call on such a rank, so what it "
                "stores on self later does not exist there. Set evaluation='replicate', or collect values in a torchmetrics.Metric"
            ) from failure
        if failure is not None:
            raise failure

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, "on_validation_epoch_end")


@contextmanager
def failing_together(module: LightningModule, driver: Driver) -> Iterator[None]:
    """Inside, an ``on_validation_epoch_end`` that fails for want of the last stage's attributes raises the same error on all ranks.

    Args:
        module: the user's module.
        driver: the mode that ends validation steps before the loss on some ranks.
    """
    module.on_validation_epoch_end = _FailsTogether(module, driver)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.on_validation_epoch_end


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_train_end")
"""Hooks that may read attributes that ``training_step`` has set."""


class _Explained:
    """A hook whose error, on a rank without the loss, names the likely cause. Copies of the module have the plain hook."""

    def __init__(self, module: LightningModule, name: str, driver: Driver) -> None:
        self._module, self._name, self._driver = module, name, driver
        self.__wrapped__ = getattr(module, name)  # Lightning reads it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(*args, **kwargs)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self._driver.has_the_loss or isinstance(error, ConfigError | TransferError):
                raise
            raise ConfigError(
                f"{self._name} failed on a rank without the last stage ({type(error).__name__}: {error}). On such a rank "
                "training_step stops inside the model call, so what it stores on self later does not exist there. Return numbers in a "
                "dictionary with the loss: on_train_batch_end receives it as outputs on every rank. Or log them, or collect values in "
                "a torchmetrics.Metric"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, self._name)


@contextmanager
def explaining(module: LightningModule, driver: Driver) -> Iterator[None]:
    """Inside, :data:`HOOKS` that fail on a rank without the loss name the likely cause.

    Args:
        module: the user's module.
        driver: the mode that ends training steps before the loss on some ranks.
    """
    overridden = [name for name in HOOKS if getattr(type(module), name) is not getattr(LightningModule, name)]
    for name in overridden:
        setattr(module, name, _Explained(module, name, driver))
    try:
        yield
    finally:
        for name in overridden:
            delattr(module, name)


@contextmanager
def metrics_over(group: Group) -> Iterator[None]:
    """Inside, every metric without a process group synchronizes over this group.

    The class is changed, not its instances: users also make metrics later, keep them in lists and callbacks where no search finds
    them, and copy them, and a process group cannot be copied.

    Args:
        group: the ranks that see different data.
    """
    over_the_world = Metric.sync

    def sync(
        metric: Metric,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if process_group is None and metric.process_group is None:
            if group.size == 1:
                return
            process_group = group.process_group
        over_the_world(metric, dist_sync_fn, process_group, should_sync, distributed_available)

    Metric.sync = sync  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Metric.sync = over_the_world  # type: ignore[method-assign]


class MirroredMetrics:
    """Makes a module's metrics return, on all ranks, the result of the rank with the loss, the only one that updates them.

    Args:
        module: the user's module.
        driver: the mode that runs its steps.
        in_step: whether a step runs. Inside one a metric computes on this rank alone: the others are not at the same call.
    """

    def __init__(self, module: LightningModule, driver: Driver, in_step: Callable[[], bool]) -> None:
        self._module, self._driver, self._in_step = module, driver, in_step
        self._plain: dict[int, tuple[Metric, Callable[..., Any]]] = {}  # by id, because a metric's hash depends on its values
        self._computing = False
        self.add()

    def add(self) -> None:
        """Mirrors the metrics that were added to the module since the last call."""
        for metric in self._module.modules():
            if isinstance(metric, Metric) and id(metric) not in self._plain:
                self._plain[id(metric)] = metric, metric.compute
                metric.compute = self._mirrored(metric.compute)  # type: ignore[method-assign]

    def _mirrored(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            if self._computing or self._in_step():  # an inner metric is part of the outer one's result
                return plain(*args, **kwargs)
            self._computing = True
            try:
                return self._driver.with_the_loss(lambda: plain(*args, **kwargs))
            finally:
                self._computing = False

        return compute

    def remove(self) -> None:
        """Restores the metrics' own ``compute``."""
        for metric, plain in self._plain.values():
            metric.compute = plain  # type: ignore[method-assign]
        self._plain.clear()
