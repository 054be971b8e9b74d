"""Transfers of keys, values and their gradients between the ranks that share sequences, posted ahead of their use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import ref

import torch
from torch import Tensor

from lightning_overlap.modes.context.kernel import accumulator
from lightning_overlap.modes.context.pieces import Piece, PieceMethod, Plan, Round
from lightning_overlap.ranks.group import Group, Pending

FIRST_GRADIENT_KEY = 1 << 10
"""Keys of transfers of gradients start here, those of keys and values at 0."""


class Peers:
    """Some members of a group, as a group of their own. All members of the group must be in one such part of it.

    Args:
        group: the ranks, of which each posts all transfers of all parts.
        members: ascending ranks in the group; this rank is one of them.

    Attributes:
        size: number of members.
        rank: this rank among them.
    """

    def __init__(self, group: Group, members: Sequence[int]) -> None:
        self.group = group
        self.members = tuple(members)
        self.size = len(self.members)
        self.rank = self.members.index(group.rank)

    def exchange(self, messages: Sequence[Tensor], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        """Posts a message to each member, which gets it as one of :meth:`messages_in`.

        Args:
            messages: by receiver, 1-d, of one dtype. They must not be written to before the wait.
            receive_sizes: by sender, elements of the message that comes from it.
            key: tells it from others in flight.
            label: names it in traces.
        """
        sends, receives = [0] * self.group.size, [0] * self.group.size
        for member, message, size in zip(self.members, messages, receive_sizes, strict=True):
            sends[member], receives[member] = len(message), size
        filled = [message for message in messages if len(message)]
        x = filled[0] if len(filled) == 1 else torch.cat(list(messages))
        return self.group.all_to_all(x, sends, receives, key=key, label=label)


class PostedAhead:
    """The results of transfers that are posted ahead of their use, in their order.

    Args:
        post: posts a transfer, by number.
        count: number of transfers.
        ahead: number of transfers that travel at a time.
        overlapped: False: each is waited for where it is posted.
    """

    def __init__(self, post: Callable[[int], Pending], count: int, ahead: int, overlapped: bool) -> None:
        self._post, self._count, self._overlapped = post, count, overlapped
        self._pending: deque[Pending] = deque()
        self._posted = 0
        for _ in range(min(ahead, count)):
            self._post_next()

    def __iter__(self) -> Iterator[Tensor]:
        while self._pending:
            result = self._pending.popleft().wait()
            self._post_next()
            yield result

    def _post_next(self) -> None:
        if self._posted < self._count:
            self._pending.append(posted(self._post(self._posted), self._overlapped))
            self._posted += 1


def posted(pending: Pending, overlapped: bool) -> Pending:
    """A transfer that was posted now; one that is not ``overlapped`` is complete."""
    if not overlapped:
        pending.wait()
    return pending


class PieceExchange(ABC):
    """Moves pieces of the keys and values of one attention, and their gradients.

    Args:
        peers: the ranks.
        plan: this rank's.
        k: keys of this rank, ``(B, heads, s, D)``.
        v: values of this rank, ``(B, heads, s, D)``; D may be another.
    """

    def __init__(self, peers: Peers, plan: Plan, k: Tensor, v: Tensor) -> None:
        self.peers, self.plan, self.k, self.v = peers, plan, k, v
        self._posted: PostedAhead | None = None

    def post_first(self, *, overlapped: bool = True) -> None:
        """Posts the rounds that travel at a time, before :meth:`rounds` is called."""
        if self._posted is None:
            self._posted = PostedAhead(self.post, len(self.plan.rounds), self.plan.ahead, overlapped)

    def rounds(self, *, overlapped: bool) -> PostedAhead:
        """What comes in each round, once; see :class:`PostedAhead`."""
        self.post_first(overlapped=overlapped)
        rounds, self._posted = self._posted, None
        assert rounds is not None, "post_first has set it"
        return rounds

    @abstractmethod
    def post(self, number: int) -> Pending:
        """Posts the keys and values of a round."""

    @abstractmethod
    def pieces_of(self, number: int, received: Tensor) -> dict[Piece, tuple[Tensor, Tensor]]:
        """The keys and values that have come in a round: views of its result."""

    @abstractmethod
    def post_gradients(self, number: int, gradients: dict[Piece, tuple[Tensor, Tensor]]) -> Pending:
        """Posts the gradients of the keys and values that have come in a round.

        Args:
            number: of the round.
            gradients: in the accumulator's dtype; a piece that no query sees has none.
        """

    @abstractmethod
    def gradients_of(self, number: int, received: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """This rank's pieces that were sent in a round, and the gradients that have come for their keys and values."""

    def message(self, pieces: Iterable[Piece]) -> Tensor:
        """Keys and values of this rank, flat."""
        parts = [x[:, :, piece.rows.start : piece.rows.stop].reshape(-1) for piece in pieces for x in (self.k, self.v)]
        return torch.cat(parts) if parts else self.k.new_empty(0)

    def numel(self, pieces: Iterable[Piece]) -> int:
        """Elements of the keys and values of pieces."""
        return sum(len(piece.rows) for piece in pieces) * sum(x.shape[0] * x.shape[1] * x.shape[3] for x in (self.k, self.v))

    def split(self, message: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """What :meth:`message` has joined."""
        shapes = [(*x.shape[:2], len(piece.rows), x.shape[3]) for piece in pieces for x in (self.k, self.v)]
        parts = message.split([torch.Size(shape).numel() for shape in shapes])
        tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return zip(pieces, tensors[::2], tensors[1::2], strict=True)


@dataclass
class Chain:
    """The attentions of one forward, whose backwards run in the opposite order.

    The backward of one posts the first keys and values of the one before it, which travel under what lies between the two. If that one
    has no backward, they travel in vain, on all ranks alike.
    """

    _last: ref[PieceExchange] | None = None

    def add(self, exchange: PieceExchange) -> Callable[[], None]:
        """Adds the exchange of an attention's backward. Returns a function that posts that of the attention before it, if it lives."""
        before, self._last = self._last, ref(exchange)

        def post() -> None:
            if before is not None and (exchange := before()) is not None:
                exchange.post_first()

        return post


class PointToPoint(PieceExchange):
    """Each rank sends each other one what that one needs."""

    def post(self, number: int) -> Pending:
        one = self.plan.rounds[number]
        messages = [self.message(pieces) for pieces in one.sends]
        sizes = [self.numel(pieces) for pieces in one.receives]
        return self.peers.exchange(messages, sizes, key=number, label=f"context.pieces[{number}]")

    def pieces_of(self, number: int, received: Tensor) -> dict[Piece, tuple[Tensor, Tensor]]:
        return {piece: (k, v) for piece, k, v in self.split(received, _all(self.plan.rounds[number].receives))}

    def post_gradients(self, number: int, gradients: dict[Piece, tuple[Tensor, Tensor]]) -> Pending:
        one = self.plan.rounds[number]
        parts = [[x.reshape(-1) for piece in pieces for x in gradients[piece]] for pieces in one.receives]
        messages = [torch.cat(flat).to(self.k.dtype) if flat else self.k.new_empty(0) for flat in parts]
        sizes = [self.numel(pieces) for pieces in one.sends]
        return self.peers.exchange(messages, sizes, key=FIRST_GRADIENT_KEY + number, label=f"context.piece_grads[{number}]")

    def gradients_of(self, number: int, received: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        return self.split(received, _all(self.plan.rounds[number].sends))


class AllGather(PieceExchange):
    """Each rank gets the same pieces in a round, and the gradients of each are summed on their way back."""

    def post(self, number: int) -> Pending:
        pieces, bounds = self._pieces(number)
        x = self.k.new_empty(bounds[-1])
        first, last = bounds[self.peers.rank : self.peers.rank + 2]
        x[first:last] = self.message(pieces[self.peers.rank])
        return self.peers.group.all_gather(x, bounds, key=number, label=f"context.pieces[{number}]")

    def pieces_of(self, number: int, received: Tensor) -> dict[Piece, tuple[Tensor, Tensor]]:
        return {piece: (k, v) for piece, k, v in self.split(received, _all(self._pieces(number)[0]))}

    def post_gradients(self, number: int, gradients: dict[Piece, tuple[Tensor, Tensor]]) -> Pending:
        pieces, bounds = self._pieces(number)
        dtype = accumulator(self.k.dtype)
        x = self.k.new_zeros(bounds[-1], dtype=dtype)
        for piece, k, v in self.split(x, _all(pieces)):
            if piece in gradients:
                for into, gradient in zip((k, v), gradients[piece], strict=True):
                    into.copy_(gradient)
        wire = None if self.k.dtype == dtype else self.k.dtype
        label = f"context.piece_grads[{number}]"
        return self.peers.group.reduce_scatter(x, bounds, key=FIRST_GRADIENT_KEY + number, label=label, wire=wire)

    def gradients_of(self, number: int, received: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        return self.split(received, self._pieces(number)[0][self.peers.rank])

    def _pieces(self, number: int) -> tuple[list[tuple[Piece, ...]], list[int]]:
        """The pieces of all ranks in a round, and where those of each start in the message."""
        one: Round = self.plan.rounds[number]
        mine = next((pieces for pieces in one.sends if pieces), ())
        pieces = [mine if rank == self.peers.rank else received for rank, received in enumerate(one.receives)]
        return pieces, list(accumulate(map(self.numel, pieces), initial=0))


def _all(pieces: Iterable[Iterable[Piece]]) -> list[Piece]:
    return [piece for each in pieces for piece in each]


EXCHANGES: dict[PieceMethod, type[PieceExchange]] = {"p2p": PointToPoint, "all_gather": AllGather}
