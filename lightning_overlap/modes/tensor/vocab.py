"""Embedding and head whose vocabulary is cut over the ranks, and logits that stay cut until they are a loss.

What they read and give is whole: the sequence is not cut outside the blocks.
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

from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.stand_in import ASKED, TRACED, StandIn
from lightning_overlap.modes.tensor.linear import cast
from lightning_overlap.modes.tensor.loss import cross_entropy
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import WithoutSubclasses, tree_leaves


@dataclass(frozen=True)
class Vocabulary:
    """Its cut: rank r has the entries from ``bounds[r]`` to ``bounds[r + 1]``."""

    group: Group
    bounds: tuple[int, ...]
    overlapped: bool

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @property
    def first(self) -> int:
        """Of this rank's entries."""
        return self.bounds[self.group.rank]


class _Sum(Function):
    """Sums over the ranks; what follows is the same on all of them, and so is its gradient.

    Forward: ``x``, any shape and floating dtype -> its sum, in that shape and dtype. Backward: the gradient, unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.contiguous(), label="tensor.embedding").wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Lookup(TorchFunctionMode):
    """Inside, a lookup in the cut weight is one in all ranks' rows."""

    def __init__(self, weight: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._weight, self._vocabulary = weight, vocabulary

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding or (args[1] if len(args) > 1 else kwargs.get("weight")) is not self._weight:
            return func(*args, **kwargs)
        return self._look_up(*args, **kwargs)

    def _look_up(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
        own = input - self._vocabulary.first
        mine = (own >= 0) & (own < len(weight))
        padding = padding_idx - self._vocabulary.first if padding_idx is not None else -1
        found = F.embedding(own.where(mine, 0), weight, padding if 0 <= padding < len(weight) else None)
        return _Sum.apply(found * mine.unsqueeze(-1), self._vocabulary.group)


def embedding_forward(layer: nn.Module, vocabulary: Vocabulary) -> Callable[..., Tensor]:
    """The forward of an embedding of which each rank has some rows: ids ``(...)`` to ``(..., features)``.

    The layer's own forward is called, which may do more than look up (Gemma's scales).
    """
    own = layer.forward

    def forward(ids: Tensor) -> Tensor:
        if ids.numel() and not ids.is_cuda and (ids.min() < 0 or ids.max() >= vocabulary.size):
            raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} in an embedding of {vocabulary.size} entries")
        with _Lookup(layer.weight, vocabulary):  # type: ignore[arg-type]
            return own(ids)

    return forward


class _Head(Function):
    """The logits of this rank's part of the vocabulary. Backward sums the input's gradient over the ranks, under the weight's.

    Forward: ``x`` ``(..., features)``, ``weight`` ``(own entries, features)``, ``bias`` ``(own entries)`` or None
    -> ``(..., own entries)``.
    Backward: gradients of the inputs' shapes.
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
        pending = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            pending = ctx.vocabulary.group.all_reduce(grad @ weight, label="tensor.head.input_grad")
            if not ctx.vocabulary.overlapped:
                pending.wait()
        if ctx.needs_input_grad[1]:
            of_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return pending.wait() if pending is not None else None, of_weight, of_bias, None


def head_forward(layer: nn.Module, vocabulary: Vocabulary) -> Callable[[Tensor], Tensor]:
    """The forward of a head of which each rank has some rows: ``(..., features)`` to logits, :class:`CutLogits`."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(x, ShardedTokens):
            return x.map(forward)
        weight, bias = (None if p is None else cast(p) for p in (layer.weight, layer.bias))  # type: ignore[arg-type]
        return CutLogits.of(_Head.apply(cast(x), weight, bias, vocabulary), vocabulary)

    return forward


class _Whole(Function):
    """Gathers all ranks' logits. All ranks go on with the same, so that each one's gradient is its part.

    Forward: ``local`` ``(..., own entries)`` -> ``(..., entries)``. Backward: the other way.
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


_EACH = {
    *(getattr(Tensor, name) for name in ("tanh", "neg", "__neg__", "mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide")),
    *(getattr(torch, name) for name in ("tanh", "neg", "mul", "div", "true_divide")),
}
"""What is done to each number by itself."""
_CASTS = {
    *(getattr(Tensor, name) for name in ("float", "bfloat16", "half", "double", "to", "type", "contiguous", "detach")),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
"""The same, which may give the tensor itself."""
_SHAPED = {*(getattr(Tensor, name) for name in ("view", "reshape", "flatten", "unflatten")), torch.reshape, torch.flatten}


class CutLogits(StandIn):
    """Logits ``(..., vocabulary)`` of which this rank has ``local`` ``(..., own entries)``.

    What keeps the vocabulary together (casts, scaling, other shapes, a choice of tokens) keeps them cut, and ``F.cross_entropy``
    takes them so. Everything else gets the whole logits, which are gathered: every rank has to come there.
    """

    what = "logits whose vocabulary is cut over the ranks of tensor_parallel"
    local: Tensor
    vocabulary: Vocabulary

    @classmethod
    def of(cls, local: Tensor, vocabulary: Vocabulary, base: CutLogits | None = None) -> CutLogits:
        """Logits that are cut; ``base``: what they may be a view of."""
        # Has the shape of the whole, and no numbers.
        logits = local.detach().new_empty(1).expand(*local.shape[:-1], vocabulary.size).as_subclass(cls)
        logits.local, logits.vocabulary = local, vocabulary
        if base is not None and local.untyped_storage().data_ptr() == base.local.untyped_storage().data_ptr():
            logits.is_view_of(base)
        return logits

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        logits = args[0] if args and isinstance(args[0], CutLogits) else None
        others = [x for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)]
        if logits is not None and func in TRACED:
            return func(logits.local)
        if func in ASKED:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if logits is not None and func in _EACH and not others:
            return cls.of(func(logits.local, *args[1:], **kwargs), logits.vocabulary)
        if logits is not None and func in _CASTS and not others and not kwargs.get("copy"):
            return cls.of(func(logits.local, *args[1:], **kwargs), logits.vocabulary, logits)
        if logits is not None and func in _SHAPED:
            with WithoutSubclasses():
                shape = func(logits, *args[1:], **kwargs).shape
            if shape[-1:] == logits.shape[-1:]:
                return cls.of(logits.local.reshape(*shape[:-1], logits.local.shape[-1]), logits.vocabulary, logits)
        if logits is not None and func is Tensor.__getitem__ and _leaves_last(args[1], logits.dim()):
            return cls.of(logits.local[args[1]], logits.vocabulary, logits)
        if func is F.cross_entropy:
            found = _loss(*args, **kwargs)
            if found is not None:
                return found
        return super().compute(func, args, kwargs)

    def whole(self, reader: Any) -> Tensor:
        """The ordinary tensor. Collective."""
        if self.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"{getattr(reader, '__name__', reader)} reads logits whose vocabulary is cut over the ranks of tensor_parallel: "
                "they are gathered, which is slow and takes memory. F.cross_entropy (and Hugging Face's loss) does not need that",
                stacklevel=8,
            )
        return _Whole.apply(self.local, self.vocabulary)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Not by gathering: one rank may print alone.
        return f"CutLogits(shape={tuple(self.shape)}, own={self.local!r})"


def _leaves_last(index: Any, dims: int) -> bool:
    """Whether an index takes all of the last dim."""
    items = list(index) if isinstance(index, tuple) else [index]
    after = items[next((i + 1 for i, item in enumerate(items) if item is Ellipsis), 0) :]
    used = sum(item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else item is not None for item in after)
    if len(after) == len(items) and used < dims:  # from the front, without an ellipsis
        return True
    return not after or (isinstance(after[-1], slice) and after[-1] == slice(None))


def _loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``F.cross_entropy`` of cut logits; None where it needs the whole ones."""
    classes_last = isinstance(input, CutLogits) and input.dim() <= 2
    if not classes_last or weight is not None or target.is_floating_point() or size_average is not None or reduce is not None:
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
