"""Cross entropy of logits whose vocabulary is sharded over the ranks.

For each row, every rank sends its largest logit, its sum of exponentials, the target's logit (0 if another rank has it) and its sum
of logits, in one small gather. (M. Shoeybi et al., Megatron-LM, 2019, section 3, with the sums and the maximum in one transfer.)
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
    """The cross entropy of each row of logits whose vocabulary is sharded over the ranks.

    Forward: ``logits`` ``(rows, local entries)``, any floating dtype; ``target`` ``(rows)``, integers; ``counted`` ``(rows)``, whether
    a row counts; ``bounds``, the offsets of the ranks' entries -> the loss of each row ``(rows)``, fp32 or wider, 0 if it does not
    count.
    Backward: the gradient of the losses ``(rows)`` -> the gradient of ``logits``, in their shape and dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, counted: Tensor, group: Group, bounds: Sequence[int], smoothing: float
    ) -> Tensor:
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        entries = x.shape[-1]
        column = target - bounds[group.rank]
        is_local = counted & (column >= 0) & (column < entries)
        column = column.where(is_local, 0)
        statistics = x.new_zeros(group.size, 4, len(x))
        maximum = x.amax(-1) if entries else x.new_full((len(x),), -torch.inf)
        exponentials = (x - maximum.unsqueeze(-1)).exp().sum(-1) if entries else x.new_zeros(len(x))
        target_logit = x.gather(-1, column.unsqueeze(-1)).squeeze(-1).where(is_local, 0) if entries else x.new_zeros(len(x))
        statistics[group.rank] = torch.stack([maximum, exponentials, target_logit, x.sum(-1)])
        numel = statistics[0].numel()
        group.all_gather(statistics.view(-1), [numel * r for r in range(group.size + 1)], key=0, label="tensor.loss").wait()
        maxima, sums, target_logits, totals = statistics.unbind(1)
        highest = maxima.amax(0)
        normalizer = highest + (sums * (maxima - highest).exp()).sum(0).log()
        loss = normalizer - (1 - smoothing) * target_logits.sum(0)
        if smoothing:
            loss -= smoothing / bounds[-1] * totals.sum(0)
        ctx.save_for_backward(logits, normalizer, column, is_local, counted)
        ctx.smoothing, ctx.vocabulary_size = smoothing, bounds[-1]
        return loss.where(counted, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, normalizer, column, is_local, counted = ctx.saved_tensors
        x = logits.float() if logits.dtype.itemsize < 4 else logits
        grad_logits = (x - normalizer.unsqueeze(-1)).exp()
        if ctx.smoothing:
            grad_logits -= ctx.smoothing / ctx.vocabulary_size
        if x.shape[-1]:
            grad_logits.scatter_add_(-1, column.unsqueeze(-1), is_local.to(x.dtype).mul(ctx.smoothing - 1).unsqueeze(-1))
        return (grad_logits * (grad.where(counted, 0)).unsqueeze(-1)).to(logits.dtype), None, None, None, None, None


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
    """As :func:`torch.nn.functional.cross_entropy` of the unsharded logits, accumulated in fp32 or wider. Collective.

    Args:
        logits: this rank's entries, ``(N, local entries)`` or ``(local entries,)``.
        target: indices into the unsharded vocabulary, ``(N,)`` or ``()``; the same on all ranks.
        group: the ranks.
        bounds: ``size + 1`` offsets; rank r has the entries from ``bounds[r]`` to ``bounds[r + 1]``.
        ignore_index: a target that does not count.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: the part of each target that is spread over all entries.
        dtype: of the result; None: the dtype of ``logits``. (Under autocast losses are fp32.)

    Returns:
        The loss, ``()``; with ``reduction`` ``none`` ``(N,)`` or ``()``, as ``target``.

    Raises:
        IndexError: a target is outside the vocabulary (checked on the CPU only; raised on every rank).
        ValueError: ``reduction`` is unknown.
    """
    rows, targets = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    counted = targets != ignore_index
    if not targets.is_cuda and bool((counted & ((targets < 0) | (targets >= bounds[-1]))).any()):
        raise IndexError(f"targets must be from 0 to {bounds[-1] - 1}, or {ignore_index}: got {targets[counted].tolist()[:8]} ...")
    losses: Tensor = _CrossEntropy.apply(rows, targets, counted, group, tuple(bounds), label_smoothing)
    dtype = dtype or logits.dtype
    if reduction == "mean":
        return (losses.sum() / counted.sum()).to(dtype)
    if reduction == "sum":
        return losses.sum().to(dtype)
    if reduction == "none":
        return losses.view(target.shape).to(dtype)
    raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
