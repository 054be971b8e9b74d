"""The attention of some heads on one rank, whose keys and values come in pieces: forward and backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_overlap.modes.context.exchange import PieceExchange, PostedAhead, posted
from lightning_overlap.modes.context.kernel import Kernel, Merger, Tile, accumulator, finite, positions_of
from lightning_overlap.modes.context.mask import Mask, Relation
from lightning_overlap.modes.context.pieces import Pair, Piece, Use
from lightning_overlap.ranks.group import Pending

REMEMBERED_TILES = 64


class TileMasks:
    """The logits' masks of tiles, where they depend on distances only (windows): a few, which all layers and backward share."""

    def __init__(self) -> None:
        self._visible = lru_cache(REMEMBERED_TILES)(self._make)

    def of(self, mask: Mask, pair: Pair, batch: int, heads: range, like: Tensor) -> Tensor:
        """What :meth:`Mask.visible` gives for a pair, or the same as logits to add, in the dtype of ``like``."""
        if not mask.has_tensors and len(pair.query_positions) == 1:
            distance = pair.query_positions[0].start - pair.key_positions.start
            return self._visible(mask.causal, mask.window, distance, len(pair.queries), len(pair.keys), like.dtype, like.device)
        queries, keys = (positions_of(parts, like.device) for parts in (pair.query_positions, [pair.key_positions]))
        return mask.visible(queries, keys, batch, heads)

    def _make(
        self, causal: bool, window: int | None, distance: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        tokens = max(abs(distance) + queries, keys)
        of_queries = torch.arange(queries, device=device) + max(distance, 0)
        of_keys = torch.arange(keys, device=device) + max(-distance, 0)
        visible = Mask(tokens, causal, window).visible(of_queries, of_keys)
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


@dataclass(frozen=True)
class PartOfHeads:
    """What the attention of some heads is.

    Args:
        mask: of all heads.
        heads: numbers of the query heads.
        kernel: computes a tile.
        overlapped: transfers are posted ahead of their use; otherwise they are waited for where they are posted.
        masks: of tiles.
    """

    mask: Mask
    heads: range
    kernel: Kernel
    overlapped: bool
    masks: TileMasks

    def forward(self, q: Tensor, exchange: PieceExchange, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output ``(B, heads, s, D)`` and the log-sum-exp ``(B, heads, s)`` of this rank's queries.

        Both are in the accumulator's dtype; the log-sum-exp is finite.

        Args:
            q: queries, ``(B, heads, s, D)``.
            exchange: has the keys and values.
            sinks: a logit a head, or None.
        """
        rounds = self._rounds(exchange)
        merger = Merger(q.new_zeros(*q.shape[:-1], exchange.v.shape[-1], dtype=accumulator(q.dtype)))

        def add(use: Use, k: Tensor, v: Tensor) -> None:
            for pair in use.pairs:
                queries, keys, values = _rows(q, pair.queries), _rows(k, pair.keys), _rows(v, pair.keys)
                merger.add(pair.queries, *self.kernel.forward(queries, keys, values, self.tile_of(pair, q)))

        for use in exchange.plan.local:
            add(use, _rows(exchange.k, use.piece.rows), _rows(exchange.v, use.piece.rows))
        for number, received in enumerate(rounds):
            pieces = exchange.pieces_of(number, received)
            for use in exchange.plan.rounds[number].uses:
                add(use, *pieces[use.piece])
        if sinks is not None:
            merger.add_sinks(sinks)
        return merger.output, finite(merger.lse)

    def backward(self, grad: Tensor, q: Tensor, output: Tensor, lse: Tensor, exchange: PieceExchange) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of this rank's queries, keys and values, in the accumulator's dtype. Arguments as in :meth:`forward`.

        Half of the local keys are used before the others' pieces, while the first of these come, and half after them, while the
        last gradients leave.
        """
        rounds = self._rounds(exchange)
        gradients = _Gradients(self, grad, q, output, lse)
        of_k, of_v = (x.new_zeros(x.shape, dtype=accumulator(q.dtype)) for x in (exchange.k, exchange.v))

        def add_local(uses: Iterable[Use]) -> None:
            for use in uses:
                rows = use.piece.rows
                gradients.add(use, _rows(exchange.k, rows), _rows(exchange.v, rows), _rows(of_k, rows), _rows(of_v, rows))

        returning: deque[tuple[int, Pending]] = deque()

        def add_returned() -> None:
            number, pending = returning.popleft()
            for piece, k, v in exchange.gradients_of(number, pending.wait()):
                _rows(of_k, piece.rows).add_(k)
                _rows(of_v, piece.rows).add_(v)

        local = exchange.plan.local
        half = (len(local) + 1) // 2
        add_local(local[:half])
        for number, received in enumerate(rounds):
            pieces = exchange.pieces_of(number, received)
            made = gradients.of_round(exchange.plan.rounds[number].uses, pieces)
            returning.append((number, posted(exchange.post_gradients(number, made), self.overlapped)))
            if len(returning) > exchange.plan.ahead:
                add_returned()
        add_local(local[half:])
        while returning:
            add_returned()
        return gradients.of_q, of_k, of_v

    def _rounds(self, exchange: PieceExchange) -> PostedAhead:
        return PostedAhead(exchange.post, len(exchange.plan.rounds), exchange.plan.ahead, self.overlapped)

    def tile_of(self, pair: Pair, q: Tensor) -> Tile:
        """Which pairs of some queries and keys are visible; ``q`` tells batch and device."""
        visible = self.masks.of(self.mask, pair, len(q), self.heads, q) if pair.relation is Relation.PARTIAL else None
        is_causal = pair.relation is Relation.DIAGONAL
        return Tile(causal=is_causal, visible=visible, queries=pair.query_positions, keys=pair.key_positions, heads=self.heads)


class _Gradients:
    """Adds up the gradients of one rank's queries, and of the keys and values that they see.

    Args:
        part: which attention.
        grad: of the output.
        q: queries.
        output: of forward.
        lse: of forward.

    Attributes:
        of_q: gradients of the queries so far.
    """

    def __init__(self, part: PartOfHeads, grad: Tensor, q: Tensor, output: Tensor, lse: Tensor) -> None:
        self._part, self._grad, self._q, self._output, self._lse = part, grad, q, output, lse
        self.of_q = q.new_zeros(q.shape, dtype=accumulator(q.dtype))

    def add(self, use: Use, k: Tensor, v: Tensor, of_k: Tensor, of_v: Tensor) -> None:
        """Adds those of a piece with keys ``k`` and values ``v`` into ``of_k`` and ``of_v``."""
        for pair in use.pairs:
            grad, q, output = (_rows(x, pair.queries) for x in (self._grad, self._q, self._output))
            lse = self._lse[:, :, pair.queries.start : pair.queries.stop]
            tile = self._part.tile_of(pair, q)
            made = self._part.kernel.backward(grad, q, _rows(k, pair.keys), _rows(v, pair.keys), output, lse, tile)
            for into, rows, gradient in zip((self.of_q, of_k, of_v), (pair.queries, pair.keys, pair.keys), made, strict=True):
                _rows(into, rows).add_(gradient)

    def of_round(self, uses: Sequence[Use], pieces: dict[Piece, tuple[Tensor, Tensor]]) -> dict[Piece, tuple[Tensor, Tensor]]:
        """Those of the keys and values of a round, by piece."""
        made = {}
        for use in uses:
            k, v = pieces[use.piece]
            of_k, of_v = (x.new_zeros(x.shape, dtype=self.of_q.dtype) for x in (k, v))
            self.add(use, k, v, of_k, of_v)
            made[use.piece] = of_k, of_v
        return made


def _rows(x: Tensor, rows: range) -> Tensor:
    """Some tokens of ``(B, heads, s, D)``."""
    return x[:, :, rows.start : rows.stop]
