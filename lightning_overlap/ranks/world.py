"""All ranks: their numbers, agreements between them, and the groups that they form."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from lightning_overlap.ranks.announcements import Announcements, TransferError
from lightning_overlap.ranks.engine import Engine
from lightning_overlap.ranks.gloo import GlooEngine, ThreadedGlooEngine
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.link import Link, Urgency
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.nccl import NcclEngine
from lightning_overlap.ranks.sockets import Sockets
from lightning_overlap.torch_seams import group_count, set_group_count

T = TypeVar("T")


class Connector(Protocol):
    """Makes groups in place of gloo and NCCL."""

    backend: str
    """That the ranks would use: ``gloo`` or ``nccl``."""
    announcements: Announcements
    """In place of those of the real world."""

    def group(self, members: Members, *, gathers: bool, background: Urgency | None) -> Group:
        """Makes a group; for the arguments see :func:`make_group`."""


class World:
    """The state of this process that concerns all ranks.

    Attributes:
        announcements: errors of all ranks.
        meeting_timeout: how long ranks wait for each other to make a group.
        groups: the groups of this process that have several ranks.
        link: to other hosts.
        connector: makes all groups, in a rehearsal; None: gloo and NCCL do.
        printed: by topic, the text about a run that was printed last.
        trainer_lock: held by the thread that runs a Trainer: collectives of two threads could be matched with each other.
    """

    def __init__(self) -> None:
        self.announcements = Announcements()
        self.meeting_timeout = timedelta(minutes=5)
        self.groups: weakref.WeakSet[Group] = weakref.WeakSet()
        self.trainer_lock = threading.RLock()
        self.link = Link()
        self.connector: Connector | None = None
        self.printed: dict[str, str] = {}
        self._everyone: Group | None = None
        self._process_group: Any = None  # torch's world when `_everyone` was made

    def everyone(self) -> Group:
        """Returns the group of all ranks, on the CPU. Before :meth:`assemble`, and in another world, it uses torch's connections.

        A connector's group is made at the first call.
        """
        if self._everyone is not None and self._process_group is dist.group.WORLD:
            return self._everyone
        members = Members(range(world_size()), "world", self.announcements)
        if self.connector is not None:
            group = self.connector.group(members, gathers=False, background=None)
            self.groups.add(group)
            self._everyone, self._process_group = group, dist.group.WORLD
            return group
        engine = (NcclEngine if backend() == "nccl" else GlooEngine)(members, dist.group.WORLD)
        engine.borrow()
        return Group(members, engine)

    def assemble(self, timeout: timedelta, meeting_timeout: timedelta) -> None:
        """Makes a new group of all ranks, for agreements. Collective over the world.

        Raises:
            TransferError: some ranks did not call it within ``meeting_timeout``.
        """
        if self._everyone is not None:
            self._everyone.close()
            self._everyone = None
        self.meeting_timeout = meeting_timeout
        if world_size() == 1:
            return
        # Ranks name groups by a number that each rank counts. After a failed attempt ranks may have different numbers.
        counts = self.announcements.gather("groups", str(group_count()), meeting_timeout.total_seconds())
        if len(counts) < world_size():
            raise TransferError(
                f"only ranks {list(counts)} of {world_size()} have met within {meeting_timeout} (meeting_timeout). Look for the "
                "errors of the other ranks"
            )
        set_group_count(max(map(int, counts.values())))
        self._everyone = make_group([range(world_size())], "world", timeout, backend="gloo", gathers=False, threads=False)
        self._process_group = dist.group.WORLD

    def abandon(self) -> None:
        """After a failure: ends the connections of all groups, so that no rank waits for another one's transfers."""
        for group in list(self.groups):
            group.abandon()
        self._everyone = None  # torch's connections, which have no transfer under way, serve the rest of this attempt

    @contextmanager
    def connected_by(self, connector: Connector) -> Iterator[None]:
        """Inside, a connector makes all groups. Call it where torch's world is the connector's."""
        announcements, self.announcements, self.connector = self.announcements, connector.announcements, connector
        try:
            yield
        finally:
            self.abandon()
            self.announcements, self.connector = announcements, None


WORLD = World()
"""The only object of this package that belongs to the process, since torch.distributed has one world and one store a process."""


def world_size() -> int:
    """Returns the number of ranks; 1 before there are process groups."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the global rank of this process; 0 before there are process groups."""
    return dist.get_rank() if dist.is_initialized() else 0


def has_nccl() -> bool:
    """Whether this torch was built with NCCL."""
    return dist.is_nccl_available()


def backend() -> str:
    """Returns the backend of the world: ``gloo`` or ``nccl``; ``none`` before there are process groups."""
    if WORLD.connector is not None:
        return WORLD.connector.backend
    return str(dist.get_backend()) if dist.is_initialized() else "none"


def is_everyone(process_group: Any) -> bool:
    """Whether a process group contains all ranks; None means the group of all ranks."""
    return process_group is None or process_group is dist.group.WORLD


def everyone() -> Group:
    """Returns the group of all ranks; see :meth:`World.everyone`."""
    return WORLD.everyone()


def agree(flag: bool, *, by_all: bool) -> bool:
    """Whether all ranks pass True, or, without ``by_all``, any rank does. Collective over the world, blocking."""
    return WORLD.everyone().agree(flag, by_all=by_all) if world_size() > 1 else flag


def all_gather_objects(value: T) -> list[T]:
    """Returns every rank's object, by rank. Collective over the world, blocking."""
    return WORLD.everyone().all_gather_objects(value) if world_size() > 1 else [value]


def broadcast_object(value: T, source: int = 0) -> T:
    """Returns the object of the rank ``source``. Collective over the world, blocking."""
    return WORLD.everyone().share_object(value, source) if world_size() > 1 else value


def end_world() -> None:
    """Ends all connections, at the end of the process.

    If a thread of gloo's frees the tensors of the last collective after Python has ended, the process aborts (torch 2.13).
    """
    if dist.is_initialized():
        WORLD.announcements.wait_until_heard()
        dist.destroy_process_group()


def make_group(
    rank_sets: Sequence[Sequence[int]],
    name: str,
    timeout: timedelta,
    backend: str | None = None,
    *,
    gathers: bool = True,
    threads: bool = True,
    background: Urgency | None = None,
) -> Group:
    """Makes a group for each of some disjoint sets of ranks, and returns this rank's. Collective over the world.

    Args:
        rank_sets: global ranks of each group; the same on all ranks.
        name: name of the group in errors.
        timeout: how long a transfer may take.
        backend: ``gloo`` or ``nccl``; by default the world's.
        gathers: whether it makes all-gathers, which have separate connections.
        threads: whether gloo posts and waits on threads instead of on the caller's thread.
        background: on gloo, data of this urgency and less urgent data yields to more urgent data of all groups; None: none of it does.
            It is sent in chunks, each of which takes 0.3 ms of the processor.

    Raises:
        ConfigError: another rank has announced one.
        TransferError: another rank has announced another error, or the members have not met in time.
    """
    if WORLD.connector is not None:
        (ranks,) = (ranks for ranks in rank_sets if dist.get_rank() in ranks)
        group = WORLD.connector.group(Members(ranks, name, WORLD.announcements), gathers=gathers, background=background)
        WORLD.groups.add(group)
        return group
    engine: Engine | None = None
    for ranks in rank_sets:
        process_groups: list[Any] = [None, None]
        sockets = [Sockets(), Sockets()]
        for i in range(0 if len(ranks) == 1 else 2 if gathers else 1):
            with Sockets.made_inside() as sockets[i]:
                process_groups[i] = _meet(ranks, name, timeout, backend)
        if dist.get_rank() in ranks:
            engine = _engine(
                Members(ranks, name, WORLD.announcements), process_groups, sockets, threads=threads, background=background
            )
    assert engine is not None, f"rank {dist.get_rank()} is not in any of {rank_sets}"
    group = Group(engine.members, engine)
    if group.size > 1:
        WORLD.groups.add(group)
        if isinstance(engine, GlooEngine):
            ends = group.all_gather_objects(engine.ends())
            engine.keep_connections(ends[: group.rank] + ends[group.rank + 1 :])
    return group


def _engine(
    members: Members, process_groups: Sequence[Any], sockets: Sequence[Sockets], *, threads: bool, background: Urgency | None
) -> Engine:
    if dist.get_backend(process_groups[0]) == "nccl":
        for each in sockets:  # sockets of NCCL and of other threads, which cannot be told apart
            each.close()
        return NcclEngine(members, *process_groups)
    if threads and members.size > 1:
        return ThreadedGlooEngine(members, *process_groups, *sockets, WORLD.link, background=background)
    return GlooEngine(members, *process_groups, *sockets)


def _meet(ranks: Sequence[int], name: str, timeout: timedelta, backend: str | None) -> Any:
    """Makes a process group on a thread, where its members wait for each other, while this thread looks for errors."""
    # torch uses the timeout also for later transfers, so it cannot limit the meeting.
    return patiently(
        lambda: dist.new_group(ranks, timeout=timeout, backend=backend),
        WORLD.meeting_timeout,
        f"ranks {list(ranks)} have not all met to make group {name!r}",
    )


def patiently(do: Callable[[], T], limit: timedelta, failed: str) -> T:
    """Returns the result of ``do``, which may block in a wait that cannot be interrupted, such as torch's for the store.

    Args:
        do: runs on a thread.
        limit: time after which this function raises, and the thread continues.
        failed: the beginning of the error.

    Raises:
        ConfigError: another rank has announced one.
        TransferError: another rank has announced another error, or ``limit`` has passed.
    """
    results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            results.put((True, do()))
        except Exception as error:
            results.put((False, error))

    threading.Thread(target=run, name="meeting", daemon=True).start()
    until = time.monotonic() + limit.total_seconds()
    advice = "Look for the error of the missing rank, and start all ranks; meeting_timeout sets how long they wait"
    while True:
        try:
            succeeded, result = results.get(timeout=WORLD.announcements.interval)
        except queue.Empty:
            WORLD.announcements.look()
            if time.monotonic() > until:
                raise TransferError(f"{failed} within {limit}. {advice}") from None
            continue
        if succeeded:
            return result
        if not isinstance(result, dist.DistError | RuntimeError):
            raise result
        raise WORLD.announcements.announced() or TransferError(f"{failed}: {result}. {advice}") from result
