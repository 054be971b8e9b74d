"""Evaluation, hooks and metrics where only one rank of a pipeline has the loss.

Ranks that share a batch (of tensor and pipeline parallelism) update a metric with the same samples. Torchmetrics, which knows the
world only, would count each of them once a rank: metrics sum over the ranks that see different data. With a pipeline, they compute on
the rank that has the loss, and the other ranks get the result.
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
    """Gives every rank of a pipeline what only the rank with the loss computes: evaluation steps, metrics, errors of hooks.

    Args:
        module: the user's, whose metrics and hooks are replaced until :meth:`remove`.
        driver: the mode that runs the steps.
    """

    def __init__(self, module: LightningModule, driver: Driver) -> None:
        self._module, self._driver = module, driver
        self._in_step = False
        self._metrics = MirroredMetrics(module, driver, lambda: self._in_step)
        self._replacements = ExitStack()
        self._replacements.enter_context(explaining(module, driver))
        if driver.mirrors_evaluation:
            self._replacements.enter_context(failing_together(module, driver))

    def add_metrics(self) -> None:
        """Takes in the metrics that the module has got since the last step."""
        self._metrics.add()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the user's, in which a metric computes on its own."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def remove(self) -> None:
        """The metrics and the hooks are the user's again."""
        self._replacements.close()
        self._metrics.remove()


def mirrored_step(strategy: Strategy, module: LightningModule, driver: Driver, step: Callable[[], Any]) -> Any:
    """Runs a validation step to its end on the rank with the loss; every rank logs and returns its numbers. Collective.

    Args:
        strategy: Lightning's, which reduces what is logged.
        module: the user's.
        driver: the mode for which the other ranks leave the step.
        step: calls ``validation_step``.

    Returns:
        The numbers in what ``validation_step`` returns.
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
        run()  # to where it is left; what fails here is no answer that the others wait for
    output, records = driver.with_the_loss(run)
    write_logs(strategy, module, records)
    return output


class _FailsTogether:
    """``on_validation_epoch_end`` that fails on all ranks where it fails on one that the steps are left on. Copies do without."""

    def __init__(self, module: LightningModule, driver: Driver) -> None:
        self._module, self._driver = module, driver
        self.__wrapped__ = module.on_validation_epoch_end

    def __call__(self) -> None:
        failed: Exception | None = None
        try:
            self.__wrapped__()
        except Exception as error:
            failed = error
        said = self._driver.failed_without_loss(f"{type(failed).__name__}: {failed}" if failed else None)
        if said is not None:
            raise ConfigError(
                f"on_validation_epoch_end fails on the ranks that validation_step is left on ({said}): what it collects on self is on "
                "the last stage only with pipeline_parallel.evaluation='mirror'. Set evaluation='replicate', or collect in a "
                "torchmetrics.Metric"
            ) from failed
        if failed is not None:
            raise failed

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, "on_validation_epoch_end")


@contextmanager
def failing_together(module: LightningModule, driver: Driver) -> Iterator[None]:
    """What ``validation_step`` collects on the module is where the loss is. A hook that fails without it says so, on all ranks.

    Args:
        module: the user's.
        driver: the mode that other ranks leave the steps for.
    """
    module.on_validation_epoch_end = _FailsTogether(module, driver)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.on_validation_epoch_end


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_train_end")
"""Hooks that may read what ``training_step`` has left on the module."""


class _Explained:
    """A hook of the module's that fails on a rank that ``training_step`` is left on says that this may be why. Copies do without."""

    def __init__(self, module: LightningModule, name: str, driver: Driver) -> None:
        self._module, self._name, self._driver = module, name, driver
        self.__wrapped__ = getattr(module, name)  # which Lightning looks at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(*args, **kwargs)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self._driver.has_the_loss or isinstance(error, ConfigError | TransferError):
                raise
            raise ConfigError(
                f"{self._name} fails on a rank that training_step is left on ({type(error).__name__}: {error}): what training_step "
                "leaves on self after the model is called is on the last stage only. Return it, if it is a number, in a dictionary "
                "with the loss, which on_train_batch_end gets as outputs on every rank; log it; or collect it in a torchmetrics.Metric"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, self._name)


@contextmanager
def explaining(module: LightningModule, driver: Driver) -> Iterator[None]:
    """Hooks of a fit say where things are that a step has left.

    Args:
        module: the user's.
        driver: the mode that leaves its steps.
    """
    given = [name for name in HOOKS if getattr(type(module), name) is not getattr(LightningModule, name)]
    for name in given:
        setattr(module, name, _Explained(module, name, driver))
    try:
        yield
    finally:
        for name in given:
            delattr(module, name)


@contextmanager
def metrics_over(group: Group) -> Iterator[None]:
    """Inside, every metric that has no process group of its own synchronises over this one.

    The class is changed, not its instances: metrics are also made later than this, kept in lists and callbacks where nobody finds
    them, and copied, which a process group cannot be.

    Args:
        group: ranks that see different data.
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
    """A module's metrics compute, on all ranks, what they compute on the rank with the loss, which alone has updated them.

    Args:
        module: the user's.
        driver: the mode that runs its steps.
        in_step: whether a step runs: a metric that is computed there has no other rank to tell it to.
    """

    def __init__(self, module: LightningModule, driver: Driver, in_step: Callable[[], bool]) -> None:
        self._module, self._driver, self._in_step = module, driver, in_step
        self._plain: dict[int, tuple[Metric, Callable[..., Any]]] = {}  # by id: a metric's hash is that of its values
        self._computing = False
        self.add()

    def add(self) -> None:
        """Takes in the metrics that the module has got since it was called last."""
        for metric in self._module.modules():
            if isinstance(metric, Metric) and id(metric) not in self._plain:
                self._plain[id(metric)] = metric, metric.compute
                metric.compute = self._mirrored(metric.compute)  # type: ignore[method-assign]

    def _mirrored(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            if self._computing or self._in_step():  # a metric inside of another one is told with it
                return plain(*args, **kwargs)
            self._computing = True
            try:
                return self._driver.with_the_loss(lambda: plain(*args, **kwargs))
            finally:
                self._computing = False

        return compute

    def remove(self) -> None:
        """The metrics are the user's again."""
        for metric, plain in self._plain.values():
            metric.compute = plain  # type: ignore[method-assign]
        self._plain.clear()
