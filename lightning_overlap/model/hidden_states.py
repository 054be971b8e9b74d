"""Where the hidden states stand in the arguments of a block, an attention or an mlp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_overlap.decision import ConfigError

HIDDEN_ARGUMENTS = ("hidden_states", "hidden_state", "x", "hidden", "inputs", "input", "inputs_embeds")
"""Names under which blocks take the hidden states, where they are not the first positional argument."""


def find_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], who: str) -> tuple[int | str, Tensor]:
    """Finds the hidden states in a module's arguments.

    Args:
        args: the positional arguments.
        kwargs: the others.
        who: is called, for the error.

    Returns:
        Their position or name, and the hidden states, ``(..., tokens, features)``.

    Raises:
        ConfigError: there are none.
    """
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    for name in HIDDEN_ARGUMENTS:
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise ConfigError(
        f"{who} is called without hidden states that can be found: pass them as the first argument, or as one of "
        f"{', '.join(HIDDEN_ARGUMENTS)}"
    )


def replace_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int | str, x: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments with ``x`` in the place of the hidden states, whose position :func:`find_hidden` has found."""
    return (args, {**kwargs, position: x}) if isinstance(position, str) else ((x, *args[1:]), dict(kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the output, or its first item."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def with_hidden(output: Any, x: Tensor) -> Any:
    """What a block returns, with ``x`` as the hidden states."""
    return (x, *output[1:]) if isinstance(output, tuple) else x
