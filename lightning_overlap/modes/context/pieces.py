"""The plan of an attention: which pieces of keys and values a rank gets, from whom, in which rounds, and what it computes with them.

Every rank computes from the same mask and layout what all ranks need: no rank asks another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask, Relation

T = TypeVar("T")
PieceMethod = Literal["p2p", "all_gather"]
TILE = 256
"""Length of the tiles, in tokens, into which a partly masked area is cut. Shorter tiles make products slower, longer ones compute more
that is masked."""
REMEMBERED_PLANS = 64


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one rank.

    Args:
        owner: the rank.
        rows: indices of the tokens among those of the rank.
        positions: the tokens in the sequence.
    """

    owner: int
    rows: range
    positions: range

    def cut(self, longest: int) -> list[Piece]:
        """Even parts of at most so many tokens."""
        number, length = -(-len(self.rows) // longest), len(self.rows)
        return [self.part(range(length * i // number, length * (i + 1) // number)) for i in range(number)]

    def split(self, borders: Iterable[int]) -> list[Piece]:
        """Its parts between some positions of the sequence."""
        first, last = self.positions.start, self.positions.stop
        edges = [first, *sorted({border for border in borders if first < border < last}), last]
        return [self.part(range(a - first, b - first)) for a, b in itertools.pairwise(edges)]

    def part(self, part: range) -> Piece:
        """Some of its tokens, counted from its first one."""
        return Piece(self.owner, self.rows[part.start : part.stop], self.positions[part.start : part.stop])


@dataclass(frozen=True)
class Pair:
    """Queries and keys for one call of the kernel.

    Args:
        queries: rows of this rank's tokens.
        keys: rows of the piece, counted from its first one.
        relation: FULL, DIAGONAL (query i sees the keys up to i, counted from the first of each), or PARTIAL.
        query_positions: positions of the queries.
        key_positions: positions of the keys.
    """

    queries: range
    keys: range
    relation: Relation
    query_positions: tuple[range, ...]
    key_positions: range


@dataclass(frozen=True)
class Use:
    """What a rank computes with a piece."""

    piece: Piece
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Round:
    """Pieces that travel together.

    Args:
        sends: by receiver, pieces of this rank.
        receives: by sender, pieces of other ranks.
        uses: what is computed with received pieces. A piece that is needed by other ranks only has none.
    """

    sends: tuple[tuple[Piece, ...], ...]
    receives: tuple[tuple[Piece, ...], ...]
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank does in an attention.

    Args:
        local: what it computes with its own keys.
        rounds: what travels, in the order of use; the same number on all ranks.
        ahead: rounds that travel at a time: as many as bring the tokens of one rank by p2p, all rounds by all_gather.
        most_received: the tokens that the queries of one rank need of others, of the rank that needs most.
    """

    local: tuple[Use, ...]
    rounds: tuple[Round, ...]
    ahead: int
    most_received: int


@dataclass(frozen=True)
class Stages:
    """What is computed of sequences whose tokens come from several ranks, by whose queries and keys are used.

    Args:
        own: this rank's queries and keys. Nothing needs to come for it in forward, and nothing leaves of it in backward.
        keys: this rank's queries, the others' keys.
        queries: the others' queries, all keys.
    """

    own: tuple[Use, ...]
    keys: tuple[Use, ...]
    queries: tuple[Use, ...]


class _Once(Generic[T]):
    """Makes something of a mask once: layers share a mask object, and masks without tensors are the same if their numbers are.

    Args:
        make: called with a mask and other arguments, which are hashable.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._of_numbers = lru_cache(REMEMBERED_PLANS)(self._make_of_numbers)
        self._of_masks: WeakKeyDictionary[Mask, dict[Any, T]] = WeakKeyDictionary()

    def __call__(self, mask: Mask, *others: Hashable) -> T:
        if not mask.has_tensors:
            return self._of_numbers(mask.tokens, mask.causal, mask.window, *others)
        made = self._of_masks.setdefault(mask, {})
        if others not in made:
            made[others] = self._make(mask, *others)
        return made[others]

    def _make_of_numbers(self, tokens: int, causal: bool, window: int | None, *others: Hashable) -> T:
        return self._make(Mask(tokens, causal, window), *others)


class Plans:
    """Makes plans and stages, once for each mask.

    Args:
        method: ``p2p``: each rank gets the pieces that its queries see; ``all_gather``: each rank gets every piece that is seen by any
            other rank than its owner.
        pieces: number of pieces that a rank gets if it gets all tokens of the others.
    """

    def __init__(self, method: PieceMethod, pieces: int) -> None:
        self._plans = _Once(partial(make_plan, pieces=pieces, method=method))
        self._stages = _Once(make_stages)

    def of(self, mask: Mask, layout: TokenLayout, rank: int) -> Plan:
        """The plan of a rank."""
        return self._plans(mask, layout, rank)

    def stages(self, mask: Mask, layout: TokenLayout, members: tuple[int, ...], rank: int) -> Stages:
        """The stages of the tokens of some ranks, of which ``rank`` is one."""
        return self._stages(mask, layout, members, rank)


def make_plan(mask: Mask, layout: TokenLayout, rank: int, pieces: int, method: PieceMethod, tile: int = TILE) -> Plan:
    """The plan of a rank.

    Args:
        mask: of the whole sequence, the same on all ranks.
        layout: of the same sequence.
        rank: whose plan it is.
        pieces: as in :class:`Plans`.
        method: as in :class:`Plans`.
        tile: as :data:`TILE`.
    """
    per_rank = -(-pieces // max(layout.size - 1, 1))
    tokens = [_ranges_of(layout, r) for r in range(layout.size)]
    cut = [_cut(mine, per_rank) for mine in tokens]
    needs = [_needs(mask, mine, cut, r, tile) for r, mine in enumerate(tokens)]
    rounds = _rounds_for_all(cut, needs, rank) if method == "all_gather" else _rounds_for_each(needs, rank)
    # Two at least: backward computes the last of them while the last gradients of other ranks' keys travel.
    halves = _cut(tokens[rank], 2)
    local = (_use(mask, halves, piece, tile) for piece in halves)
    received = [sum(len(use.piece.rows) for uses in mine for use in uses) for mine in needs]
    return Plan(tuple(use for use in local if use.pairs), rounds, max(map(len, cut)), max(received))


def make_stages(mask: Mask, layout: TokenLayout, members: Sequence[int], rank: int, tile: int = TILE) -> Stages:
    """The stages of the tokens of ``members``, in ascending order, on ``rank``. For the other arguments see :func:`make_plan`."""
    parts = [(part, member) for member in members for part in layout.ranges[member]]
    own: list[Piece] = []
    others: list[Piece] = []
    row = 0
    for part, member in sorted(parts, key=lambda item: item[0].start):
        # One owner: queries and keys that start together are cut at the same positions, and all are here when they are used.
        (own if member == rank else others).append(Piece(0, range(row, row + len(part)), part))
        row += len(part)

    def used(queries: Sequence[Piece], keys: Sequence[Piece]) -> tuple[Use, ...]:
        return tuple(use for piece in keys if (use := _use(mask, queries, piece, tile)).pairs)

    return Stages(used(own, own), used(own, others), used(others, [*own, *others]))


def _ranges_of(layout: TokenLayout, rank: int) -> list[Piece]:
    """The rank's ranges of positions."""
    starts = itertools.accumulate(map(len, layout.ranges[rank]), initial=0)
    return [Piece(rank, range(row, row + len(part)), part) for row, part in zip(starts, layout.ranges[rank], strict=False)]


def _cut(ranges: Sequence[Piece], number: int) -> list[Piece]:
    """About so many pieces, none of which is in two ranges."""
    longest = max(-(-sum(len(part.rows) for part in ranges) // number), 1)
    return [piece for part in ranges for piece in part.cut(longest)]


# -- rounds ----------------------------------------------------------------------------------------------------------------


def _needs(mask: Mask, queries: Sequence[Piece], cut: Sequence[Sequence[Piece]], rank: int, tile: int) -> list[list[Use]]:
    """By distance to the owner (the next rank is first), the pieces of other ranks that a rank's queries see."""
    others = [cut[(rank + distance) % len(cut)] for distance in range(1, len(cut))]
    return [[use for piece in pieces if (use := _use(mask, queries, piece, tile)).pairs] for pieces in others]


def _rounds_for_each(needs: Sequence[Sequence[Sequence[Use]]], rank: int) -> tuple[Round, ...]:
    """Each round brings a rank one piece: first the first one that it needs of the next rank, of the one after it, and so on."""
    queues = [[use for uses in itertools.zip_longest(*mine) for use in uses if use is not None] for mine in needs]
    rounds = []
    for number in range(max(map(len, queues))):
        uses = [queue[number] if number < len(queue) else None for queue in queues]
        sends = tuple((use.piece,) if use and use.piece.owner == rank else () for use in uses)
        mine = uses[rank]
        receives = tuple((mine.piece,) if mine and mine.piece.owner == sender else () for sender in range(len(queues)))
        rounds.append(Round(sends, receives, (mine,) if mine else ()))
    return tuple(rounds)


def _rounds_for_all(cut: Sequence[Sequence[Piece]], needs: Sequence[Sequence[Sequence[Use]]], rank: int) -> tuple[Round, ...]:
    """Each round brings all ranks one piece of each."""
    seen = {use.piece for mine in needs for uses in mine for use in uses}
    queues = [[piece for piece in pieces if piece in seen] for pieces in cut]
    mine = {use.piece: use for uses in needs[rank] for use in uses}
    rounds = []
    for number in range(max(map(len, queues))):
        together = [tuple(queue[number : number + 1]) for queue in queues]
        sends = tuple(together[rank] if receiver != rank else () for receiver in range(len(cut)))
        receives = tuple(pieces if sender != rank else () for sender, pieces in enumerate(together))
        rounds.append(Round(sends, receives, tuple(mine[piece] for piece in itertools.chain(*receives) if piece in mine)))
    return tuple(rounds)


# -- pairs -----------------------------------------------------------------------------------------------------------------


def _use(mask: Mask, queries: Sequence[Piece], piece: Piece, tile: int) -> Use:
    """What some ranges of queries compute with a piece: few calls, which leave out what no query sees."""
    pairs: list[Pair] = []
    for part in queries:
        relation = mask.relation(part.positions, piece.positions)
        if relation is Relation.PARTIAL and mask.borders:
            pairs += _pairs_of_documents(mask, mask.borders, part, piece, tile)
        elif relation is Relation.PARTIAL:
            # On the same rank, queries and keys are cut at the same positions, so that tiles on the diagonal have no mask.
            keys = piece.cut(tile) if part.owner == piece.owner else [piece]
            pairs += [pair for queries_cut in part.cut(tile) for pair in _pairs_of_tile(mask, queries_cut, piece, keys)]
        elif relation is not Relation.NONE:
            pairs.append(_pair(part, piece, range(len(piece.rows)), relation))
    return Use(piece, _joined(pairs))


def _pairs_of_documents(mask: Mask, borders: tuple[int, ...], queries: Piece, piece: Piece, tile: int) -> Iterator[Pair]:
    """Those of consecutive tokens, document by document: pairs of one document are all visible, or on the diagonal.

    Queries are also split at the edges of the piece, so that those in it are on the diagonal.
    """
    documents: dict[int, list[Piece]] = {}
    for keys in piece.split(borders):
        documents.setdefault(mask.document_at(keys.positions.start), []).append(keys)
    for part in queries.split([*borders, piece.positions.start, piece.positions.stop]):
        for keys in documents.get(mask.document_at(part.positions.start), ()):
            relation = mask.relation(part.positions, keys.positions)
            first = keys.rows.start - piece.rows.start
            if relation is Relation.PARTIAL:
                for queries_cut in part.cut(tile):
                    yield from _pairs_of_tile(mask, queries_cut, piece, [keys])
            elif relation is not Relation.NONE:
                yield _pair(part, piece, range(first, first + len(keys.rows)), relation)


def _pairs_of_tile(mask: Mask, queries: Piece, piece: Piece, keys: Sequence[Piece]) -> Iterator[Pair]:
    """Those of a tile of queries and consecutive parts of a piece."""
    relations = [mask.relation(queries.positions, part.positions) for part in keys]
    for relation, run in itertools.groupby(zip(relations, keys, strict=True), key=lambda item: item[0]):
        rows = [part.rows for _, part in run]
        if relation is not Relation.NONE:
            yield _pair(queries, piece, range(rows[0].start - piece.rows.start, rows[-1].stop - piece.rows.start), relation)


def _pair(queries: Piece, keys: Piece, rows: range, relation: Relation) -> Pair:
    return Pair(queries.rows, rows, relation, (queries.positions,), keys.positions[rows.start : rows.stop])


def _joined(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Consecutive queries that see all of the same keys are one pair. Those on the diagonal may be in front of them.

    Where a mask is needed pairs stay apart, since its size is that of the pair.
    """
    joined: list[Pair] = []
    for pair in pairs:
        last = joined[-1] if joined else None
        consecutive = last and last.queries.stop == pair.queries.start and last.keys == pair.keys
        if last and consecutive and pair.relation is Relation.FULL and last.relation is not Relation.PARTIAL:
            rows, positions = range(last.queries.start, pair.queries.stop), last.query_positions + pair.query_positions
            joined[-1] = Pair(rows, pair.keys, last.relation, positions, pair.key_positions)
        else:
            joined.append(pair)
    return tuple(joined)
