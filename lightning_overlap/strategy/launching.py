"""Process launchers that announce an error to all ranks, and the check of a time limit."""

from __future__ import annotations

import signal
import sys
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
"""Longest time limit: torch counts milliseconds, and longer limits overflow."""


def check_limit(name: str, limit: object) -> None:
    """Refuses a value that is not a time limit.

    Raises:
        ConfigError: the value is not a ``timedelta``, or out of range.
    """
    if not isinstance(limit, timedelta) or not timedelta(0) < limit <= LONGEST:
        raise ConfigError(f"{name} must be a datetime.timedelta of more than 0 and at most {LONGEST.days} days, got {limit!r}")


def refuse_scripts_of_notebook(processes: int) -> None:
    """Refuses to start a notebook again for each rank. Lightning would refuse it, and advise its own strategy.

    Raises:
        ConfigError: Python is interactive, and several processes are asked for.
    """
    if processes > 1 and (hasattr(sys, "ps1") or sys.flags.interactive):
        raise ConfigError(
            f"a notebook or an interactive session cannot be started again for {processes} processes. Use "
            "OverlapStrategy(start_method='fork') or strategy='overlap_notebook', which copy this process, or devices=1; or run a "
            "script"
        )


class FailureListener(Protocol):
    """The part of the strategy that a launcher uses."""

    launched: bool
    """Whether a launched function (``fit``, ...) has been called since the last teardown."""

    def note_failure(self, trainer: Trainer | None) -> None:
        """Called when a launched function has failed, on this rank or on another one."""


class Watched:
    """Calls a launched function (``fit``, ...), and announces its error to all ranks before this rank handles it.

    A class, because a launcher that spawns processes pickles it.

    Args:
        strategy: is notified of the error.
        trainer: of the strategy.
        function: the launched function.
        answers: whether another process waits for the result.
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
        self._strategy.launched = True
        try:
            return self._function(*args, **kwargs)
        except SIGTERMException as error:  # all ranks stop at the same batch
            if self._answers:  # the parent waits for the result of a process that ends with 0
                raise SystemExit(128 + signal.SIGTERM) from error
            raise
        except TunerExit:
            raise
        except BaseException as error:
            cause = WORLD.announcements.cause_of(error)
            WORLD.announcements.announce(error)
            self._strategy.note_failure(self._trainer)
            if cause is not error:
                raise cause from error
            raise
        finally:
            WORLD.announcements.leave()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Refuses a second thread, whose collectives could match the first one's on other ranks. A Trainer inside a hook is allowed.

    Raises:
        ConfigError: another thread runs a Trainer.
    """
    if not WORLD.trainer_lock.acquire(blocking=False):
        raise ConfigError("another thread of this process runs a Trainer with OverlapStrategy. Run one Trainer at a time")
    try:
        yield
    finally:
        WORLD.trainer_lock.release()


@contextmanager
def saving_in_step_only(trainer: Trainer) -> Iterator[None]:
    """Inside, a checkpoint is saved only if all ranks stopped at the same point: otherwise its transfers could match others."""
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        if WORLD.announcements.all_stopped_alike():
            save(*args, **kwargs)
        else:
            rank_zero_warn("no checkpoint of the failed training is saved, because the ranks have not all failed at the same point")

    trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer.save_checkpoint


class ScriptLauncher(SubprocessScriptLauncher):
    """Lightning's launcher of scripts, with a :class:`Watched` function."""

    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, strategy: FailureListener) -> None:
        super().__init__(environment, processes, nodes)
        self._strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        return self.num_processes == 1  # it starts no other process

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(Watched(self._strategy, trainer, function), *args, trainer=trainer, **kwargs)


class ProcessLauncher(MultiProcessingLauncher):
    """Lightning's launcher of processes, with a :class:`Watched` function."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        watched = Watched(self._strategy, trainer, function, answers=True)  # type: ignore[arg-type]
        return super().launch(watched, *args, trainer=trainer, **kwargs)
