"""How ranks come together: each start meets the others within a limit, and what ends one is told to the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from socket import create_connection, gethostname
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, and not declared in its __all__

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.announcements import TransferError, base_store, follows_from_another
from lightning_overlap.ranks.sockets import Sockets
from lightning_overlap.ranks.world import WORLD, patiently

LONGEST = timedelta(days=365)
"""A limit above this one is a mistake: torch counts milliseconds, and wraps."""
LOOK_AGAIN = 0.5
"""Seconds between two attempts to reach the store, and between two looks at who has come."""


def check_limit(name: str, limit: object) -> None:
    """Refuses what is no time to wait.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(limit, timedelta) or not timedelta(0) < limit <= LONGEST:
        raise ConfigError(f"{name} must be a datetime.timedelta of more than 0 and at most {LONGEST.days} days, got {limit!r}")


class FailureListener(Protocol):
    """The strategy, as far as a launcher knows it."""

    attempting: bool
    """Whether a function of the trainer's has been called since the last teardown."""

    def has_failed(self, trainer: Trainer | None) -> None:
        """A function of the trainer's has failed, here or on another rank."""


class Watched:
    """``fit``, or what else the trainer calls, such that all ranks hear of its error before this one does anything about it.

    A class, since a launcher that spawns processes pickles it.

    Args:
        strategy: hears of the error.
        trainer: its trainer.
        function: what is called.
        answers: whether another process waits for what it returns.
    """

    def __init__(
        self, strategy: FailureListener, trainer: Trainer | None, function: Callable[..., Any], *, answers: bool = False
    ) -> None:
        self._strategy = strategy
        self._trainer = trainer
        self._function = function
        self._answers = answers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _one_at_a_time():
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        WORLD.announcements.start()
        self._strategy.attempting = True
        try:
            return self._function(*args, **kwargs)
        except SIGTERMException as error:  # all ranks stop at the same batch
            if self._answers:  # a process that ends well has answered, and the one that started it would wait for that
                raise SystemExit(128 + signal.SIGTERM) from error
            raise
        except _TunerExitException:
            raise
        except BaseException as error:
            told = WORLD.announcements.announced()
            WORLD.announcements.announce(error)
            self._strategy.has_failed(self._trainer)
            if told is not None and follows_from_another(error) and str(told) != str(error):
                raise told from error
            raise
        finally:
            WORLD.announcements.leave()


_running = threading.RLock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two threads' collectives would find each other's on the other ranks. A Trainer inside another one's hook is none at once.

    Raises:
        ConfigError: another thread is inside.
    """
    if not _running.acquire(blocking=False):
        raise ConfigError("another thread of this process runs a Trainer with OverlapStrategy: run one after the other")
    try:
        yield
    finally:
        _running.release()


@contextmanager
def saving_in_step_only(trainer: Trainer) -> Iterator[None]:
    """Callbacks may save when training has failed, which all ranks do together: those that stand elsewhere would take what one sends
    for something else."""
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        if WORLD.announcements.all_stopped_alike():
            save(*args, **kwargs)
        else:
            rank_zero_warn("no checkpoint is saved of training that has failed: not all ranks have failed in the same place")

    trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer.save_checkpoint  # type: ignore[method-assign]


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's, whose function is :class:`Watched`."""

    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, strategy: FailureListener) -> None:
        super().__init__(environment, processes, nodes)
        self._strategy = strategy

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(Watched(self._strategy, trainer, function), *args, trainer=trainer, **kwargs)


class ProcessLauncher(_MultiProcessingLauncher):
    """Lightning's, whose function is :class:`Watched`."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        watched = Watched(self._strategy, trainer, function, answers=True)  # type: ignore[arg-type]
        return super().launch(watched, *args, trainer=trainer, **kwargs)


def start_world(environment: ClusterEnvironment, backend: str, limit: timedelta, timeout: timedelta, device: torch.device) -> None:
    """Makes the world's process group.

    Args:
        environment: tells ranks, and where they meet.
        backend: as in ``init_process_group``.
        limit: how long ranks wait for each other.
        timeout: how long they wait for a transfer from then on.
        device: of this rank.

    Raises:
        ConfigError: ranks disagree about who they are.
        TransferError: they have not met in time.
    """
    rank, size = environment.global_rank(), environment.world_size()
    host, port = environment.main_address, environment.main_port
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # as Lightning leaves them
    # torchrun's agent keeps its store when it starts the ranks again.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", open_store(host, port, rank, size, limit))
    meet_in(store, rank, size, limit)
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    make = partial(dist.init_process_group, backend, store=PrefixStore("default_pg", store), rank=rank, world_size=size, **bound)
    patiently(partial(make, timeout=timeout), limit, f"the {size} ranks have met, and have not all connected")
    store.set_timeout(timeout)
    rank_zero_info(f"lightning_overlap: {size} ranks have met, {backend}")


def open_store(host: str, port: int, rank: int, size: int, limit: timedelta) -> Any:
    """The store that rank 0, or torchrun's agent, keeps."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    if not serves:
        _reach(host, port, limit, f"rank 0 has not opened {where}")
    open_store = partial(TCPStore, host, port, size, serves, limit, wait_for_workers=False, multi_tenant=True)
    return patiently(open_store, limit, f"rank {rank} finds no store at {where}, which may be another program's")


def _reach(host: str, port: int, limit: timedelta, failed: str) -> None:
    """Until somebody listens there: torch's own attempts take longer than their limit."""
    until = time.monotonic() + limit.total_seconds()
    while True:
        with suppress(OSError):
            create_connection((host, port), LOOK_AGAIN).close()
            return
        if time.monotonic() > until:
            raise TransferError(f"{failed} within {limit}: it was not started, or has ended. meeting_timeout is how long others wait")
        time.sleep(LOOK_AGAIN / 5)


def meet_in(store: Any, rank: int, size: int, limit: timedelta) -> None:
    """Until all ranks have written down who they are.

    Raises:
        ConfigError: on those that have come, if ranks disagree.
        TransferError: naming those that have not come.
    """
    until = time.monotonic() + limit.total_seconds()
    place = PrefixStore("lightning_overlap/meeting", store)
    mine = f"{size} ranks, process {os.getpid()} of {gethostname()}"
    first = place.compare_set(f"rank {rank}", "", mine).decode()
    if first != mine:
        place.set("wrong", f"two processes are rank {rank}: {first}, and {mine}: give each a RANK of its own")
    names = [f"rank {other}" for other in range(size)]
    nap = 0.002
    try:
        while True:
            if place.check(["wrong"]):
                raise ConfigError(place.get("wrong").decode())
            complete = place.check(names)  # one question, whatever the number of ranks
            late = time.monotonic() > until
            if complete or late:
                come = [name for name in names if complete or place.check([name])]
                sizes = {name: words.decode().split()[0] for name, words in zip(come, place.multi_get(come), strict=True)}
                if len(set(sizes.values())) > 1:
                    place.set("wrong", f"ranks disagree about WORLD_SIZE: {sizes}. Start all with the same devices and num_nodes")
                    continue
            if complete:
                return
            if late:
                missing = [other for other in range(size) if names[other] not in come]
                raise TransferError(
                    f"ranks {missing} of {size} have not come within {limit}: look for their errors, and start all of them. "
                    "meeting_timeout is how long others wait"
                )
            time.sleep(nap)  # torch's own wait in the store writes a warning each time that it is looked up from
            nap = min(1.5 * nap, LOOK_AGAIN)
    except dist.DistNetworkError as error:
        raise TransferError(f"the process with the store, rank 0 or torchrun's agent, has ended while ranks met: {error}") from error


def keep_store_alive() -> None:
    """The kernel asks after the process with the store, too."""
    store = base_store()
    if isinstance(store, TCPStore):
        connections = Sockets.of_port(store.port)
        connections.keep_alive()
        connections.close()
