"""The process that plays a rank: it trains the user's module for a few steps in a world that does not exist."""

from __future__ import annotations

import gc
import logging
import pickle
import statistics
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_overlap.bench.runs import Runs, check_one_step, refuse_uncounted, without_checks
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.clock import Clock, DeviceClock
from lightning_overlap.ranks.rehearsal import Event, Inbox, LoggedTransfer, Players, RehearsedWorld, Turn
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tune.memory import StepMemory
from lightning_overlap.tune.rehearsal import Compute, Post, Rehearsal, Verb, Wait

WARMUP = 2
"""Steps before the timed ones. After the first one modes sort their buckets and turn lanes on; in the second one memory is counted."""


@dataclass(frozen=True)
class Task:
    """One rehearsal.

    Attributes:
        config: of the run.
        world_size: number of ranks.
        ranks: by player, the rank that it plays.
        devices: by player.
        backend: that the ranks would use.
        steps: number of timed steps.
        session: number of the rehearsal.
    """

    config: OverlapConfig
    world_size: int
    ranks: tuple[int, ...]
    devices: tuple[torch.device, ...]
    backend: str
    steps: int
    session: int


@dataclass(frozen=True)
class Failure:
    """Why a rank could not be rehearsed.

    Attributes:
        message: of the error.
        trace: its traceback.
        is_config_error: whether it is a ``ConfigError``.
        follows: whether another player's failure is its cause.
    """

    message: str
    trace: str
    is_config_error: bool
    follows: bool


def serve(pipe: Connection, player: int, inboxes: Sequence[Inbox], turn: Turn, run: bytes, threads: int) -> None:
    """Plays ranks until the other end of the pipe is closed.

    Args:
        pipe: gets a :class:`Task`, and answers with True and a :class:`Rehearsal`, or with False and a :class:`Failure`.
        player: number of this process among those that play ranks.
        inboxes: by player.
        turn: held by the player that runs.
        run: the module, its data and the arguments of Trainer, pickled.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # a fit announces itself, in each rehearsal
    warnings.simplefilter("ignore")
    training: Any = None
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        players = Players(task.ranks, task.world_size, player, inboxes, turn, task.session)
        try:
            training = training or pickle.loads(run)
            model, data, trainer = training
            pipe.send((True, play(task, players, turn, Runs(model, data, OverlapStrategy(), trainer))))
        except Exception as error:
            players.fail(error)
            kinds = isinstance(error, ConfigError), isinstance(error, TransferError)
            message = str(error) if kinds[0] else f"{type(error).__name__}: {error}"
            pipe.send((False, Failure(message, traceback.format_exc(), *kinds)))
        gc.collect()  # what a run that has failed holds


def play(task: Task, players: Players, turn: Turn, runs: Runs) -> Rehearsal:
    """Plays one rank.

    Args:
        task: the rehearsal.
        players: of which this process is one.
        turn: as in :func:`serve`.
        runs: of the user's module.
    """
    turn.acquire()
    try:
        device = task.devices[players.player]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        clock = DeviceClock() if device.type == "cuda" else Clock()
        world = RehearsedWorld(players, task.world_size, task.backend, clock)
        rank, size = task.ranks[players.player], task.world_size
        strategy = OverlapStrategy(cluster_environment=_RehearsedEnvironment(rank, size), process_group_backend=task.backend)
        strategy.config = replace(task.config, **without_checks(task.config))
        recorder, memory = StepEvents(world, task.steps), StepMemory(WARMUP - 1)
        with world.running():
            runs.fit(
                strategy,
                WARMUP + task.steps,
                [memory, recorder],
                devices=[device.index] if device.type == "cuda" else 1,
                num_nodes=size,
            )
    finally:
        turn.release()
    assert memory.memory is not None, "the steps have been run"
    return Rehearsal(rank, players.player, size, recorder.events(), memory.memory)


class _RehearsedEnvironment(ClusterEnvironment):
    """Nodes of one device each, of which this process is one.

    Args:
        rank: of this process.
        size: number of ranks.
    """

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self._rank = rank
        self._size = size

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._size

    def set_world_size(self, size: int) -> None:
        """The size is given."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """The rank is given."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self._rank


class Window(NamedTuple):
    """One step as it was recorded: events, and the seconds before each of them and after the last one."""

    events: list[Event]
    seconds: list[float]

    @property
    def order(self) -> tuple[Any, ...]:
        """Identifies the order of events: equal for steps that do the same."""
        return tuple((e.is_wait, e.transfer.index, e.transfer.record.label, e.transfer.record.ranks) for e in self.events)


class StepEvents(Callback):
    """Records what a rank does in its steps.

    Args:
        world: of the rank.
        steps: number of timed steps.
    """

    def __init__(self, world: RehearsedWorld, steps: int) -> None:
        self._log = world.log
        self._steps = steps
        self._done = 0
        self._since: Any = None
        self._windows: list[Window] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = cast(OverlapStrategy, trainer.strategy)
        refuse_uncounted(strategy.modes)
        strategy.stop_comparing()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        check_one_step(self._done, trainer.global_step)
        if trainer.global_step == self._done:
            return  # another batch of the same accumulation window
        self._done = trainer.global_step
        events, clock = self._log.take(), self._log.clock
        if self._done < WARMUP:
            return
        if self._done == WARMUP:
            clock.start()
        now = clock.now()
        if self._done > WARMUP:
            starts = [*(event.start for event in events), now]
            ends = [self._since, *(event.end for event in events)]
            seconds = [clock.read(start) - clock.read(end) for end, start in zip(ends, starts, strict=True)]
            self._windows.append(Window(events, seconds))
        self._since = clock.now()

    def events(self) -> tuple[Compute | Post | Wait, ...]:
        """Returns the step that most of the steps are like, with medians of its times and bytes."""
        ((order, _),) = Counter(window.order for window in reversed(self._windows)).most_common(1)
        alike = [window for window in self._windows if window.order == order]
        result: list[Compute | Post | Wait] = []
        numbers: Counter[tuple[str, tuple[int, ...]]] = Counter()
        posted: set[LoggedTransfer] = set()
        for i, event in enumerate(alike[0].events):
            result.append(Compute(statistics.median(window.seconds[i] for window in alike)))
            record, index = event.transfer.record, event.transfer.index
            if event.is_wait:
                result.append(Wait(index, previous=event.transfer not in posted))
                continue
            posted.add(event.transfer)
            postings = [window.events[i].transfer for window in alike]
            nbytes = statistics.median_low(each.record.nbytes for each in postings)
            received = statistics.median_low(each.received for each in postings)
            number, verb = numbers[record.label, record.ranks], cast(Verb, event.transfer.verb)
            numbers[record.label, record.ranks] += 1
            result.append(Post(index, record.label, number, nbytes, record.ranks, verb, event.transfer.background, received))
        result.append(Compute(statistics.median(window.seconds[-1] for window in alike)))
        return tuple(result)
