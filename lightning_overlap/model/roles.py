"""Roles that a model's parts may be given by name. Standard library only."""

from __future__ import annotations

import re

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
