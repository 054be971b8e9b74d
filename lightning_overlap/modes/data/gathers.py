"""Gathers of updated parameters: posted in the order in which forward reads buckets, waited for when a parameter is read."""

from __future__ import annotations

import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.data.buffers import LiveBucket
from lightning_overlap.modes.data.guard import ReferenceGuard
from lightning_overlap.ranks.group import Pending
from lightning_overlap.torch_seams import version_of


class Gathers:
    """The gathers of all buckets.

    Args:
        buckets: the mode's; the list is the same object as long as the mode lives.
        prefetch: number of buckets that are gathered ahead of the one that forward waits for; None: all.
        aligned: no gather is posted before :meth:`end_step`.
        guard: completes parameters that are used through a reference.

    Attributes:
        incomplete: keys of the buckets whose parameters are not complete.
    """

    def __init__(self, buckets: list[LiveBucket], prefetch: int | None, *, aligned: bool, guard: ReferenceGuard) -> None:
        self.incomplete: set[int] = set()
        self._guard = guard
        self._buckets = buckets
        self._prefetch = prefetch
        self._aligned = aligned
        self._to_post: list[LiveBucket] = []
        self._posted: dict[int, Pending] = {}  # by key
        self._versions: dict[int, list[int]] = {}  # by key: of the parameters, when this rank's shard was updated
        self._read: dict[int, None] = {}  # keys in the order in which this forward has read the buckets

    def publish(self, bucket: LiveBucket) -> None:
        """Schedules the gather of a bucket of which this rank has updated its shard."""
        self.finish(bucket)
        if bucket.main is not None:
            bucket.data[bucket.shard].copy_(bucket.main)
        # A backward that saved the weight before this update gets an error from autograd.
        torch.autograd.graph.increment_version(bucket.parameters)
        self._versions[bucket.key] = [version_of(parameter) for parameter in bucket.parameters]
        self._guard.guard(bucket.parameters)
        self.incomplete.add(bucket.key)
        self._to_post.append(bucket)
        if self._prefetch is None and not self._aligned:
            self.post_all()

    def post_all(self) -> None:
        """Posts all scheduled gathers, whatever ``prefetch`` is."""
        while self._to_post:
            self._post_next()

    def complete(self, bucket: LiveBucket) -> None:
        """Waits until a bucket's parameters are complete, because one of them is read."""
        if bucket.key not in self.incomplete:
            return
        if bucket.key not in self._posted and bucket is min(self._to_post, key=_order):
            self._post_next()
        if bucket.key not in self._posted:
            # Not the bucket that all ranks post next: this rank posts all, since peers may wait for any of them.
            self.post_all()
        self._read.setdefault(bucket.key)
        self.finish(bucket)
        while self._to_post and self._prefetch is not None and len(self.incomplete) - len(self._to_post) <= self._prefetch:
            self._post_next()

    def end_step(self) -> None:
        """Called when every bucket has been updated."""
        if self._aligned:
            self.post_all()

    def finish(self, bucket: LiveBucket) -> None:
        """Waits for a bucket's gather, if it is posted.

        Raises:
            ConfigError: a parameter was written meanwhile through a view of it, and the write is lost.
        """
        pending = self._posted.get(bucket.key)
        if pending is None:
            return
        pending.wait()
        del self._posted[bucket.key]
        self.incomplete.discard(bucket.key)
        self._guard.free(bucket.parameters)
        self._refuse_lost_writes(bucket)
        torch.autograd.graph.increment_version(bucket.parameters)

    def _refuse_lost_writes(self, bucket: LiveBucket) -> None:
        for name, parameter, version in zip(bucket.names, bucket.parameters, self._versions[bucket.key], strict=True):
            if version_of(parameter) != version:
                raise ConfigError(
                    f"{name} was written through an earlier view of it (a parameter.detach() that was kept) while its update was "
                    "gathered, so the write is lost. Write to the parameter itself, which waits for the update: "
                    "with torch.no_grad(): parameter.copy_(...)"
                )

    def finish_all(self) -> None:
        """Waits until all parameters are complete."""
        self.post_all()
        for bucket in self._buckets:
            self.finish(bucket)

    def abandon(self) -> None:
        """After a failure: makes parameters ordinary ones without waiting. Some values may be old."""
        self.incomplete.clear()
        for bucket in self._buckets:
            self._guard.free(bucket.parameters)

    def follow_read_order(self) -> None:
        """Gathers buckets from now on in the order in which this forward has read them."""
        # With a bound on prefetching all ranks must post in one order: otherwise two ranks that wait for different buckets may each
        # not have posted the other's.
        if self._prefetch is None and all(bucket.group.keyed for bucket in self._buckets):
            order = {key: number for number, key in enumerate(self._read)}
            for bucket in self._buckets:
                bucket.order = order.get(bucket.key, bucket.order)
        self.forget_read_order()

    def forget_read_order(self) -> None:
        """Forgets the order in which this forward has read buckets."""
        self._read.clear()

    def _post_next(self) -> None:
        bucket = min(self._to_post, key=_order)
        self._to_post.remove(bucket)
        self._posted[bucket.key] = bucket.group.all_gather(
            bucket.data, bucket.bounds, key=bucket.key, label=f"data.params[{bucket.key}]", priority=bucket.order
        )


def _order(bucket: LiveBucket) -> int:
    return bucket.order
