"""Which rank has which experts, and the parts in which rows travel to them. Standard library only.

A *row* is a pair of a token and one of its experts. While a part is computed, the dispatch of later parts and the combine of earlier
parts are in transfer, so the first dispatch and the last combine are exposed unless something runs under them. Under ``experts+local``
and ``tokens`` these are the rows that need no transfer: of the first and the last part, a rank computes its own tokens apart, those of
the first part while the others travel here, those of the last part while the others travel back::

    link     | D0 | D1 | D2 | D3 | C0 | C1 | C2 | C3 |          D, C: dispatch and combine of a part
    compute  | L0 | R0 |    1    |    2    | R3 | L3 |          L, R: rows of this rank's tokens, of the other ranks' tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["experts", "experts+local", "tokens"]
SPLITS: tuple[Split, ...] = ("experts", "experts+local", "tokens")
Source = Literal["all", "local", "remote"]
"""Whose tokens a product computes: those of all ranks, of this rank, of the other ranks."""

EXPOSED_SHARE = 0.1
"""Share of the transfers that :func:`choose` leaves exposed; twice that, before it takes parts of tokens, with smaller products."""
LEAST_PARTS, MOST_PARTS = 4, 8
"""Parts that :func:`choose` takes: each is a transfer and some products of its own."""


def choose(experts: int, ranks: int, split: Split | None = None, parts: int | None = None) -> tuple[Split, int]:
    """Chooses what a part is, and how many there are, unless that is given.

    If transfers take as long as the products, the first dispatch and the last combine are a share of ``1 / parts`` of the transfers.
    Where a rank computes its own tokens under them, ``1 / ranks`` of all, ``(1 - 2 / ranks) / parts`` is exposed.

    Args:
        experts: of a layer.
        ranks: number of ranks.
        split: None: whole experts, with a rank's own tokens apart, if ranks have enough experts; else tokens.
        parts: None: as few as leave ``EXPOSED_SHARE`` of the transfers exposed; if parts are experts, at most those of a rank.
    """
    exposed = 1.0 if split == "experts" else 1 - 2 / ranks
    wanted = parts or min(max(LEAST_PARTS, math.ceil(exposed / EXPOSED_SHARE)), MOST_PARTS)
    of_experts = min(wanted, experts // ranks)
    if split is None:
        split = "experts+local" if of_experts > 1 and exposed / of_experts <= 2 * EXPOSED_SHARE else "tokens"
    return split, parts or (wanted if split == "tokens" else of_experts)


def share(total: int, shares: int, number: int) -> range:
    """Returns one of ``shares`` consecutive ranges of ``range(total)``, as even as they can be."""
    return range(total * number // shares, total * (number + 1) // shares)


@dataclass(frozen=True)
class Layout:
    """How the experts of a layer are spread over ranks and parts.

    Attributes:
        experts: of the layer, at least one for each rank. Rank r has ``experts * r // ranks`` to ``experts * (r + 1) // ranks``.
        ranks: number of ranks.
        split: what a part is. ``experts``: some experts of each rank, with all their rows, so that a product has the same shape for
            any number of parts. ``experts+local``: the same, but of the first and the last part the rows of this rank's tokens are
            products of their own. ``tokens``: some rows of each expert, also divided in this way.
        parts: number of parts, the same on all ranks. A part of ``experts`` may have no expert on a rank.
    """

    experts: int
    ranks: int
    split: Split
    parts: int

    def experts_of(self, rank: int) -> range:
        """Returns the experts that a rank has."""
        return share(self.experts, self.ranks, rank)

    def experts_in(self, part: int, rank: int) -> range:
        """Returns the experts that a rank has and computes in a part."""
        mine = self.experts_of(rank)
        if self.split == "tokens":
            return mine
        return mine[share(len(mine), self.parts, part).start : share(len(mine), self.parts, part).stop]

    def rows_in(self, part: int, rows: int) -> range:
        """Returns which of a rank's rows for an expert of a part belong to the part."""
        if self.split != "tokens":
            return range(rows)
        return range(self._edge(part, rows), self._edge(part + 1, rows))

    def is_divided(self, part: int) -> bool:
        """Whether the rows of this rank's tokens are a product of their own, and do not travel."""
        return self.split != "experts" and part in (0, self.parts - 1)

    def products(self) -> Iterator[tuple[int, Source]]:
        """Yields the products of a forward in their order: the part, and whose tokens."""
        for part in range(self.parts):
            if not self.is_divided(part):
                yield part, "all"
            elif part == 0:
                yield from ((part, "local"), (part, "remote"))
            else:
                yield from ((part, "remote"), (part, "local"))

    def _edge(self, part: int, rows: int) -> int:
        """The first and the last part are half as large as the others: nothing but this rank's tokens runs under their transfers."""
        if part in (0, self.parts):
            return rows * (part > 0)
        return rows * (2 * part - 1) // (2 * self.parts - 2)
