"""Roles that a model's parts may be given by name. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lightning_overlap.decision import ConfigError

ROLES = ("blocks", "column", "row", "column_gathered", "row_split", "vocab_embedding", "vocab_head", "token_wise", "per_token")
"""Roles that a part of the model may have: ``blocks``, the list of alike layers; how a layer is cut over the tensor axis;
``token_wise``, what works on each token by itself; and ``per_token``, what makes a table with an entry a token from the number of
tokens that it sees. What stands between a ``column_gathered`` and a ``row_split`` layer sees all features (a norm over all heads, a
split at fixed places), and is computed on every rank."""


def parse_role(role: str) -> tuple[str, tuple[int, ...] | None]:
    """A role, and the proportions of what is fused in a column layer: ``column[3]`` of three equal parts, ``column[4,1,1]``.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d+(?:,\s*\d+)*)\])?", role)
    if found is None or found[1] not in ROLES or (found[2] and found[1] != "column"):
        raise ConfigError(f"parallel_plan has the role {role!r}; there are: {', '.join(ROLES)}, and column[3], column[4,1,1]")
    if found[2] is None:
        return found[1], None
    numbers = tuple(int(n) for n in found[2].split(","))
    if 0 in numbers:
        raise ConfigError(f"parallel_plan has the role {role!r} with a part of no size")
    return found[1], (1,) * numbers[0] if len(numbers) == 1 else numbers


def matching(names: Collection[str], pattern: str) -> list[str]:
    """The names of modules that end in a pattern (``layers.*.mlp``); the one that is the pattern, if there is one."""
    if pattern in names:
        return [pattern]
    expression = re.compile(r"(?:.*\.)?" + re.escape(pattern).replace(r"\*", "[^.]+"))
    return [name for name in names if expression.fullmatch(name)]


def names_with_role(model: Any, given: Mapping[str, str], role: str) -> list[str]:
    """The names of a model's modules that have a role: of the given plan, of the model's ``parallel_plan``, or of their own.

    Args:
        model: the user's.
        given: the strategy's ``parallel_plan``.
        role: one of :data:`ROLES`.

    Raises:
        ConfigError: a pattern with this role matches no module.
    """
    modules = dict(model.named_modules())
    plan = getattr(model, "parallel_plan", None)
    names = [name for name, module in modules.items() if getattr(module, "parallel_role", None) == role]
    for pattern, asked in {**(plan if isinstance(plan, Mapping) else {}), **given}.items():
        if asked == role:
            matches = matching(modules, pattern)
            if not matches:
                raise ConfigError(f"parallel_plan gives {pattern!r} the role {role}, and the model has no module of this name")
            names += matches
    return list(dict.fromkeys(names))
