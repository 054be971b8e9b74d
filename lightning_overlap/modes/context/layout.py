"""Which tokens of a sequence each rank has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.mask import Mask

BALANCED_ENOUGH = 1.1
"""The most pairs of a rank, relative to the mean, with which a layout of less traffic is taken."""
CHUNKS_BY_AREA = 8
"""Chunks a rank has where they are dealt out by area: more balance documents better, and make smaller products."""


@dataclass(frozen=True)
class TokenLayout:
    """The positions of one sequence that each rank has. A rank holds its tokens in ascending order.

    Args:
        tokens: length of the sequence.
        ranges: by rank, the ascending, disjoint ranges of positions that it has; a rank may have none.

    Raises:
        ValueError: the ranges do not have each position once.
    """

    tokens: int
    ranges: tuple[tuple[range, ...], ...]

    def __post_init__(self) -> None:
        ascending = all(a.stop <= b.start for mine in self.ranges for a, b in itertools.pairwise(mine))
        everything = sorted(itertools.chain(*self.ranges), key=lambda part: part.start)
        edges = [0, *itertools.chain(*((part.start, part.stop) for part in everything)), self.tokens]
        if not ascending or any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
            raise ValueError(f"ranges {self.ranges} of {self.tokens} tokens: each position belongs to one rank, in ascending order")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranges)

    def count(self, rank: int) -> int:
        """Number of tokens of a rank."""
        return sum(map(len, self.ranges[rank]))

    def positions(self, rank: int) -> Tensor:
        """Positions in the sequence of a rank's tokens, ``(count,)``, int64, ascending."""
        return torch.cat([torch.arange(part.start, part.stop) for part in self.ranges[rank]] or [torch.empty(0, dtype=torch.long)])

    def merged(self, sets: Sequence[Sequence[int]]) -> TokenLayout:
        """The layout whose ranks have the tokens of several ranks each, by the sets of these."""
        together = (sorted(itertools.chain(*(self.ranges[rank] for rank in ranks)), key=lambda part: part.start) for ranks in sets)
        return TokenLayout(self.tokens, tuple(map(joined, together)))

    @classmethod
    def contiguous(cls, tokens: int, ranks: int) -> TokenLayout:
        """One range a rank, in the order of the ranks: for windows, whose queries then find most of their keys on their own rank."""
        return cls.dealt(tokens, [[rank] for rank in range(ranks)])

    @classmethod
    def balanced(cls, tokens: int, ranks: int) -> TokenLayout:
        """An early and a late range a rank: under a causal mask all ranks then have the same number of visible pairs.

        Fewer tokens than ranges make one range a rank, so that a rank without tokens is one of more ranks than tokens.
        """
        if tokens < 2 * ranks:
            return cls.contiguous(tokens, ranks)
        return cls.dealt(tokens, [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)])

    @classmethod
    def by_area(cls, mask: Mask, ranks: int, *, even: bool = False) -> TokenLayout:
        """Several ranges a rank, so that all have as many tokens, and about as many visible pairs: for packed documents.

        Chunks of equal length are dealt out, those with the most pairs first, to the rank that has the fewest pairs so far.

        Args:
            mask: which pairs are visible, as :meth:`Mask.visible_counts` estimates them.
            ranks: number of ranks.
            even: all chunks are equally long, so that ranks have as many tokens under any mask. ``ranks`` divides the tokens.
        """
        each = min(CHUNKS_BY_AREA, max(mask.tokens // ranks, 1))
        if even:
            each = max(number for number in range(1, each + 1) if mask.tokens // ranks % number == 0)
        chunks = ranks * each
        area = [0, *mask.visible_counts().cumsum(0).tolist()]
        areas = [area[b.stop] - area[b.start] for b in _chunks(mask.tokens, chunks)]
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        for chunk in sorted(range(chunks), key=lambda chunk: -areas[chunk]):
            free = [mine for mine in dealt if len(mine) < chunks // ranks]
            min(free, key=lambda mine: sum(areas[i] for i in mine)).append(chunk)
        return cls.dealt(mask.tokens, dealt)

    @classmethod
    def for_documents(cls, mask: Mask, ranks: int, *, even: bool = False) -> TokenLayout:
        """The layout with the least traffic that gives all ranks about as many visible pairs: for packed documents.

        Consecutive tokens need the keys of a document at each end only, an early and a late range twice as many, and ranges that are
        dealt out by area need most: but they balance any lengths. Arguments as of :meth:`by_area`.
        """
        counts = mask.visible_counts()
        for layout in (cls.contiguous(mask.tokens, ranks), cls.balanced(mask.tokens, ranks)):
            pairs = [sum(int(counts[part.start : part.stop].sum()) for part in mine) for mine in layout.ranges]
            if max(pairs) * ranks <= BALANCED_ENOUGH * sum(pairs):
                return layout
        return cls.by_area(mask, ranks, even=even)

    @classmethod
    def dealt(cls, tokens: int, chunks: Sequence[Iterable[int]]) -> TokenLayout:
        """Chunks of a sequence that is cut evenly, by number.

        Args:
            tokens: length of the sequence. The number of chunks need not divide it.
            chunks: by rank, the chunks that it has.

        Raises:
            ConfigError: the sequence is empty.
        """
        if tokens < 1:
            raise ConfigError(f"a sequence of {tokens} tokens cannot be sharded over {len(chunks)} ranks: give one token or more")
        parts = _chunks(tokens, sum(len(list(mine)) for mine in chunks))
        return cls(tokens, tuple(joined(parts[chunk] for chunk in sorted(mine)) for mine in chunks))


def _chunks(tokens: int, number: int) -> list[range]:
    """A sequence cut into chunks whose lengths differ by one at most."""
    return [range(tokens * i // number, tokens * (i + 1) // number) for i in range(number)]


def joined(parts: Iterable[range]) -> tuple[range, ...]:
    """Ascending ranges without the empty ones; those that touch are one."""
    joined: list[range] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            joined[-1] = range(joined[-1].start, part.stop)
        elif part:
            joined.append(part)
    return tuple(joined)
