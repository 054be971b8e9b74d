"""Embeddings of this rank's tokens (``boundary: batch``): what they give has the shape of all tokens, and this rank's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import names_by_role
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.model.trees import leaves, replaced


def find_embeddings(model: nn.Module, blocks: str, roles: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the modules before the blocks that make hidden states of each token by itself.

    They are the embeddings in the innermost module around the blocks that has any (those of a vision tower are further out), and what
    has the role ``vocab_embedding`` or ``token_wise``.

    Args:
        model: the user's.
        blocks: name of the list of blocks.
        roles: the strategy's.
    """
    outside = {
        name: module for name, module in model.named_modules() if name and not f"{name}.".startswith(f"{blocks}." if blocks else "")
    }
    names: list[str] = []
    around = blocks
    while around and not names:
        around = around.rpartition(".")[0]
        names = [
            name
            for name, module in outside.items()
            if isinstance(module, nn.Embedding) and name.startswith(f"{around}." if around else "")
        ]
    given = [name for role in ("vocab_embedding", "token_wise") for name in names_by_role(model, roles, role)]
    return tuple(dict.fromkeys([*names, *(name for name in given if name in outside)]))


def embedding_forward(forward: Callable[..., Any], name: str, shards_of: Callable[[int], TokenShards | None]) -> Callable[..., Any]:
    """The forward of an embedding, of this rank's tokens.

    It takes ids ``(..., tokens)``, or features ``(..., tokens, features)``, of all tokens.

    Args:
        forward: the module's.
        name: the module's.
        shards_of: which tokens each rank has, by their number; None: every rank has all.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not inputs or any(isinstance(x, ShardedTokens) for x in inputs) or inputs[0].dim() < -_token_dim(inputs[0]):
            return forward(*args, **kwargs)
        tokens = inputs[0].shape[_token_dim(inputs[0])]
        shards = shards_of(tokens)
        if shards is None:
            return forward(*args, **kwargs)

        def local(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() < -_token_dim(x) or x.shape[_token_dim(x)] != tokens:
                return x
            return shards.take(x, _token_dim(x))

        args, kwargs = replaced((args, kwargs), local)
        output = forward(*args, **kwargs)
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[-2] != len(shards.local):
            raise ConfigError(
                f"context_parallel.boundary: batch has {name} compute this rank's tokens, and it does not give (..., tokens, "
                "features) for them. Set context_parallel.boundary: loss, or give the role token_wise to another module"
            )
        return ShardedTokens.of(output, -2, shards)

    return run


def _token_dim(x: Tensor) -> int:
    return -2 if x.is_floating_point() else -1
