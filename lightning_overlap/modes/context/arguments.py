"""Tensors beside the hidden states that blocks are called with: each rank takes the rows of its tokens, by the tensor's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import replaced
from lightning_overlap.modes.context.local_tokens import LocalTokens


def shard_argument(x: Tensor, tokens: int, positions: Tensor, batch: int | None = None) -> Tensor:
    """This rank's part of a block's argument.

    What has an entry a token is sharded: rotary tables ``(B, S, D)``, ``(1, S, D)``, ``(S, D)``, also complex ones, position ids
    ``(B, S)``, ``(3, B, S)``, any integers ``(..., S)``. Masks stay unsharded, since queries of this rank see keys of others: masks of
    pairs, ``(..., S, S)``, and of keys, ``(B, S)`` or ``(..., 1, S)``, bool or floating. So does what has no dim of length S.

    Args:
        x: the argument.
        tokens: length S of the sequence.
        positions: of this rank's tokens, ``(s,)``, int64.
        batch: number of samples; None if it is not known.

    Returns:
        The rank's rows, or ``x`` itself.

    Raises:
        ConfigError: more than one dim has length S, and ``x`` is no mask.
    """
    dims = [dim for dim, length in enumerate(x.shape) if length == tokens]
    if batch == tokens and x.dim() > 2 and dims[:1] == [0]:
        dims = dims[1:]  # those of the samples
    if not dims or _is_mask(x, tokens):
        return x
    is_ids = not x.is_floating_point() and not x.is_complex()
    if is_ids and x.shape[-1] == tokens:
        return x.index_select(-1, positions.to(x.device))
    if len(dims) > 1:
        raise ConfigError(
            f"a block is called with a tensor of shape {tuple(x.shape)} and dtype {x.dtype}, whose dims {dims} are all as long as the "
            f"sequence ({tokens} tokens): which one counts tokens cannot be told. Train with sequences of another length, pass a mask "
            "as bool or with 4 dims (batch, heads, tokens, tokens), or set context_parallel: 1"
        )
    return x.index_select(dims[0], positions.to(x.device))


def _is_mask(x: Tensor, tokens: int) -> bool:
    if x.is_complex() or x.shape[-1] != tokens or x.dim() < 2:
        return False
    is_bool, is_float = x.dtype == torch.bool, x.is_floating_point()
    if x.shape[-2] == tokens:  # a rotary table may have as many features as there are tokens, in 3 dims
        return is_bool or (x.dim() != 3 and (is_float or x.dim() > 3))
    return (is_bool or is_float) and (x.dim() == 2 or x.shape[-2] == 1)


def token_table_forward(forward: Callable[..., Any], local: Callable[[], LocalTokens | None]) -> Callable[..., Any]:
    """The forward of a module with the role ``token_table``: a table that it makes from the number of its tokens has this rank's rows.

    The module runs as for the whole sequence. What it is given with an entry a token is zero where other ranks have the token, so that
    it may compute with it, token by token.

    Args:
        forward: the module's.
        local: this rank's tokens in the present forward; None: all of them.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        part = local()
        if part is None:
            return forward(*args, **kwargs)
        args, kwargs = replaced((args, kwargs), lambda leaf: _widen(leaf, part))
        return replaced(
            forward(*args, **kwargs),
            lambda leaf: shard_argument(leaf, part.tokens, part.positions) if isinstance(leaf, Tensor) else leaf,
        )

    return run


def _widen(x: Any, local: LocalTokens) -> Any:
    """An argument as it would be for the whole sequence."""
    count = len(local.positions)
    if type(x) is int:
        return local.tokens if x == count else x
    if not isinstance(x, Tensor) or count not in x.shape:
        return x
    dims = [dim for dim, length in enumerate(x.shape) if length == count]
    if len(dims) > 1:
        raise ConfigError(
            f"a module with the role token_table is called with a tensor of shape {tuple(x.shape)}, whose dims {dims} are all as long "
            f"as this rank's part of the sequence ({count} tokens): which one counts tokens cannot be told. Use a sequence length "
            "whose part is as long as no other dim, or set context_parallel: 1"
        )
    shape = list(x.shape)
    shape[dims[0]] = local.tokens
    return x.new_zeros(shape).index_copy(dims[0], local.positions.to(x.device), x)
