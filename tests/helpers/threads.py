"""Ranks as threads of one process: transfers cost nothing, and tests of numbers need no world."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class ThreadGroup:
    """A group whose ranks are threads of this process. It has the transfers that sharded tokens need."""

    name = "context"

    def __init__(self, rank: int, size: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._parts, self._barrier = rank, size, parts, barrier

    def all_gather(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str) -> Any:
        for part, low, high in zip(self._exchange(x), bounds[:-1], bounds[1:], strict=True):
            x[low:high] = part[low:high]
        return SimpleNamespace(wait=lambda: x)

    def all_reduce(self, x: Tensor, *, label: str) -> Any:
        total = torch.stack(self._exchange(x)).sum(0)
        return SimpleNamespace(wait=lambda: total)

    def reduce_scatter(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str) -> Any:
        piece = torch.stack(self._exchange(x)).sum(0)[bounds[self.rank] : bounds[self.rank + 1]]
        return SimpleNamespace(wait=lambda: piece)

    def _exchange(self, x: Any) -> list[Any]:
        self._parts[self.rank] = x.clone()
        self._barrier.wait(10)
        parts = list(self._parts)
        self._barrier.wait(10)
        return parts


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(group, *arguments)`` gives on each rank."""
    parts: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def run(rank: int) -> Any:
        try:
            return function(ThreadGroup(rank, size, parts, barrier), *arguments)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        calls = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for call in calls if (error := call.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [call.result() for call in calls]
