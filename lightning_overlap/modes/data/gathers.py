"""Updated parameters on their way to the other ranks: which are to be sent, which are in flight, and waiting for them."""

from __future__ import annotations

import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.data.buffers import LiveBucket
from lightning_overlap.modes.data.guard import ReferenceGuard
from lightning_overlap.torch_seams import version_of


class Gathers:
    """The gathers of all buckets, posted in the order in which forward reads them.

    Args:
        buckets: the mode's, the same list for as long as the mode lives.
        prefetch: buckets in flight ahead of the one that forward waits for; None for all.
        aligned: none is posted before :meth:`end_step`.
        guard: of the parameters that are incomplete.

    Attributes:
        incomplete: keys of the buckets whose parameters are not all there.
    """

    def __init__(self, buckets: list[LiveBucket], prefetch: int | None, *, aligned: bool, guard: ReferenceGuard) -> None:
        self.incomplete: set[int] = set()
        self._guard = guard
        self._buckets = buckets
        self._prefetch = prefetch
        self._aligned = aligned
        self._to_post: list[LiveBucket] = []
        self._seen: dict[int, None] = {}  # keys of the buckets in the order in which this forward reads them

    def publish(self, bucket: LiveBucket) -> None:
        """This rank's piece of the bucket has been updated."""
        self.finish(bucket)
        if bucket.main is not None:
            bucket.data[bucket.own].copy_(bucket.main)
        # A weight that autograd saved before this cannot be used after it without an error.
        torch.autograd.graph.increment_version(bucket.parameters)
        bucket.versions = [version_of(parameter) for parameter in bucket.parameters]
        self._guard.guard(bucket.parameters)
        self.incomplete.add(bucket.key)
        self._to_post.append(bucket)
        if self._prefetch is None and not self._aligned:
            self.post_all()

    def post_all(self) -> None:
        """Posts what was held back to bound what is in flight."""
        while self._to_post:
            self._post_next()

    def complete(self, bucket: LiveBucket) -> None:
        """Somebody reads a parameter of the bucket: blocks until it is there."""
        if bucket.key not in self.incomplete:
            return
        if bucket.gather is None and bucket is min(self._to_post, key=_order):
            self._post_next()
        if bucket.gather is None:
            # Another bucket than the one that all ranks post next: then all are posted, since peers may wait for any.
            self.post_all()
        self._seen.setdefault(bucket.key)
        self.finish(bucket)
        while self._to_post and self._prefetch is not None and len(self.incomplete) - len(self._to_post) <= self._prefetch:
            self._post_next()

    def end_step(self) -> None:
        """Every bucket has been updated."""
        if self._aligned:
            self.post_all()

    def finish(self, bucket: LiveBucket) -> None:
        """Blocks until the bucket is there, if it is in flight."""
        if bucket.gather is None:
            return
        bucket.gather.wait()
        bucket.gather = None
        self.incomplete.discard(bucket.key)
        self._guard.free(bucket.parameters)
        self._refuse_lost_writes(bucket)
        torch.autograd.graph.increment_version(bucket.parameters)

    @staticmethod
    def _refuse_lost_writes(bucket: LiveBucket) -> None:
        for name, parameter, version in zip(bucket.names, bucket.parameters, bucket.versions, strict=True):
            if version_of(parameter) != version:
                raise ConfigError(
                    f"{name} was written through a view that was taken earlier (parameter.detach(), kept), while its update was on "
                    "its way to this rank, and the write is lost. Write to the parameter itself, which waits for the update: "
                    "with torch.no_grad(): parameter.copy_(...)"
                )

    def finish_all(self) -> None:
        """Blocks until every parameter is there."""
        self.post_all()
        for bucket in self._buckets:
            self.finish(bucket)

    def abandon(self) -> None:
        """Nothing is waited for any more: parameters are ordinary ones, with whatever has arrived."""
        self.incomplete.clear()
        for bucket in self._buckets:
            self._guard.free(bucket.parameters)

    def follow_order_seen(self) -> None:
        """What this forward read first is sent first in the next one."""
        # With a bound on what is in flight all ranks must post in one order: two that wait for different buckets would each
        # have left the other's unposted.
        if self._prefetch is None and all(bucket.group.keyed for bucket in self._buckets):
            for place, key in enumerate(self._seen):
                self._buckets[key].order = place
        self.forget_order_seen()

    def forget_order_seen(self) -> None:
        self._seen.clear()

    def _post_next(self) -> None:
        bucket = min(self._to_post, key=_order)
        self._to_post.remove(bucket)
        bucket.gather = bucket.group.all_gather(
            bucket.data, bucket.bounds, key=bucket.key, label=f"data.params{bucket.label}", priority=bucket.order
        )


def _order(bucket: LiveBucket) -> int:
    return bucket.order
