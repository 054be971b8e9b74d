"""Roles: the names that ``parallel_plan`` gives to modules of a model. Standard library only."""

from __future__ import annotations

import re

from lightning_overlap.decision import ConfigError

EXPERT_ROLES = ("experts", "router", "shared_experts")
"""Roles in a layer of experts: the module of all experts, the one that chooses experts for each token, and the one of the experts that
every token takes."""
ROLES = (
    *("blocks", "column", "row", "column_gathered", "row_split", "per_head", "vocab_embedding", "vocab_head", "token_wise"),
    *("token_table", *EXPERT_ROLES),
)
"""``blocks`` is the list of alike layers. ``token_wise`` is a module that works on each token by itself, in the blocks or (for
``context_parallel.boundary: batch``) before them. ``token_table`` is a module that makes a table with an entry a token, from the
number of tokens that it gets. The other roles say how a layer is sharded over the tensor axis. Modules between a ``column_gathered``
and a ``row_split`` layer get all features (for a norm over all heads, a split at fixed indices), and each rank computes them.
``per_head`` is a parameter with an entry a head along its first dim (attention sinks), of which a rank has those of its heads."""


def parse_role(role: str) -> tuple[str, tuple[int, ...] | None]:
    """Splits ``"column[4,1,1]"`` into a role and the proportions of the layers that are fused in it.

    Args:
        role: a name of :data:`ROLES`. ``column[3]`` is a column layer of three fused layers of equal size; ``column[4,1,1]`` gives
            the proportions of their sizes.

    Returns:
        The role, and the proportions, or None.

    Raises:
        ConfigError: the role is unknown, or a proportion is 0.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+(?:,\s*\d+)*)\])?", role)
    if match is None or match[1] not in ROLES or (match[2] and match[1] != "column"):
        raise ConfigError(f"parallel_plan has the role {role!r}; known are {', '.join(ROLES)}, and column[3] or column[4,1,1]")
    if match[2] is None:
        return match[1], None
    numbers = tuple(int(n) for n in match[2].split(","))
    if 0 in numbers:
        raise ConfigError(f"parallel_plan has the role {role!r} ; a proportion must be at least 1")
    return match[1], (1,) * numbers[0] if len(numbers) == 1 else numbers
