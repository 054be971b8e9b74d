"""Cross entropy of logits whose vocabulary is cut over the ranks.

Each rank tells the others, for each token, the largest of its logits, the sum of its exponentials, and the logit of the target if
it has it: one small gather. (M. Shoeybi et al., Megatron-LM, 2019, section 3, with the two sums and the maximum in one transfer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.ranks.group import Group


class _CrossEntropy(Function):
    """The cross entropy of logits whose entries are cut over the ranks. Each rank sends four numbers for each row.

    Forward: ``logits`` ``(rows, own entries)``, any floating dtype; ``target`` ``(rows)``, integers; ``kept`` ``(rows)``: whether a
    row counts; ``bounds``, the ranks' entries -> the loss of each row ``(rows)``, fp32 or wider, 0 where it does not count.
    Backward: the gradient of the losses ``(rows)`` -> that of this rank's logits, in their shape and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, kept: Tensor, group: Group, bounds: Sequence[int], smoothing: float
    ) -> Tensor:
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        first, own = bounds[group.rank], x.shape[-1]
        place = target - first
        mine = kept & (place >= 0) & (place < own)
        place = place.where(mine, 0)
        said = x.new_zeros(group.size, 4, len(x))
        largest = x.amax(-1) if own else x.new_full((len(x),), -torch.inf)
        exponentials = (x - largest.unsqueeze(-1)).exp().sum(-1) if own else x.new_zeros(len(x))
        of_target = x.gather(-1, place.unsqueeze(-1)).squeeze(-1).where(mine, 0) if own else x.new_zeros(len(x))
        said[group.rank] = torch.stack([largest, exponentials, of_target, x.sum(-1)])
        each = said[0].numel()
        group.all_gather(said.view(-1), [each * r for r in range(group.size + 1)], key=0, label="tensor.loss").wait()
        maxima, sums, targets, totals = said.unbind(1)
        highest = maxima.amax(0)
        normalizer = highest + (sums * (maxima - highest).exp()).sum(0).log()
        loss = normalizer - (1 - smoothing) * targets.sum(0)
        if smoothing:
            loss -= smoothing / bounds[-1] * totals.sum(0)
        ctx.save_for_backward(logits, normalizer, place, mine, kept)
        ctx.smoothing, ctx.entries = smoothing, bounds[-1]
        return loss.where(kept, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, normalizer, place, mine, kept = ctx.saved_tensors
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        of_logits = (x - normalizer.unsqueeze(-1)).exp()
        if ctx.smoothing:
            of_logits -= ctx.smoothing / ctx.entries
        if x.shape[-1]:
            of_logits.scatter_add_(-1, place.unsqueeze(-1), mine.to(x.dtype).mul(ctx.smoothing - 1).unsqueeze(-1))
        return (of_logits * (grad.where(kept, 0)).unsqueeze(-1)).to(logits.dtype), None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    bounds: Sequence[int],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As :func:`torch.nn.functional.cross_entropy` of the whole logits, accumulated in fp32 at least.

    Args:
        logits: this rank's, ``(N, own entries)`` or ``(own entries,)``.
        target: entries of the whole vocabulary, ``(N,)`` or ``()``; the same on all ranks.
        group: the ranks.
        bounds: rank r has the entries from ``bounds[r]`` to ``bounds[r + 1]``.
        ignore_index: targets that do not count.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: part of each target that is spread over all entries.
        dtype: of the result; None: the logits'. (Autocast has losses in fp32.)

    Raises:
        IndexError: a target is no entry (on the CPU; on every rank).
        ValueError: of a ``reduction`` that there is not.
    """
    rows, targets = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    kept = targets != ignore_index
    if not targets.is_cuda and bool((kept & ((targets < 0) | (targets >= bounds[-1]))).any()):
        raise IndexError(f"targets must be from 0 to {bounds[-1] - 1}, or {ignore_index}: got {targets[kept].tolist()[:8]} ...")
    losses: Tensor = _CrossEntropy.apply(rows, targets, kept, group, tuple(bounds), label_smoothing)  # type: ignore[no-untyped-call]
    dtype = dtype or logits.dtype
    if reduction == "mean":
        return (losses.sum() / kept.sum()).to(dtype)
    if reduction == "sum":
        return losses.sum().to(dtype)
    if reduction == "none":
        return losses.view(target.shape).to(dtype)
    raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
