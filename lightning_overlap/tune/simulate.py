"""Simulates a training step: the rehearsed timelines of ranks, with links between them. Standard library only.

Only ranks that differ are simulated, one of each pipeline stage. Another member of a group is taken as alike: it posts the same at the
same time, so a collective is complete once this rank's bytes are through. Where several simulated ranks are members (a send and its
receive, the norm over stages), the transfer begins when all of them have posted.

Each rank sends one chunk at a time on a link, the most urgent first, as ``ranks/link.py`` and ``ranks/chunks.py`` do: data of other
groups before data of background groups, their reductions before their gathers, and gathers in the order in which they are waited for.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning_overlap.ranks.chunks import CHUNK_BYTES
from lightning_overlap.ranks.link import Urgency
from lightning_overlap.tune.network import Load, Network
from lightning_overlap.tune.rehearsal import Compute, Post, Rehearsal

STEPS, WARMUP = 6, 2
"""Simulated steps, of which the first ones are not counted: the link fills up."""
MOST_CHUNKS = 64
"""Chunks of a large transfer that are told apart."""
LEAST_SPEED = 0.1
"""The part of its speed at which a rank computes at least, whatever its transfers take."""


@dataclass(frozen=True)
class Simulation:
    """The result of a simulation.

    Attributes:
        seconds: of a step.
        exposed: by kind of transfer, such as ``data.grads``, seconds of a step in which a rank waits for it; mean of the ranks.
        late: seconds of a step in which a rank waits for a transfer that another rank has not posted yet (a pipeline's bubble); mean
            of the ranks.
        busy: the share of the time in which the busiest link carries data.
    """

    seconds: float
    exposed: Mapping[str, float]
    late: float
    busy: float

    def exposed_by_mode(self) -> dict[str, float]:
        """Returns the exposed seconds of each mode, by its name."""
        modes: defaultdict[str, float] = defaultdict(float)
        for kind, seconds in self.exposed.items():
            modes[kind.split(".")[0]] += seconds
        return dict(modes)


def simulate(rehearsals: Sequence[Rehearsal], network: Network, *, overlapped: bool = True) -> Simulation:
    """Simulates the steps of some ranks on a network.

    Args:
        rehearsals: of one rank of each pipeline stage, which communicate with each other.
        network: the links.
        overlapped: False: the plain twin, in which a transfer begins when it is waited for.

    Raises:
        ValueError: the ranks do not fit together: one waits for a transfer that another never posts.
    """
    clock = _Clock()
    world = _World(clock, network, frozenset(rehearsal.rank for rehearsal in rehearsals), rehearsals[0].world_size // len(rehearsals))
    ranks = [_Rank(rehearsal, world, overlapped=overlapped) for rehearsal in rehearsals]
    world.ranks = {rank.number: rank for rank in ranks}
    for rank in ranks:
        rank.advance()
    clock.run()
    for rank in ranks:
        if len(rank.ends) < STEPS:
            raise ValueError(f"rank {rank.number} waits for {rank.obstacle}, which is never complete: the rehearsals do not match")
    start, end = (max(rank.ends[step] for rank in ranks) for step in (WARMUP - 1, STEPS - 1))
    steps = STEPS - WARMUP
    exposed: defaultdict[str, float] = defaultdict(float)
    for rank in ranks:
        for kind, seconds in rank.exposed.items():
            exposed[kind] += seconds / steps / len(ranks)
    busy = max((direction.busy for rank in ranks for direction in rank.directions.values()), default=0.0)
    return Simulation((end - start) / steps, dict(exposed), sum(rank.late for rank in ranks) / steps / len(ranks), busy / clock.now)


class _Clock:
    """Simulated time.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Calls ``action`` when so many seconds have passed; actions of one time in the order of these calls."""
        heapq.heappush(self._actions, (self.now + seconds, next(self._number), action))

    def run(self) -> None:
        """Runs until nothing is left to do."""
        while self._actions:
            self.now, _, action = heapq.heappop(self._actions)
            action()


@dataclass(eq=False)
class _Transfer:
    """A transfer under way.

    Attributes:
        kind: of its label, ``data.grads`` of ``data.grads[3]``.
        missing: members that have not posted it.
        latency: seconds between the last byte and the end of the waits.
        parts: what members send, until all have posted.
        unsent: parts under way.
        complete: whether a wait for it returns at once.
        posted: the time at which all members had posted it.
        waiting: called when it is complete.
    """

    kind: str
    missing: int
    latency: float
    parts: list[Callable[[], None]] = field(default_factory=list)
    unsent: int = 0
    complete: bool = False
    posted: float = 0.0
    waiting: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class _Part:
    """A member's bytes of a transfer on one link.

    Attributes:
        transfer: the whole.
        chunks: that are not sent.
        seconds: of a chunk.
        loads: ranks that compute slower meanwhile, and the share of their speed that they lose.
    """

    transfer: _Transfer
    chunks: int
    seconds: float
    loads: Sequence[tuple[_Rank, float]]


_Order = tuple[int, int, int, int]
"""Urgency, step, priority, number: the order in which a rank sends."""


class _Direction:
    """A rank's outgoing data on one kind of link: one chunk at a time, the most urgent first."""

    def __init__(self, world: _World) -> None:
        self.busy = 0.0
        self._world = world
        self._queue: list[tuple[_Order, _Part]] = []
        self._sending = False

    def send(self, order: _Order, part: _Part) -> None:
        """Queues a part."""
        heapq.heappush(self._queue, (order, part))
        self._next()

    def _next(self) -> None:
        if self._sending or not self._queue:
            return
        order, part = heapq.heappop(self._queue)
        self._sending = True
        self.busy += part.seconds
        for rank, share in part.loads:
            rank.slow_down(share)
        self._world.clock.after(part.seconds, partial(self._sent, order, part))

    def _sent(self, order: _Order, part: _Part) -> None:
        self._sending = False
        for rank, share in part.loads:
            rank.slow_down(-share)
        part.chunks -= 1
        if part.chunks:
            heapq.heappush(self._queue, (order, part))
        else:
            self._world.end_part(part.transfer)
        self._next()


class _World:
    """What the ranks share.

    Args:
        clock: of the simulation.
        network: the links.
        simulated: numbers of the simulated ranks.
        stage: ranks of a pipeline stage.

    Attributes:
        ranks: by number.
    """

    def __init__(self, clock: _Clock, network: Network, simulated: frozenset[int], stage: int) -> None:
        self.clock, self.network, self.simulated, self.stage = clock, network, simulated, stage
        self.ranks: dict[int, _Rank] = {}
        self._shared: dict[tuple[object, ...], _Transfer] = {}
        self._number = itertools.count()

    def post(self, rank: _Rank, step: int, post: Post, priority: int) -> _Transfer:
        """Posts a rank's part of a transfer."""
        members = self.simulated.intersection(post.ranks)
        name = (post.label, post.number, post.ranks, step, *(() if len(members) > 1 else (rank.number,)))
        transfer = self._shared.get(name)
        if transfer is None:
            # the other end of a send must be simulated; other collectives are complete with the simulated members
            missing = len(post.ranks) if post.verb in ("send", "receive") else len(members)
            transfer = _Transfer(post.label.split("[")[0], missing, self.network.latency(post.ranks, post.verb))
            self._shared[name] = transfer
        urgency = Urgency.FOREGROUND if not post.background else Urgency.GATHER if post.verb == "all_gather" else Urgency.REDUCTION
        # both directions at once: the fuller one counts. What a rank receives from a sender, the sender posts.
        nbytes = post.nbytes if post.verb in ("send", "receive") else max(post.nbytes, post.received)
        for load in self.network.loads(rank.number, post.ranks, post.verb, nbytes, self.stage):
            transfer.parts.append(partial(self._send, rank, transfer, post, load, (urgency, step, priority)))
        transfer.missing -= 1
        if not transfer.missing:
            del self._shared[name]
            transfer.posted = self.clock.now
            parts, transfer.parts = transfer.parts, []
            transfer.unsent = len(parts) + 1
            for part in parts:
                part()
            self.end_part(transfer)
        return transfer

    def _send(self, rank: _Rank, transfer: _Transfer, post: Post, load: Load, order: tuple[int, int, int]) -> None:
        chunks = max(1, min(MOST_CHUNKS, post.nbytes // CHUNK_BYTES)) if post.background else 1
        taking = (rank,) if post.verb != "send" else tuple(self.ranks[number] for number in post.ranks)
        part = _Part(transfer, chunks, load.seconds / chunks, [(each, load.link.load / len(taking)) for each in taking])
        rank.directions[load.is_inter_host].send((*order, next(self._number)), part)

    def end_part(self, transfer: _Transfer) -> None:
        """Notes that a part of a transfer is sent."""
        transfer.unsent -= 1
        if not transfer.unsent:
            self.clock.after(transfer.latency, partial(self._complete, transfer))

    def _complete(self, transfer: _Transfer) -> None:
        transfer.complete = True
        waiting, transfer.waiting = transfer.waiting, []
        for resume in waiting:
            resume()


class _Rank:
    """A rank that repeats its step.

    Attributes:
        number: global rank.
        directions: outgoing data inside the host (False) and between hosts (True).
        ends: the time at which each step ended.
        exposed, late: as in :class:`Simulation`, the sums over all counted steps.
        obstacle: the kind of the transfer that it waits for.
    """

    def __init__(self, rehearsal: Rehearsal, world: _World, *, overlapped: bool) -> None:
        self.number = rehearsal.rank
        self.directions = {is_inter_host: _Direction(world) for is_inter_host in (False, True)}
        self.ends: list[float] = []
        self.exposed: defaultdict[str, float] = defaultdict(float)
        self.late = 0.0
        self.obstacle = ""
        self._world, self._events, self._overlapped = world, rehearsal.events, overlapped
        self._order = _order_of_waits(rehearsal)
        self._transfers: dict[tuple[int, int], _Transfer] = {}
        """By step and number, those that were posted and not waited for."""
        self._postponed: dict[tuple[int, int], Post] = {}
        """In the plain twin, by step and number, the posts that their waits will make."""
        self._position = 0
        self._work = _Work(world.clock, self.advance)

    def slow_down(self, share: float) -> None:
        """Takes a share of the rank's speed; a negative one gives it back."""
        self._work.slow_down(share)

    def advance(self) -> None:
        """Runs events until one takes time."""
        while len(self.ends) < STEPS:
            if self._position == len(self._events):
                self._position = 0
                self.ends.append(self._world.clock.now)
                continue
            event = self._events[self._position]
            self._position += 1
            if isinstance(event, Compute):
                self._work.start(event.seconds)
                return
            if isinstance(event, Post):
                self._begin(event)
            elif not self._wait(len(self.ends) - event.previous, event.transfer):
                return

    def _begin(self, post: Post) -> None:
        link = self._world.network.slowest(post.ranks)
        chunks = max(1, -(-post.nbytes // CHUNK_BYTES)) if post.background else 1  # each is a transfer of its own
        self._work.debt += chunks * link.overhead if link is not None else 0.0
        # In the plain twin, too, no rank waits for a send: its receive, which is posted late, makes it late.
        if self._overlapped or post.verb == "send" or post.transfer not in self._order:
            self._post(len(self.ends), post)
        else:
            self._postponed[len(self.ends), post.transfer] = post

    def _post(self, step: int, post: Post) -> None:
        transfer = self._world.post(self, step, post, self._order.get(post.transfer, 0))
        if post.transfer in self._order:
            self._transfers[step, post.transfer] = transfer

    def _wait(self, step: int, number: int) -> bool:
        """Waits for a transfer. Returns whether it is complete; if not, its end calls :meth:`advance`."""
        if (step, number) in self._postponed:
            self._post(step, self._postponed.pop((step, number)))
        transfer = self._transfers.pop((step, number), None)
        if transfer is None or transfer.complete:  # none: it is of the step before the first one
            return True
        self.obstacle = transfer.kind
        transfer.waiting.append(partial(self._resume, transfer, self._world.clock.now))
        return False

    def _resume(self, transfer: _Transfer, start: float) -> None:
        waited = self._world.clock.now - start
        self._work.debt = max(0.0, self._work.debt - waited)  # what transfers take of the processor is done meanwhile
        if len(self.ends) >= WARMUP:
            late = max(0.0, transfer.posted - start)
            self.late += late
            self.exposed[transfer.kind] += waited - late
        self.advance()


def _order_of_waits(rehearsal: Rehearsal) -> dict[int, int]:
    """By number of a transfer, the place of its first wait among all waits of a step."""
    order: dict[int, int] = {}
    for event in rehearsal.events:
        if not isinstance(event, Compute | Post):
            order.setdefault(event.transfer, len(order))
    return order


class _Work:
    """A rank's compute, which takes longer while transfers take a share of the rank's speed.

    Args:
        clock: of the simulation.
        done: called when the work is done.

    Attributes:
        debt: seconds of work that the next computation does as well.
    """

    def __init__(self, clock: _Clock, done: Callable[[], None]) -> None:
        self.debt = 0.0
        self._clock, self._done = clock, done
        self._left: float | None = None
        self._since = 0.0
        self._taken = 0.0
        self._version = 0

    def start(self, seconds: float) -> None:
        """Starts a computation, which takes so many seconds without transfers."""
        self._left, self.debt = seconds + self.debt, 0.0
        self._plan()

    def slow_down(self, share: float) -> None:
        """Takes a share of the speed; a negative one gives it back."""
        if self._left is not None:
            self._left -= (self._clock.now - self._since) * self._speed
        self._taken += share
        if self._left is not None:
            self._plan()

    @property
    def _speed(self) -> float:
        return max(1.0 - self._taken, LEAST_SPEED)

    def _plan(self) -> None:
        assert self._left is not None, "a computation runs"
        self._since = self._clock.now
        self._version += 1
        self._clock.after(max(self._left, 0.0) / self._speed, partial(self._end, self._version))

    def _end(self, version: int) -> None:
        if version == self._version and self._left is not None:  # its end has not moved since
            self._left = None
            self._done()
