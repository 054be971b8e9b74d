"""The attention of some heads on one rank, whose keys and values come in pieces: forward and backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_overlap.modes.context.exchange import PieceExchange, posted
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
        exchange.post_first(overlapped=self.overlapped)
        outputs = Outputs(self, q, exchange.v.shape[-1], sinks)
        outputs.add(exchange.plan.local, exchange.k, exchange.v)
        outputs.add_rounds(exchange)
        return outputs.result()

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        output: Tensor,
        lse: Tensor,
        exchange: PieceExchange,
        post_next: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of this rank's queries, keys and values, in the accumulator's dtype. Arguments as in :meth:`forward`.

        Half of the local keys are used before the others' pieces, while the first of these come, and half after them, while the
        last gradients leave. ``post_next`` is called after the last gradients were posted.
        """
        exchange.post_first(overlapped=self.overlapped)
        gradients = Gradients(self, grad, q, output, lse, exchange.k, exchange.v)
        local = exchange.plan.local
        half = (len(local) + 1) // 2
        gradients.add(local[:half])

        def add_rest() -> None:
            if post_next is not None:
                post_next()
            gradients.add(local[half:])

        gradients.add_rounds(exchange, add_rest)
        return gradients.of_q, gradients.of_k, gradients.of_v

    def tile_of(self, pair: Pair, q: Tensor) -> Tile:
        """Which pairs of some queries and keys are visible; ``q`` tells batch and device."""
        visible = self.masks.of(self.mask, pair, len(q), self.heads, q) if pair.relation is Relation.PARTIAL else None
        is_causal = pair.relation is Relation.DIAGONAL
        return Tile(causal=is_causal, visible=visible, queries=pair.query_positions, keys=pair.key_positions, heads=self.heads)


class Outputs:
    """The outputs of some queries, from the keys that were added so far.

    Args:
        part: which attention.
        q: queries ``(B, heads, s, D)``, which may be written until they are used.
        features: of a value.
        sinks: as in :meth:`PartOfHeads.forward`.
    """

    def __init__(self, part: PartOfHeads, q: Tensor, features: int, sinks: Tensor | None) -> None:
        self._part, self._q = part, q
        self._merger = Merger(q.new_zeros(*q.shape[:-1], features, dtype=accumulator(q.dtype)), sinks)

    def add(self, uses: Iterable[Use], k: Tensor, v: Tensor) -> None:
        """Adds pieces of the local keys ``k`` and values ``v``."""
        for use in uses:
            self._add(use, _rows(k, use.piece.rows), _rows(v, use.piece.rows))

    def add_rounds(self, exchange: PieceExchange) -> None:
        """Adds the other ranks' pieces as they come."""
        for number, received in enumerate(exchange.rounds(overlapped=self._part.overlapped)):
            pieces = exchange.pieces_of(number, received)
            for use in exchange.plan.rounds[number].uses:
                self._add(use, *pieces[use.piece])

    def result(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, see :meth:`PartOfHeads.forward`."""
        return self._merger.output, finite(self._merger.lse)

    def _add(self, use: Use, k: Tensor, v: Tensor) -> None:
        for pair in use.pairs:
            queries, keys, values = _rows(self._q, pair.queries), _rows(k, pair.keys), _rows(v, pair.keys)
            made = self._part.kernel.forward(queries, keys, values, self._part.tile_of(pair, self._q))
            self._merger.add(pair.queries, *made)


class Gradients:
    """The gradients of some queries and of the local keys and values, from what was added so far.

    Args:
        part: which attention.
        grad: of the output; it may be written until it is used.
        q: queries.
        output: of forward.
        lse: of forward.
        k: local keys.
        v: local values.

    Attributes:
        of_q: gradients of the queries.
        of_k: gradients of the local keys.
        of_v: gradients of the local values.
    """

    def __init__(self, part: PartOfHeads, grad: Tensor, q: Tensor, output: Tensor, lse: Tensor, k: Tensor, v: Tensor) -> None:
        self._part, self._grad, self._q, self._output, self._lse, self._k, self._v = part, grad, q, output, lse, k, v
        self.of_q, self.of_k, self.of_v = (x.new_zeros(x.shape, dtype=accumulator(q.dtype)) for x in (q, k, v))

    def add(self, uses: Iterable[Use]) -> None:
        """Adds those of pieces of the local keys and values."""
        for use in uses:
            self._add(use, *(_rows(x, use.piece.rows) for x in (self._k, self._v, self.of_k, self.of_v)))

    def add_rounds(self, exchange: PieceExchange, then: Callable[[], None] | None = None) -> None:
        """Adds those of the other ranks' pieces as they come, and what comes back for the local ones.

        Args:
            exchange: has the pieces.
            then: called while the last gradients travel.
        """
        returning: deque[tuple[int, Pending]] = deque()

        def add_returned() -> None:
            number, pending = returning.popleft()
            for piece, k, v in exchange.gradients_of(number, pending.wait()):
                _rows(self.of_k, piece.rows).add_(k)
                _rows(self.of_v, piece.rows).add_(v)

        for number, received in enumerate(exchange.rounds(overlapped=self._part.overlapped)):
            pieces = exchange.pieces_of(number, received)
            made = self._of_round(exchange.plan.rounds[number].uses, pieces)
            returning.append((number, posted(exchange.post_gradients(number, made), self._part.overlapped)))
            if len(returning) > exchange.plan.ahead:
                add_returned()
        if then is not None:
            then()
        while returning:
            add_returned()

    def _of_round(self, uses: Sequence[Use], pieces: dict[Piece, tuple[Tensor, Tensor]]) -> dict[Piece, tuple[Tensor, Tensor]]:
        """Those of the keys and values of a round, by piece."""
        made = {}
        for use in uses:
            k, v = pieces[use.piece]
            of_k, of_v = (x.new_zeros(x.shape, dtype=self.of_q.dtype) for x in (k, v))
            self._add(use, k, v, of_k, of_v)
            made[use.piece] = of_k, of_v
        return made

    def _add(self, use: Use, k: Tensor, v: Tensor, of_k: Tensor, of_v: Tensor) -> None:
        for pair in use.pairs:
            grad, q, output = (_rows(x, pair.queries) for x in (self._grad, self._q, self._output))
            lse = self._lse[:, :, pair.queries.start : pair.queries.stop]
            tile = self._part.tile_of(pair, q)
            made = self._part.kernel.backward(grad, q, _rows(k, pair.keys), _rows(v, pair.keys), output, lse, tile)
            for into, rows, gradient in zip((self.of_q, of_k, of_v), (pair.queries, pair.keys, pair.keys), made, strict=True):
                _rows(into, rows).add_(gradient)


def _rows(x: Tensor, rows: range) -> Tensor:
    """Some tokens of ``(B, heads, s, D)``."""
    return x[:, :, rows.start : rows.stop]
