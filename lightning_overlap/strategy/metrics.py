"""Torchmetrics sum over the ranks that see different data, and compute where the loss is.

Ranks that share a batch (of tensor and pipeline parallelism) update a metric with the same samples. Torchmetrics, which knows the
world only, would count each of them once a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric

if TYPE_CHECKING:
    from lightning_overlap.modes.base import OverlapMode
    from lightning_overlap.ranks.group import Group


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
        mode: that runs its steps.
        in_step: whether a step runs: a metric that is computed there has no other rank to tell it to.
    """

    def __init__(self, module: LightningModule, mode: OverlapMode, in_step: Callable[[], bool]) -> None:
        self._module, self._mode, self._in_step = module, mode, in_step
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
                return self._mode.with_the_loss(lambda: plain(*args, **kwargs))
            finally:
                self._computing = False

        return compute

    def remove(self) -> None:
        """The metrics are the user's again."""
        for metric, plain in self._plain.values():
            metric.compute = plain  # type: ignore[method-assign]
        self._plain.clear()
