"""Tensors of which this rank has some tokens: what leaves the last block, and stays so until the loss.

What acts on each token by itself is applied to the local part. Losses and means over tokens sum over the ranks. Everything else gets
the whole tensor, which is gathered. One table says what each function does with tokens.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.stand_in import AUTOGRAD, METADATA, StandIn
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.steps.dropout import drops, original, rank_numbers
from lightning_overlap.torch_seams import WithoutSubclasses, tree_leaves, tree_map


class _NeedsWhole(Exception):
    """A rule does not hold for the arguments: the function gets whole tensors."""


class ShardedTokens(StandIn):
    """A tensor ``(..., shards.size, ...)`` of which this rank has ``local`` ``(..., count, ...)``.

    Attributes:
        local: the part of this rank, which may be a stand-in itself (logits whose vocabulary is cut, too).
        sharded_dim: the dim of the tokens, from the front.
        shards: which tokens each rank has.
    """

    description = "a tensor whose tokens are sharded over the ranks"
    local: Tensor
    sharded_dim: int
    shards: TokenShards

    @classmethod
    def of(cls, local: Tensor, dim: int, shards: TokenShards, base: ShardedTokens | None = None) -> ShardedTokens:
        """The tensor of which this rank has ``local``.

        Args:
            local: the tokens of this rank, in the order of ``shards``.
            dim: of the tokens.
            shards: which tokens each rank has.
            base: what ``local`` was computed from, and may be a view of.
        """
        dim %= local.dim()
        shape = (*local.shape[:dim], shards.size, *local.shape[dim + 1 :])
        requires_grad = local.requires_grad
        with WithoutSubclasses():  # Has the shape of the whole, and no numbers.
            number = local.detach().new_empty(1)
            if requires_grad:
                number.requires_grad_().register_hook(_refuse_gradient)
            x = number.expand(shape).as_subclass(cls)
        x.local, x.sharded_dim, x.shards = local, dim, shards
        if base is not None and _storage(local) is not None and _storage(local) == _storage(base.local):
            x.is_view_of(base)
        return x

    @property
    def writers(self) -> list[str]:
        return self.local.writers if isinstance(self.local, StandIn) else super().writers

    def map(self, function: Callable[[Tensor], Tensor]) -> ShardedTokens:
        """``function`` of the local part: one that acts on each token by itself, and keeps their dim."""
        return ShardedTokens.of(function(self.local), self.sharded_dim, self.shards)

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        x = _first(args, kwargs)
        if func in AUTOGRAD and x is not None:
            return func(x.local)
        if func in METADATA:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if x is not None and not x.local.requires_grad:
            with WithoutSubclasses():
                is_result_of_function = x.requires_grad
            if is_result_of_function:
                _refuse_gradient(x)
        rule = _RULES.get(original(func))
        if rule is not None and x is not None:
            try:
                return rule(func, x, args, kwargs)
            except _NeedsWhole:
                pass
        return super().compute(func, args, kwargs)

    def complete(self, reader: Any) -> Tensor:
        """The ordinary tensor. Collective."""
        if self.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"{getattr(reader, '__name__', reader)} reads a tensor whose tokens are sharded over the ranks: it is gathered, "
                "which is slow and takes memory. What acts on each token by itself, F.cross_entropy, and Hugging Face's loss do not "
                "need that",
                stacklevel=8,
            )
        return self.shards.gather(_ordinary(self.local, reader), self.sharded_dim)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Not by gathering: one rank may print alone.
        return f"ShardedTokens(shape={tuple(self.shape)}, local={self.local!r})"


def _refuse_gradient(_: Tensor) -> None:
    """Called where a gradient comes to the tensor that has no numbers, and not to the local part."""
    raise ConfigError(
        "a torch.autograd.Function (a fused kernel's, or that of a checkpoint with use_reentrant=True) was given a tensor whose "
        "tokens are sharded over the ranks. It reads tensors past torch's functions, where this one has no values. Use torch's "
        "functions after the blocks, or set context_parallel.boundary: blocks"
    )


# -- what rules are made of ----------------------------------------------------------------------------------------------------


def _storage(x: Tensor) -> int | None:
    """The address of what two views have in common; None: it is empty, or a stand-in, which knows itself what is viewed of it."""
    return None if isinstance(x, StandIn) or x.numel() == 0 else x.untyped_storage().data_ptr()


def _first(args: Any, kwargs: Any) -> ShardedTokens | None:
    return next((x for x in tree_leaves((args, kwargs)) if isinstance(x, ShardedTokens)), None)


def _ordinary(x: Tensor, reader: Any) -> Tensor:
    return x.complete(reader) if isinstance(x, StandIn) else x


def _local(x: Tensor, like: ShardedTokens, dim: int) -> Tensor:
    """This rank's part of another argument, whose tokens are in ``dim``."""
    if isinstance(x, ShardedTokens):
        if x.sharded_dim == dim and x.shards.equal(like.shards):
            return x.local
    elif x.shape[dim] == like.shards.size:
        return like.shards.take(x, dim)
    raise _NeedsWhole


def _wrapped(result: Any, base: ShardedTokens, dim: Callable[[Tensor], int]) -> Any:
    return tree_map(lambda y: ShardedTokens.of(y, dim(y), base.shards, base) if isinstance(y, Tensor) else y, result)


# -- rules ---------------------------------------------------------------------------------------------------------------------


def _each(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Each number by itself, of tensors that broadcast. Those that have the tokens' dim, too, give their rows."""
    from_end = x.dim() - x.sharded_dim

    def local(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        dim = t.dim() - from_end
        is_alike = not isinstance(t, ShardedTokens) and (dim < 0 or t.shape[dim] == 1)
        return t if is_alike else _local(t, x, dim)

    args, kwargs = tree_map(local, (args, kwargs))
    return _wrapped(func(*args, **kwargs), x, lambda y: y.dim() - from_end)


def _dropped(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Dropout, by masks of this rank."""
    if not drops(args, kwargs):
        return _each(func, x, args, kwargs)
    with rank_numbers(x.shards.group.rank, x.device):
        return _each(func, x, args, kwargs)


def _chosen(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Each number of two tensors by a condition. Without these, it is a search over all tokens."""
    if len(args) + len(kwargs) != 3:
        raise _NeedsWhole
    return _each(func, x, args, kwargs)


def _over(func: Any, x: ShardedTokens, args: Any, kwargs: Any, dims: Sequence[int]) -> Any:
    """Over some dims, of which none is the tokens'. The result may be without these dims."""
    removed = sum(d < x.sharded_dim for d in dims)
    return _wrapped(func(*args, **kwargs), x, lambda y: x.sharded_dim - (removed if y.dim() < x.dim() else 0))


def _along(func: Any, x: ShardedTokens, args: Any, kwargs: Any, *, position: int, default: Any) -> Any:
    """Over the dims that an argument names. Other tensors with as many dims have the same tokens."""
    named = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("axis", default))
    named = [named] if type(named) is int else list(range(x.dim()) if named is None or named == () or named == [] else named)
    if any(type(d) is not int for d in named):
        raise _NeedsWhole
    dims = [d % x.dim() for d in named]
    if x.sharded_dim in dims:
        return _total(func, x, args, kwargs, dims, position)

    def local(t: Any) -> Any:
        return _local(t, x, x.sharded_dim) if isinstance(t, Tensor) and t.dim() == x.dim() else t

    args, kwargs = tree_map(local, (args, kwargs))
    return _over(func, x, args, kwargs, dims)


def _total(func: Any, x: ShardedTokens, args: Any, kwargs: Any, dims: Sequence[int], position: int) -> Tensor:
    """A sum or a mean over all tokens, which is the same on all ranks."""
    dtype = kwargs.get("dtype") or x.dtype
    if func not in (*_SUMS, *_MEANS) or not dtype.is_floating_point:
        raise _NeedsWhole
    keeps = args[position + 1] if len(args) > position + 1 else kwargs.get("keepdim", False)
    total = torch.sum(x.local, list(dims), bool(keeps), dtype=dtype if dtype.itemsize > 4 else torch.float32)
    total = x.shards.total(_ordinary(total, func))
    return (total if func in _SUMS else total / math.prod(x.shape[d] for d in dims)).to(dtype)


def _product(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """The product of the last dim with a weight that is the same for all tokens."""
    return _with_weights(func, x, args, kwargs, [x.dim() - 1])


def _norm(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Over the last dims, as many as a shape has."""
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    count = 1 if isinstance(shape, int) else len(shape)
    return _with_weights(func, x, args, kwargs, range(x.dim() - count, x.dim()))


def _with_weights(func: Any, x: ShardedTokens, args: Any, kwargs: Any, dims: Sequence[int]) -> Any:
    others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
    if x.sharded_dim in dims or args[0] is not x or any(isinstance(t, ShardedTokens) or t.dim() > 2 for t in others):
        raise _NeedsWhole
    return _over(func, x, (x.local, *args[1:]), kwargs, dims)


def _permuted(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Other orders of dims."""
    sizes = func(torch.empty(*range(x.dim()), device="meta"), *args[1:], **kwargs).shape
    return ShardedTokens.of(func(x.local, *args[1:], **kwargs), sizes.index(x.sharded_dim), x.shards, x)


def _shaped(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """Other shapes, in which the tokens have a dim of their own, or one with the samples before them."""
    with WithoutSubclasses():
        result = func(*args, **kwargs)
    shape, old = result.shape, x.shape
    if result.dtype != x.dtype or not x.numel():
        raise _NeedsWhole
    for dim, size in enumerate(shape):
        shards = None
        if math.prod(shape[dim + 1 :]) == math.prod(old[x.sharded_dim + 1 :]):
            if size % x.shards.size == 0:
                shards = x.shards.merged(size // x.shards.size) if size > x.shards.size else x.shards
            elif x.shards.size % size == 0:
                shards = x.shards.divided(x.shards.size // size)
        if shards is not None:
            return ShardedTokens.of(x.local.reshape(*shape[:dim], len(shards.local), *shape[dim + 1 :]), dim, shards, x)
    raise _NeedsWhole


def _indexed(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """A slice of the tokens, or all of them; or those for which a mask is true."""
    items = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) > 1 or any(isinstance(item, ShardedTokens | bool | Sequence) for item in items):
        raise _NeedsWhole
    if len(items) == len(tensors) and tensors[0].dtype == torch.bool and x.sharded_dim < tensors[0].dim():
        mask = _local(tensors[0], x, x.sharded_dim)
        return ShardedTokens.of(x.local[mask], 0, x.shards.masked(tensors[0], x.sharded_dim))
    used = sum(_consumed(item) for item in items)
    middle = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items[middle : middle + 1] = [slice(None)] * (x.dim() - used)
    dim, result_dim = 0, 0
    for i, item in enumerate(items):
        following = dim + _consumed(item)
        if dim <= x.sharded_dim < following:
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise _NeedsWhole
            start, stop, _ = item.indices(x.shards.size)
            shards, items[i] = x.shards.sliced(start, max(start, stop))
            return ShardedTokens.of(x.local[tuple(items)], result_dim, shards, x)
        is_mask = isinstance(item, Tensor) and item.dtype == torch.bool
        result_dim += 1 if item is None or isinstance(item, slice) or is_mask else item.dim() if isinstance(item, Tensor) else 0
        dim = following
    raise _NeedsWhole


def _consumed(item: Any) -> int:
    """The dims that an item of an index stands for."""
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 0 if item is None or item is Ellipsis else 1


def _loss(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """A loss whose numbers stand for numbers, each by itself."""
    arguments = _arguments_of_loss(func, args, kwargs)
    reduction = arguments.pop("reduction")
    if reduction not in ("none", "sum", "mean"):
        raise _NeedsWhole
    losses = _each(func, x, (), {**arguments, "reduction": "none"})
    return losses if reduction == "none" else getattr(losses, reduction)()


def _loss_of_classes(func: Any, x: ShardedTokens, args: Any, kwargs: Any) -> Any:
    """A loss of logits ``(N, C, ...)`` and targets ``(N, ...)``: the mean is over what counts on all ranks."""
    arguments = _arguments_of_loss(func, args, kwargs)
    reduction, target, ignored = arguments.pop("reduction"), arguments["target"], arguments["ignore_index"]
    has_classes = target.dim() == x.dim()
    if arguments["input"] is not x or x.sharded_dim == 1 or x.dim() < 2 or target.dim() < x.dim() - 1:
        raise _NeedsWhole
    if not (has_classes or target.is_cuda or isinstance(target, StandIn)):
        outside = (target != ignored) & ((target < 0) | (target >= x.shape[1]))
        if outside.any():  # an error, which is to be the same on all ranks
            raise _NeedsWhole
    target = _local(target, x, x.sharded_dim if has_classes or x.sharded_dim == 0 else x.sharded_dim - 1)
    losses = _ordinary(func(**{**arguments, "input": x.local, "target": target, "reduction": "none"}), func)
    if reduction == "none":
        return x.shards.gather(losses, 0 if x.sharded_dim == 0 else x.sharded_dim - 1)
    if reduction not in ("sum", "mean"):
        raise _NeedsWhole
    total = losses.sum(dtype=losses.dtype if losses.dtype.itemsize > 4 else torch.float32)
    if reduction == "sum":
        return x.shards.total(total).to(losses.dtype)
    if has_classes:
        counts = torch.ones_like(losses)
    else:
        counts = target != ignored
        if arguments["weight"] is not None:
            counts = arguments["weight"][target.where(counts, 0)].where(counts, 0)
    total, count = x.shards.total(torch.stack([total, counts.sum().to(total)])).unbind()
    return (total / count.detach()).to(losses.dtype)


def _arguments_of_loss(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if arguments.pop("size_average", None) is not None or arguments.pop("reduce", None) is not None:
        raise _NeedsWhole
    return arguments


# -- the table -----------------------------------------------------------------------------------------------------------------


def _named(names: str, *owners: Any) -> list[Any]:
    """The functions of these names in ``torch``, ``Tensor`` and ``torch.nn.functional``, or in other owners."""
    functions = [getattr(owner, name, None) for owner in owners or (torch, Tensor, F) for name in names.split()]
    return [function for function in functions if callable(function)]


_OPERATORS = "add sub mul truediv floordiv mod pow and or xor"
_EACH = [
    *_named("float bfloat16 half double to type type_as cpu cuda contiguous clone detach"),
    *_named("add sub mul div true_divide floor_divide remainder pow neg abs reciprocal square sqrt rsqrt round sign nan_to_num"),
    *_named("exp exp2 log log1p log2 sigmoid tanh erf sin cos clamp clip clamp_min clamp_max maximum minimum masked_fill lerp"),
    *_named("eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not"),
    *_named("relu relu6 gelu silu mish leaky_relu elu selu celu softplus logsigmoid softsign hardtanh hardswish hardsigmoid"),
    *_named(" ".join(f"__{name}__ __r{name}__" for name in _OPERATORS.split()), Tensor),
    *_named("__neg__ __abs__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__", Tensor),
    Tensor.data.__get__,  # type: ignore[attr-defined]
]
_SUMS, _MEANS = _named("sum"), _named("mean")
_REDUCTIONS = "sum mean prod var std logsumexp amax amin max min argmax argmin all any"
_ALONG = {
    (1, None): f"{_REDUCTIONS} softmax log_softmax cumsum select narrow gather index_select",
    (1, 0): "cat concat unbind",
    (1, -1): "argsort sort glu",
    (2, 0): "chunk split",
    (2, 1): "normalize cosine_similarity",
    (2, -1): "topk",
    (2, None): "norm take_along_dim",
}
"""By the position and the default of the argument that names dims."""
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_EACH, _each),
    **{f: partial(_along, position=i, default=dims) for (i, dims), names in _ALONG.items() for f in _named(names)},
    **dict.fromkeys(_named("where"), _chosen),
    **dict.fromkeys(_named("dropout", torch, F), _dropped),
    torch.linalg.vector_norm: partial(_along, position=2, default=None),
    **dict.fromkeys(_named("linear matmul __matmul__"), _product),
    **dict.fromkeys(_named("layer_norm rms_norm"), _norm),
    **dict.fromkeys(_named("transpose permute swapaxes movedim t"), _permuted),
    **dict.fromkeys(_named("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as"), _shaped),
    Tensor.__getitem__: _indexed,
    **dict.fromkeys(_named("mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits", F), _loss),
    **dict.fromkeys(_named("cross_entropy nll_loss", F), _loss_of_classes),
}
"""What each function does with tokens. What is not here reads the whole tensor."""
