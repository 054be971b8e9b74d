"""Finds and replaces the hidden states among the arguments and outputs of a block, an attention or an mlp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_overlap.decision import ConfigError

HIDDEN_ARGUMENTS = ("hidden_states", "hidden_state", "x", "hidden", "inputs", "input", "inputs_embeds")
"""Argument names of hidden states that are not the first positional argument."""


def find_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: str) -> tuple[int | str, Tensor]:
    """Finds the hidden states in a module's arguments.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        caller: the module, for the error.

    Returns:
        The position or name of the hidden states, and the hidden states, ``(..., tokens, features)``.

    Raises:
        ConfigError: no argument is known to be the hidden states.
    """
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    for name in HIDDEN_ARGUMENTS:
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise ConfigError(
        f"no hidden states were found in the arguments of {caller}. Pass them as the first argument, or by one of the names "
        f"{', '.join(HIDDEN_ARGUMENTS)}"
    )


def replace_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int | str, x: Tensor) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments with ``x`` as the hidden states, at the position that :func:`find_hidden` returned."""
    return (args, {**kwargs, position: x}) if isinstance(position, str) else ((x, *args[1:]), dict(kwargs))


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states of a block's output: the output itself, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Any, x: Tensor) -> Any:
    """Returns a block's output with ``x`` as the hidden states."""
    return (x, *output[1:]) if isinstance(output, tuple) else x
