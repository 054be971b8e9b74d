"""A world that does not exist, of which this process plays one rank: transfers take no time and are logged.

A few processes play the ranks that send each other different things: one rank of each pipeline stage. Between these, activations,
objects and flags are real messages. A rank that nobody plays sends what the player of its stage sends, and floating-point sums and
gathers are made of this rank's values. So shapes, sizes and the order of all transfers are right, and values are not.
"""

from __future__ import annotations

import pickle
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.announcements import Announcements, TransferError
from lightning_overlap.ranks.clock import Clock
from lightning_overlap.ranks.engine import Engine, Piece
from lightning_overlap.ranks.gloo import GlooEngine
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.link import Urgency
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.nccl import NcclEngine
from lightning_overlap.ranks.pool import BufferPool
from lightning_overlap.ranks.transfer import Transfer, Waiter
from lightning_overlap.ranks.world import WORLD
from lightning_overlap.torch_seams import start_fake_world

T = TypeVar("T")


@dataclass(eq=False)
class LoggedTransfer:
    """A transfer that this rank has posted.

    Attributes:
        index: number of earlier transfers in the log, see :meth:`EventLog.take`.
        record: as a group logs it.
        verb: of :class:`Group`, or a blocking one.
        background: whether it yields to more urgent data, see :func:`lightning_overlap.ranks.world.make_group`.
        received: bytes that this rank receives.
    """

    index: int
    record: Transfer
    verb: str
    background: bool
    received: int


@dataclass(frozen=True)
class Event:
    """A post of a transfer, or a wait for it. What the engine does between ``start`` and ``end`` is no part of a real step."""

    transfer: LoggedTransfer
    is_wait: bool
    start: Any
    end: Any


class EventLog:
    """What this rank posts and waits for, in order.

    Args:
        clock: gives the stamps of events.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._events: list[Event] = []
        self._posts = 0

    def post(self, record: Transfer, verb: str, *, background: bool, received: int, start: Any) -> LoggedTransfer:
        """Adds a post that began at the stamp ``start``; for the other arguments see :class:`LoggedTransfer`."""
        transfer = LoggedTransfer(self._posts, record, verb, background, received)
        self._posts += 1
        self._events.append(Event(transfer, False, start, self.clock.now()))
        return transfer

    def wait(self, transfer: LoggedTransfer, start: Any) -> None:
        """Adds a wait that began at the stamp ``start``."""
        self._events.append(Event(transfer, True, start, self.clock.now()))

    def take(self) -> list[Event]:
        """Returns the events since the last call; the next transfer has the index 0."""
        events, self._events, self._posts = self._events, [], 0
        return events


class Inbox(Protocol):
    """A queue of messages between processes."""

    def put(self, message: Any) -> None: ...

    def get(self) -> Any: ...


class Turn(Protocol):
    """A lock between processes."""

    def acquire(self) -> Any: ...

    def release(self) -> None: ...


class Players:
    """The processes that play ranks of one world. One of them runs at a time, so that none takes the time of another.

    Args:
        ranks: by player, the rank that it plays: one of each pipeline stage, each with the same place in its stage.
        world_size: number of ranks.
        player: of this process.
        inboxes: by player.
        turn: held by the player that runs, and by this one from the start.
        session: number of the rehearsal. Messages of an earlier one, which has failed, are dropped.
    """

    def __init__(self, ranks: Sequence[int], world_size: int, player: int, inboxes: Sequence[Inbox], turn: Turn, session: int) -> None:
        self.ranks = tuple(ranks)
        self.player = player
        self._stage = world_size // len(ranks)
        self._inboxes = inboxes
        self._turn = turn
        self._session = session
        self._mail: dict[Hashable, deque[Any]] = defaultdict(deque)
        """Messages that were not asked for yet, by sender and subject. A sender that is ahead may have sent several of a subject."""

    def of(self, rank: int) -> int:
        """Returns the player of a rank's stage."""
        return rank // self._stage

    def plays(self, rank: int) -> bool:
        """Whether a process plays a rank."""
        return rank in self.ranks

    def send(self, player: int, subject: Hashable, message: Any) -> None:
        """Sends a message. It does not wait for the receiver."""
        self._inboxes[player].put((self._session, (self.player, subject), pickle.dumps(message)))

    def receive(self, player: int, subject: Hashable) -> Any:
        """Returns a message about a subject, and lets other players run until it has come.

        Raises:
            TransferError: a player has failed.
        """
        messages = self._mail[player, subject]
        if not messages:
            self._turn.release()
            try:
                while not messages:
                    session, sender, data = self._inboxes[self.player].get()
                    if session == self._session:
                        message = pickle.loads(data)
                        if sender[1] == "failure":
                            raise TransferError(f"the rehearsal of rank {self.ranks[sender[0]]} has failed: {message}")
                        self._mail[sender].append(message)
            finally:
                self._turn.acquire()
        message = messages.popleft()
        if not messages:
            del self._mail[player, subject]
        return message

    def fail(self, error: BaseException) -> None:
        """Ends the rehearsals of the other players."""
        for player in range(len(self.ranks)):
            if player != self.player:
                self.send(player, "failure", f"{type(error).__name__}: {error}")


class NoAnnouncements(Announcements):
    """Announcements where no rank can fail: there is no store."""

    store = None

    def gather(self, topic: str, value: str, limit: float) -> dict[int, str]:
        return dict.fromkeys(range(dist.get_world_size()), value)


class RehearsedWorld:
    """Makes the groups of a rank in a world that does not exist: the :class:`~lightning_overlap.ranks.world.Connector` of a rehearsal.

    Args:
        players: the processes that play ranks.
        size: number of ranks.
        backend: that the ranks would use, ``"gloo"`` or ``"nccl"``.
        clock: of this rank's device.
    """

    def __init__(self, players: Players, size: int, backend: str, clock: Clock) -> None:
        self.players = players
        self.size = size
        self.backend = backend
        self.log = EventLog(clock)
        self.announcements: Announcements = NoAnnouncements()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, this process is a rank of the world."""
        start_fake_world(self.players.ranks[self.players.player], self.size)
        try:
            with WORLD.connected_by(self):
                yield
        finally:
            dist.destroy_process_group()

    def group(self, members: Members, *, gathers: bool, background: Urgency | None) -> Group:
        process_group = dist.new_group(members.ranks) if members.size > 1 else None
        engine = RehearsedEngine(members, process_group, process_group if gathers else None, self, background=background)
        return RehearsedGroup(members, engine)


class RehearsedGroup(Group):
    """A group in which some members are imagined."""

    _engine: RehearsedEngine

    def share_object(self, value: T, source: int = 0) -> T:
        # An imagined source has the object of this rank.
        return super().share_object(value, source if self._engine.is_played(source) else self.rank)


class RehearsedWaiter:
    """Waits for a transfer of a rehearsal.

    Args:
        log: gets the wait.
        transfer: that this rank has posted.
        receive: completes the tensors with the messages of other players.
    """

    def __init__(self, log: EventLog, transfer: LoggedTransfer, receive: Callable[[], None] | None = None) -> None:
        self._log = log
        self._transfer = transfer
        self._receive = receive

    def arrived(self) -> bool:
        # What is done as soon as a transfer has arrived is rehearsed where it is waited for: that depends on no link.
        return self._transfer.verb == "send"

    def wait(self) -> None:
        start = self._log.clock.now()
        if self._receive is not None:
            self._receive()
            self._receive = None
        self._log.wait(self._transfer, start)


class RehearsedEngine(Engine):
    """Logs transfers, which complete at once, with values of this rank or of another player.

    It has more than 20 methods, since it is an :class:`Engine`.

    Args:
        members: as in :class:`Engine`.
        process_group: as in :class:`Engine`.
        gathers: as in :class:`Engine`.
        world: of this rank.
        background: as in :func:`lightning_overlap.ranks.world.make_group`.
    """

    def __init__(
        self, members: Members, process_group: Any, gathers: Any, world: RehearsedWorld, *, background: Urgency | None
    ) -> None:
        super().__init__(members, process_group, gathers)
        kind = NcclEngine if world.backend == "nccl" else GlooEngine
        self.keyed, self.in_one_order, self.averages = kind.keyed, kind.in_one_order, kind.averages
        self.scatters, self.sums_sparse, self.can_poll = kind.scatters, kind.sums_sparse, kind.can_poll
        if world.backend == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._background = background
        self._has_priorities = world.backend == "gloo"
        self._log = world.log
        self._players = world.players
        self._others = [r for r, rank in enumerate(members.ranks) if r != members.rank and world.players.plays(rank)]
        self._counts: dict[str, int] = defaultdict(int)

    def is_played(self, member: int) -> bool:
        """Whether a process plays a member."""
        return self._players.plays(self.members.ranks[member])

    # -- transfers ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        start = self._log.clock.now()
        receive = self._post_reduction(x, op, (transfer.label, transfer.number))
        return self._posted(transfer, "all_reduce", start, transfer.nbytes, receive)

    def reduce_scatter(self, x: Tensor, piece: Tensor, op: Any, transfer: Transfer) -> Waiter:
        start = self._log.clock.now()
        self._scale(piece, op)
        return self._posted(transfer, "reduce_scatter", start, piece.nbytes * (self.members.size - 1))

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        # The point-to-point transfers of a reduce-scatter.
        start = self._log.clock.now()
        pieces = dict(sends)
        for peer, x in receives:
            _fill(x, pieces.get(peer, x[:0]))
        return self._posted(transfer, "reduce_scatter", start, sum(x.nbytes for _, x in receives))

    def all_to_all(
        self, received: Tensor, x: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int], key: int, transfer: Transfer
    ) -> Waiter:
        # A peer sends what this rank sends to it: so ranks agree on the numbers of rows that they exchange next.
        start = self._log.clock.now()
        for incoming, outgoing in zip(received.split(list(receive_sizes)), x.split(list(send_sizes)), strict=True):
            _fill(incoming, outgoing if len(outgoing) else x)
        rows = sum(receive_sizes) - receive_sizes[self.members.rank]
        return self._posted(transfer, "all_to_all", start, rows * received[:1].numel() * received.element_size())

    def all_gather(self, x: Tensor, pieces: Sequence[Tensor], key: int, priority: int, pool: BufferPool, transfer: Transfer) -> Waiter:
        shard = pieces[self.members.rank]
        buffer = None
        if self.device is None:  # gloo sends a copy, which it frees when it is sent
            buffer = pool.take(shard.numel(), shard.dtype, shard.device)
            buffer[: shard.numel()].copy_(shard)
        start = self._log.clock.now()
        if self._background is None:  # else they are weights, of which this rank has values already
            for member, piece in enumerate(pieces):
                if member != self.members.rank:
                    _fill(piece, shard)
        release = None if buffer is None else partial(pool.give_back, buffer)
        return self._posted(transfer, "all_gather", start, x.nbytes - shard.nbytes, release)

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        start = self._log.clock.now()
        if self.is_played(peer):
            self._send(peer, (transfer.label, transfer.number), x)
        return self._posted(transfer, "send", start, 0)

    def receive(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        start = self._log.clock.now()

        def receive() -> None:
            _fill(x, self._received(peer, (transfer.label, transfer.number), x) if self.is_played(peer) else x[:0])

        return self._posted(transfer, "receive", start, x.nbytes, receive)

    def _posted(self, transfer: Transfer, verb: str, start: Any, received: int, receive: Callable[[], None] | None = None) -> Waiter:
        urgency = Urgency.GATHER if verb == "all_gather" else Urgency.REDUCTION
        yields = self._has_priorities and self._background is not None and urgency >= self._background
        logged = self._log.post(transfer, verb, background=yields, received=received, start=start)
        return RehearsedWaiter(self._log, logged, receive)

    # -- blocking ----------------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor, op: Any) -> None:
        with self._blocking("all_reduce", 2 * x.nbytes, 2 * x.nbytes) as subject:
            receive = self._post_reduction(x, op, subject)
            if receive is not None:
                receive()

    def broadcast(self, x: Tensor, source: int, *, on_host: bool) -> None:
        ranks = self.members.ranks
        sender = ranks.index(self._players.ranks[self._players.of(ranks[source])])
        is_sender = sender == self.members.rank
        first = (ranks[source], *(rank for rank in ranks if rank != ranks[source]))
        nbytes = (x.nbytes, 0) if source == self.members.rank else (0, x.nbytes)
        with self._blocking("broadcast", *nbytes, first) as subject:
            # Weights and other values are left alone: players start with equal ones.
            if not _decides(x):
                return
            for other in self._others if is_sender else ():
                self._send(other, subject, x)
            if not is_sender:
                x.copy_(self._received(sender, subject, x))

    def gather_alike(self, x: Tensor, received: list[Tensor]) -> None:
        nbytes = x.nbytes * (self.members.size - 1)
        with self._blocking("all_gather", nbytes, nbytes) as subject:
            values = self._exchanged(x, subject)
            for rank, buffer in zip(self.members.ranks, received, strict=True):
                buffer.copy_(values[self._players.of(rank)])

    def gather_first(self, x: Tensor, received: list[Tensor] | None) -> None:
        nbytes = (0, x.nbytes * (self.members.size - 1)) if received is not None else (x.nbytes, 0)
        with self._blocking("gather", *nbytes) as subject:
            values = self._exchanged(x, subject)
            for rank, buffer in zip(self.members.ranks, received or (), strict=received is not None):
                buffer.copy_(values[self._players.of(rank)])

    def clock_offset(self) -> float:
        return 0.0

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        """There is nothing to connect."""

    @contextmanager
    def _blocking(self, verb: str, nbytes: int, received: int, ranks: tuple[int, ...] | None = None) -> Iterator[tuple[str, int]]:
        """Logs a blocking transfer, which is made inside, and yields the subject of its messages."""
        start = self._log.clock.now()
        number = self._counts[verb]
        self._counts[verb] += 1
        transfer = Transfer(self.members.name, number, nbytes, ranks or self.members.ranks, 0.0)
        logged = self._log.post(transfer, verb, background=False, received=received, start=start)
        start = self._log.clock.now()
        yield verb, number
        self._log.wait(logged, start)

    # -- messages between players ------------------------------------------------------------------------------------

    def _post_reduction(self, x: Tensor, op: Any, subject: Hashable) -> Callable[[], None] | None:
        """Reduces ``x`` in place, or returns the function that does so with the values of other players."""
        if not self._others or not _decides(x):
            self._scale(x, op)
            return None
        for other in self._others:
            self._send(other, subject, x)

        def receive() -> None:
            mine = x.clone()
            for other in self._others:
                _combine(x, self._received(other, subject, x), op)
            if op == dist.ReduceOp.SUM:  # imagined ranks count too
                x.add_(mine, alpha=self.members.size - len(self._others) - 1)

        return receive

    def _exchanged(self, x: Tensor, subject: Hashable) -> dict[int, Tensor]:
        """Returns ``x`` of all players in the group, by player."""
        me = self._players.player
        if not _decides(x):
            return {self._players.of(rank): x for rank in self.members.ranks}
        for other in self._others:
            self._send(other, subject, x)
        values = {self._players.of(self.members.ranks[other]): self._received(other, subject, x) for other in self._others}
        return {**values, me: x}

    def _send(self, member: int, subject: Hashable, x: Tensor) -> None:
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._players.send(self._players.of(self.members.ranks[member]), self._subject(subject), data)

    def _received(self, member: int, subject: Hashable, like: Tensor) -> Tensor:
        data = self._players.receive(self._players.of(self.members.ranks[member]), self._subject(subject))
        return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape).to(like.device) if data else like

    def _subject(self, subject: Hashable) -> Hashable:
        return self.members.name, self.members.ranks, subject

    def _scale(self, x: Tensor, op: Any) -> None:
        """Makes ``x`` the sum over members that all have this rank's values."""
        if op == dist.ReduceOp.SUM:
            x.mul_(self.members.size)


def _decides(x: Tensor) -> bool:
    """Whether values decide sizes or what a rank does: counts, flags and pickled objects."""
    return not x.is_floating_point() and not x.is_complex()


def _fill(x: Tensor, values: Tensor) -> None:
    """Fills ``x`` with ``values``, repeated or cut; with zeros without any."""
    with torch.no_grad():
        if values.shape == x.shape:
            x.copy_(values)
        elif not values.numel():
            x.zero_()
        else:
            flat = values.detach().reshape(-1)
            x.copy_(flat.repeat(-(-x.numel() // flat.numel()))[: x.numel()].view(x.shape))


def _combine(x: Tensor, other: Tensor, op: Any) -> None:
    """Reduces two tensors into the first."""
    if op == dist.ReduceOp.SUM:
        x.add_(other)
    elif op == dist.ReduceOp.MAX:
        torch.maximum(x, other, out=x)
    elif op == dist.ReduceOp.MIN:
        torch.minimum(x, other, out=x)
