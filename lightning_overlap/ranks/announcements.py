"""Why one rank has stopped, told to all ranks through the world's store.

The store answers a rank that stands in the middle of anything, and what was written stays there for one that asks later. An error is
written under the number of the attempt, which is one call of ``fit``, ``validate``, ``test`` or ``predict``: all ranks count alike.
Even numbers are what lies between two attempts.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from lightning_overlap.decision import ConfigError

LONGEST_NAP = 0.5
"""Seconds between two looks at who has come to a place."""
HEARD = 5.0
"""Seconds that the process with the store stays, after its error, for ranks that have not heard of it."""


class TransferError(RuntimeError):
    """A transfer failed: another rank failed, a peer died, the link is cut, or the timeout has passed."""


class _Board:
    """The store, as this process reads and writes it.

    Attributes:
        attempt: its number.
        mine: the error with which this rank has ended it.
        alike: whether all ranks have ended it in the same place.
        left_over: the number of an attempt of which others may not have heard how it ended.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.mine: BaseException | None = None
        self.alike = False
        self.left_over: int | None = None
        self._world: Any = None
        self._store: Any = None

    @property
    def store(self) -> Any:
        """None before there are process groups."""
        if not dist.is_initialized():
            return None
        world = dist.distributed_c10d._get_default_store()
        if world is not self._world:
            base: Any = base_store()
            # A connection of its own: another thread's wait on the world's would hold it. (A FileStore has none to hold.)
            own = isinstance(base, TCPStore)
            self._world, self._store = world, base.clone() if own else world
        return self._store

    def key(self, what: str, attempt: int | None = None) -> str:
        # torchrun's agent keeps its store when it starts the ranks again.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"lightning_overlap/{life}/{self.attempt if attempt is None else attempt}/{what}"


_board = _Board()


def base_store() -> Any:
    """The world's store itself, without the prefix of its keys."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def start() -> None:
    """An attempt starts."""
    _board.attempt += 1 + _board.attempt % 2
    _board.mine, _board.alike = None, False


def end() -> None:
    """It is over, and torn down, on this rank."""
    _board.attempt += _board.attempt % 2
    _board.mine, _board.alike = None, False


def announce(error: BaseException) -> None:
    """Has all ranks know of it, unless they know of an earlier one: whoever waits raises it."""
    _board.mine = error
    store = _board.store
    if store is None:
        return
    _board.left_over = _board.attempt
    # If the process with the store is gone, so are its connections, which the others see; the user's error goes on from here.
    with suppress(dist.DistError):
        store.set(_board.key(f"stopped/{dist.get_rank()}"), place_of(error))
        store.compare_set(_board.key("error"), "", in_words(error))


def leave() -> None:
    """This rank waits for nobody any more in this attempt."""
    if _board.store is not None:
        with suppress(dist.DistError):
            _board.store.add(_board.key("left"), 1)


def announced() -> Exception | None:
    """The first error that a rank has announced."""
    store = _board.store
    if store is None:
        return None
    try:
        words = store.get(_board.key("error")).decode() if store.check([_board.key("error")]) else None
    except dist.DistError:  # the process with the store is gone: its connections tell
        return None
    return None if words is None else _from_words(words)


def look() -> None:
    """To be called by whoever waits.

    Raises:
        BaseException: the one with which this rank has ended the attempt.
        ConfigError: another rank has announced one.
        TransferError: another rank has announced another error.
    """
    if _board.mine is not None:
        raise _board.mine
    if (error := announced()) is not None:
        raise error


def gather(place: str, mine: str, limit: float) -> dict[int, str]:
    """What ranks that come to a place within so many seconds say there, by rank: all, or those that have come.

    Raises:
        Exception: as :func:`look`.
    """
    store = _board.store
    start = time.monotonic()
    keys = [_board.key(f"{place}/{rank}") for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], mine)
    while not (complete := store.check(keys)) and (waited := time.monotonic() - start) < limit:
        look()
        time.sleep(min(0.002 + waited / 8, LONGEST_NAP))
    return {rank: store.get(key).decode() for rank, key in enumerate(keys) if complete or store.check([key])}


def all_stopped_alike() -> bool:
    """Whether every rank has stopped by an error of its own, in the same line, so that nobody has left another one waiting. They may
    then go on together, under another number."""
    store = _board.store
    if _board.alike or store is None or _board.mine is None:
        return _board.alike
    keys = [_board.key(f"stopped/{rank}") for rank in range(dist.get_world_size())]
    until = time.monotonic() + HEARD
    try:
        while not (complete := store.check(keys)) and time.monotonic() < until:
            time.sleep(0.05)
        alike = complete and len({store.get(key) for key in keys}) == 1
        # Whoever decides first decides for all.
        decided = store.compare_set(_board.key("saves"), "", "together" if alike else "nobody").decode()
    except dist.DistError:
        return False
    _board.alike = decided == "together"
    if _board.alike:
        _board.attempt += 2
        _board.mine = None
    return _board.alike


def wait_until_heard() -> None:
    """At the end of the process that has the store, for a moment: it would take this rank's error with it."""
    if _board.left_over is None or dist.get_rank() > 0:
        return
    until = time.monotonic() + HEARD
    with suppress(dist.DistError):
        while _board.store.add(_board.key("left", _board.left_over), 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)


def follows_from_another(error: BaseException) -> bool:
    """Whether it tells of a connection rather than of what has happened here."""
    return isinstance(error, TransferError | dist.DistError) or "/gloo/" in str(error)


def place_of(error: BaseException) -> str:
    """The line that has raised it."""
    at: TracebackType | None = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "nowhere" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"


def in_words(error: BaseException) -> str:
    """A rank's error for the others, which call :func:`raise_from_words`."""
    if isinstance(error, ConfigError):
        return f"ConfigError:{error}"
    rank = dist.get_rank() if dist.is_initialized() else 0
    return f"TransferError:rank {rank} has failed: {type(error).__name__}: {error}"


def raise_from_words(words: str) -> NoReturn:
    """Raises:
    ConfigError: it was one.
    TransferError: it was another error.
    """
    raise _from_words(words)


def _from_words(words: str) -> Exception:
    kind, told = words.split(":", 1)
    return ConfigError(told) if kind == "ConfigError" else TransferError(told)
