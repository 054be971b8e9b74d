"""Embedding and head whose vocabulary is sharded over the ranks, and logits that stay sharded until the loss.

Inputs of both, and the embedding's output, are the same on all ranks: outside the blocks, tokens are not sharded.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_overlap.model.stand_in import METADATA, StandIn
from lightning_overlap.modes.tensor.linear import cast
from lightning_overlap.modes.tensor.loss import cross_entropy
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import WithoutSubclasses, tree_leaves


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary is sharded: rank r has the entries from ``bounds[r]`` to ``bounds[r + 1]``.

    Attributes:
        group: the ranks.
        bounds: ``size + 1`` offsets.
        overlapped: whether the head's backward hides its transfer.
    """

    group: Group
    bounds: tuple[int, ...]
    overlapped: bool

    @property
    def size(self) -> int:
        """The number of entries of all ranks."""
        return self.bounds[-1]

    @property
    def first(self) -> int:
        """This rank's first entry."""
        return self.bounds[self.group.rank]


class _Sum(Function):
    """Sums over the ranks. All ranks compute the same with the sum, so backward returns its gradient as it is.

    Forward: ``x``, any shape and floating dtype -> the sum, in that shape and dtype. Backward: the gradient, unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.contiguous(), label="tensor.embedding").wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Lookup(TorchFunctionMode):
    """Inside, a lookup in this rank's rows of an embedding becomes a lookup in the rows of all ranks."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._weight, self._vocabulary = weight, vocabulary

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding or (args[1] if len(args) > 1 else kwargs.get("weight")) is not self._weight:
            return func(*args, **kwargs)
        return self._look_up(*args, **kwargs)

    def _look_up(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
        local_ids = input - self._vocabulary.first
        is_local = (local_ids >= 0) & (local_ids < len(weight))
        padding = padding_idx - self._vocabulary.first if padding_idx is not None else -1
        rows = F.embedding(local_ids.where(is_local, 0), weight, padding if 0 <= padding < len(weight) else None)
        return _Sum.apply(rows * is_local.unsqueeze(-1), self._vocabulary.group)


def embedding_forward(layer: nn.Module, vocabulary: Vocabulary) -> Callable[..., Tensor]:
    """Makes the forward of an embedding whose rows are sharded: ids ``(...)``, integers -> ``(..., features)``. Collective.

    It calls the layer's own forward, which may do more than look up (Gemma's scales).
    """
    layer_forward = layer.forward

    def forward(ids: Tensor) -> Tensor:
        if ids.numel() and not ids.is_cuda and (ids.min() < 0 or ids.max() >= vocabulary.size):
            raise IndexError(f"ids must be from 0 to {vocabulary.size - 1}: got {int(ids.min())} to {int(ids.max())}")
        with _Lookup(layer.weight, vocabulary):  # type: ignore[arg-type]
            return layer_forward(ids)

    return forward


class _Head(Function):
    """Computes this rank's logits. Backward sums the input's gradient over the ranks while it computes the weight's gradient.

    Forward: ``x`` ``(..., features)``, the same on all ranks; ``weight`` ``(local entries, features)``; ``bias`` ``(local entries)``
    or None -> ``(..., local entries)``.
    Backward: gradients in the inputs' shapes; that of ``x`` is the sum over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: Vocabulary) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.vocabulary = vocabulary
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        pending = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            pending = ctx.vocabulary.group.all_reduce(grad @ weight, label="tensor.head.input_grad")
            if not ctx.vocabulary.overlapped:
                pending.wait()
        if ctx.needs_input_grad[1]:
            grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return pending.wait() if pending is not None else None, grad_weight, grad_bias, None


def head_forward(layer: nn.Module, vocabulary: Vocabulary) -> Callable[[Tensor], Tensor]:
    """Makes the forward of a head whose rows are sharded: ``(..., features)`` -> :class:`ShardedLogits` ``(..., vocabulary)``."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if p is None else cast(p) for p in (layer.weight, layer.bias))  # type: ignore[arg-type]
        return ShardedLogits.of(_Head.apply(cast(x), weight, bias, vocabulary), vocabulary)

    return forward


class _GatherLogits(Function):
    """Gathers all ranks' logits. All ranks compute the same with them, so backward keeps this rank's entries of the gradient.

    Forward: ``local`` ``(..., local entries)`` -> ``(..., entries)``. Backward: the reverse.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        bounds, group = vocabulary.bounds, vocabulary.group
        rows = local.shape[:-1].numel()
        flat = local.new_empty(rows * vocabulary.size)
        offsets = [rows * bound for bound in bounds]
        flat[offsets[group.rank] : offsets[group.rank + 1]] = local.flatten()
        group.all_gather(flat, offsets, key=0, label="tensor.logits").wait()
        parts = [flat[rows * a : rows * b].view(*local.shape[:-1], b - a) for a, b in itertools.pairwise(bounds)]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        bounds, rank = ctx.vocabulary.bounds, ctx.vocabulary.group.rank
        return grad[..., bounds[rank] : bounds[rank + 1]], None


_AUTOGRAD = {getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}
_ELEMENTWISE = {
    *(getattr(Tensor, name) for name in ("tanh", "neg", "__neg__", "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide")),
    *(getattr(torch, name) for name in ("tanh", "neg", "mul", "div", "true_divide")),
}
"""Functions that compute each number separately."""
_CASTS = {
    *(getattr(Tensor, name) for name in ("float", "bfloat16", "half", "double", "to", "type", "contiguous", "detach")),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
"""Elementwise functions that may return a view, or the tensor itself."""
_RESHAPES = {*(getattr(Tensor, name) for name in ("view", "reshape", "flatten", "unflatten")), torch.reshape, torch.flatten}


class ShardedLogits(StandIn):
    """Logits ``(..., vocabulary)`` whose vocabulary is sharded: this rank has ``local`` ``(..., local entries)``.

    Casts, scaling, reshapes and a selection of tokens keep the vocabulary in one dim, so their results are sharded too.
    ``F.cross_entropy`` reads sharded logits. Every other function gets complete logits, by a gather: all ranks must call it.
    """

    description = "logits whose vocabulary is sharded over the ranks of tensor_parallel"
    local: Tensor
    vocabulary: Vocabulary

    @classmethod
    def of(cls, local: Tensor, vocabulary: Vocabulary, base: ShardedLogits | None = None) -> ShardedLogits:
        """Makes sharded logits of this rank's. ``base``: other sharded logits, of which ``local`` may be a view."""
        # The shape is that of all entries; the memory is that of one element.
        logits = local.detach().new_empty(1).expand(*local.shape[:-1], vocabulary.size).as_subclass(cls)
        logits.local, logits.vocabulary = local, vocabulary
        if base is not None and local.untyped_storage().data_ptr() == base.local.untyped_storage().data_ptr():
            logits.is_view_of(base)
        return logits

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        logits = args[0] if args and isinstance(args[0], ShardedLogits) else None
        others = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)]
        if logits is not None and func in _AUTOGRAD:
            return func(logits.local)
        if func in METADATA:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if logits is not None and func in _ELEMENTWISE and not others:
            return cls.of(func(logits.local, *args[1:], **kwargs), logits.vocabulary)
        if logits is not None and func in _CASTS and not others and not kwargs.get("copy"):
            return cls.of(func(logits.local, *args[1:], **kwargs), logits.vocabulary, logits)
        if logits is not None and func in _RESHAPES:
            with WithoutSubclasses():
                shape = func(logits, *args[1:], **kwargs).shape
            if shape[-1:] == logits.shape[-1:]:
                return cls.of(logits.local.reshape(*shape[:-1], logits.local.shape[-1]), logits.vocabulary, logits)
        if logits is not None and func is Tensor.__getitem__ and _keeps_last_dim(args[1], logits.dim()):
            return cls.of(logits.local[args[1]], logits.vocabulary, logits)
        if func is F.cross_entropy:
            loss = _sharded_loss(*args, **kwargs)
            if loss is not None:
                return loss
        return super().compute(func, args, kwargs)

    def complete(self, reader: Any) -> Tensor:
        """Gathers the complete logits, and warns about it in training. Collective."""
        if self.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"{getattr(reader, '__name__', reader)} reads {self.description}: they are gathered, which is slow and takes memory. "
                "F.cross_entropy (and Hugging Face's loss) computes with sharded logits",
                stacklevel=8,
            )
        return _GatherLogits.apply(self.local, self.vocabulary)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Without a gather: one rank may print alone.
        return f"ShardedLogits(shape={tuple(self.shape)}, local={self.local!r})"


def _keeps_last_dim(index: Any, dims: int) -> bool:
    """Whether an index into a tensor of so many dims selects all of the last one."""
    items = list(index) if isinstance(index, tuple) else [index]
    after = items[next((i + 1 for i, item in enumerate(items) if item is Ellipsis), 0) :]
    used = sum(item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else item is not None for item in after)
    if len(after) == len(items) and used < dims:  # no ellipsis: items count from the first dim
        return True
    return not after or (isinstance(after[-1], slice) and after[-1] == slice(None))


def _sharded_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``F.cross_entropy`` of sharded logits; None for arguments with which it needs complete logits."""
    is_sharded = isinstance(input, ShardedLogits) and input.dim() <= 2  # with more dims, classes are dim 1
    if not is_sharded or weight is not None or target.is_floating_point() or size_average is not None or reduce is not None:
        return None
    vocabulary, local = input.vocabulary, input.local
    return cross_entropy(
        local,
        target,
        vocabulary.group,
        vocabulary.bounds,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        dtype=torch.float32 if torch.is_autocast_enabled(local.device.type) else local.dtype,
    )
