"""What a step takes and gives: samples, tokens, floating-point operations, memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.torch_seams import tree_leaves


def samples_and_tokens(batch: Any) -> tuple[int, int]:
    """Counts the samples of a batch and, of a language model's, the tokens, padding included.

    Args:
        batch: any nesting of tensors. Its ``input_ids``, or else its first tensor, has the samples in the first dim. If it has
            integers in two dims, its elements are tokens.

    Returns:
        Samples and tokens; 0 if they are not known.
    """
    tensors = [batch["input_ids"]] if isinstance(batch, Mapping) and "input_ids" in batch else tree_leaves(batch)
    first = next((tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()), None)
    if first is None:
        return 0, 0
    return len(first), first.numel() if first.dim() == 2 and first.dtype in (torch.int32, torch.int64) else 0


def memory_in_use(device: torch.device) -> int:
    """Returns bytes: on CUDA torch's peak allocation, otherwise the resident size of this process (on Linux; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


@dataclass(frozen=True)
class Usage:
    """What one rank, or all of them together, use in a step.

    Attributes:
        flops: floating-point operations of one step; None: not counted.
        obstacle: why they are not counted; empty if they are, or if no step has been counted yet.
        peak: FLOP/s that the devices can do at most; None: not known.
        memory: bytes; of several ranks, those of the rank that has most.
    """

    flops: float | None = None
    obstacle: str = ""
    peak: float | None = None
    memory: int = 0

    @classmethod
    def of_all(cls, ranks: Sequence[Usage]) -> Usage:
        """What all ranks use together."""
        obstacle = next((usage.obstacle for usage in ranks if usage.obstacle), "")
        flops, peak = _sum([usage.flops for usage in ranks]), _sum([usage.peak for usage in ranks])
        return cls(flops, obstacle, peak, max(usage.memory for usage in ranks))


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
