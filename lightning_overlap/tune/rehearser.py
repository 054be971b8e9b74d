"""Rehearses ranks of worlds that do not exist, in processes of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_overlap.bench.runs import training_arguments
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.world import world_size as running_ranks
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tune.pickles import dumps
from lightning_overlap.tune.rehearsal import Rehearsal
from lightning_overlap.tune.worker import Failure, Task, serve

EXIT_TIMEOUT = 5.0
"""Seconds in which a process must end."""


class RehearsalError(RuntimeError):
    """The user's step fails in a rehearsal, or the process that plays a rank has ended."""


def devices_of_players(device: torch.device, players: int, count: int, *, alone: bool) -> tuple[torch.device, ...]:
    """Returns the device of each process that plays a rank.

    Args:
        device: of this process.
        players: number of processes.
        count: number of CUDA devices that this process sees.
        alone: whether no other rank rehearses on this host. If one may, each rank keeps to its own device.
    """
    if device.type != "cuda" or not alone:
        return (device,) * players
    return tuple(torch.device("cuda", ((device.index or 0) + player) % count) for player in range(players))


class _Traceback(Exception):
    """The traceback of an error in another process, as text."""


class Rehearser:
    """Rehearses layouts one after the other. The processes that play ranks live until :meth:`close`; use it in a ``with`` block.

    They run one at a time, so times are those of a rank that has all of torch's threads for itself. The module and the data must be
    importable from the current folder, and picklable but for local functions.

    Args:
        model: the module; copies of it are trained.
        datamodule: its data, where the module has none of its own.
        strategy: of a Trainer: has the device and the backend.
        trainer: the user's arguments of Trainer, see :class:`lightning_overlap.bench.runs.Runs`.
    """

    def __init__(
        self, model: LightningModule, datamodule: LightningDataModule | None, strategy: OverlapStrategy, trainer: dict[str, Any]
    ) -> None:
        arguments = training_arguments(trainer)
        plugins = arguments.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        arguments["plugins"] = [each for each in plugins if not isinstance(each, ClusterEnvironment)]
        self._run = dumps((model, datamodule, arguments))
        self._device = strategy.root_device
        self._backend = strategy.backend_name
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lightning_overlap.tune.worker"])  # so that a process starts at once
        self._players: list[tuple[Any, Connection]] = []
        self._sessions = 0

    def __enter__(self) -> Rehearser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def rehearse(self, config: OverlapConfig, world_size: int, ranks: Sequence[int] | None = None, steps: int = 2) -> list[Rehearsal]:
        """Rehearses one rank of each pipeline stage.

        Args:
            config: of the run. Its checks of numbers are off.
            world_size: number of ranks.
            ranks: global ranks to play, one of each pipeline stage, each with the same place in its stage; by default the first ones.
            steps: number of timed steps, of which each event's time is the median.

        Returns:
            A rehearsal of each rank.

        Raises:
            ConfigError: the configuration cannot run.
            RehearsalError: the user's step fails, or a process has ended.
            ValueError: ``ranks`` are others than described.
        """
        stages = config.degrees(world_size).pipeline
        played = tuple(range(0, world_size, world_size // stages)) if ranks is None else tuple(ranks)
        if [rank - played[0] for rank in played] != list(range(0, world_size, world_size // stages)):
            raise ValueError(
                f"ranks {list(played)} of {world_size} are not one of each of {stages} stages, with one place in them all"
            )
        self._start(len(played))
        self._sessions += 1
        devices = devices_of_players(self._device, len(played), torch.cuda.device_count(), alone=running_ranks() == 1)
        task = Task(config, world_size, played, devices, self._backend, steps, self._sessions)
        for _, pipe in self._players[: len(played)]:
            pipe.send(task)
        return self._answers(played)

    def _start(self, count: int) -> None:
        """Starts processes, unless there are enough."""
        if len(self._players) >= count:
            return
        self.close()
        turn, inboxes = self._context.Lock(), [self._context.Queue() for _ in range(count)]
        for player in range(count):
            mine, other = self._context.Pipe()
            arguments = (other, player, inboxes, turn, self._run, torch.get_num_threads())
            process = self._context.Process(target=serve, args=arguments, name="rehearsal")
            process.start()
            other.close()
            self._players.append((process, mine))

    def _answers(self, ranks: Sequence[int]) -> list[Rehearsal]:
        answers: dict[int, Rehearsal] = {}
        failures: list[Failure] = []
        missing = {self._players[player][1]: player for player in range(len(ranks))}
        while missing:
            for pipe in wait(list(missing)):
                assert isinstance(pipe, Connection)
                player = missing.pop(pipe)
                try:
                    succeeded, answer = pipe.recv()
                except EOFError:
                    self._kill()
                    raise RehearsalError(
                        f"the process that played rank {ranks[player]} has ended: it had too little memory, or the module's code ends "
                        "the process"
                    ) from None
                if succeeded:
                    answers[player] = answer
                else:
                    failures.append(answer)
        # An error that follows from another player's comes last.
        for failure in sorted(failures, key=lambda failure: failure.follows):
            if failure.is_config_error:
                raise ConfigError(failure.message)
            raise RehearsalError(failure.message) from _Traceback(f"\n{failure.trace}")
        return [answers[player] for player in range(len(ranks))]

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._players:
            pipe.close()
            process.join(EXIT_TIMEOUT)
        self._kill()

    def _kill(self) -> None:
        for process, _ in self._players:
            process.kill()
            process.join()
        self._players.clear()
