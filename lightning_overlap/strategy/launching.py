"""Launchers of processes whose errors reach all ranks, and the check of a limit of time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.world import WORLD
from lightning_overlap.strategy.seams import MultiProcessingLauncher, SubprocessScriptLauncher, TunerExit

LONGEST = timedelta(days=365)
"""A limit above this one is a mistake: torch counts milliseconds, and wraps."""


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
        except TunerExit:
            raise
        except BaseException as error:
            cause = WORLD.announcements.cause_of(error)
            WORLD.announcements.announce(error)
            self._strategy.has_failed(self._trainer)
            if cause is not error:
                raise cause from error
            raise
        finally:
            WORLD.announcements.leave()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two threads' collectives would find each other's on the other ranks. A Trainer inside another one's hook is none at once.

    Raises:
        ConfigError: another thread is inside.
    """
    if not WORLD.trainer_lock.acquire(blocking=False):
        raise ConfigError("another thread of this process runs a Trainer with OverlapStrategy: run one after the other")
    try:
        yield
    finally:
        WORLD.trainer_lock.release()


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
        del trainer.save_checkpoint


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's, whose function is :class:`Watched`."""

    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, strategy: FailureListener) -> None:
        super().__init__(environment, processes, nodes)
        self._strategy = strategy

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(Watched(self._strategy, trainer, function), *args, trainer=trainer, **kwargs)


class ProcessLauncher(MultiProcessingLauncher):
    """Lightning's, whose function is :class:`Watched`."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        watched = Watched(self._strategy, trainer, function, answers=True)  # type: ignore[arg-type]
        return super().launch(watched, *args, trainer=trainer, **kwargs)
