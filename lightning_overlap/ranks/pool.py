"""Buffers of transfers, reused by later transfers."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class BufferPool:
    """Free buffers by device and dtype. New memory would cost a page fault for every 4 KiB.

    Attributes:
        nbytes: of all buffers that it has made, free or in use.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._free: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the smallest free buffer of at least ``numel`` elements, or a new one; a new one also for 0 elements."""
        free = self._free[device, dtype]
        fitting = [(buffer.numel(), i) for i, buffer in enumerate(free) if buffer.numel() >= numel > 0]
        if fitting:
            return free.pop(min(fitting)[1])
        self.nbytes += numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device=device)

    def give_back(self, buffer: Tensor) -> None:
        """Makes a buffer free for later transfers."""
        if buffer.numel():
            self._free[buffer.device, buffer.dtype].append(buffer)

    def clear(self) -> None:
        """Drops all buffers."""
        self._free.clear()
        self.nbytes = 0
