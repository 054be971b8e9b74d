"""Announces the error of one rank to all ranks through the world's store.

A rank can read the store while it waits for a transfer, and the store keeps an error for ranks that read it later. The key of an
error contains the number of the attempt: one call of ``fit``, ``validate``, ``test`` or ``predict``. All ranks count attempts alike.
Even numbers mean the time between two attempts.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, and not declared in its __all__

from lightning_overlap.decision import ConfigError
from lightning_overlap.torch_seams import default_store

LONGEST_NAP = 0.5
"""Longest time in seconds between two checks which ranks have written a key."""
CAUSE_FOLLOWS = 2.0
"""Seconds in which a rank announces its error after another rank has heard of it by other ways: it still unwinds its stack."""
STORE_LINGERS = 5.0
"""Longest time in seconds that the process with the store waits after its error, until all ranks have read it."""


class TransferError(RuntimeError):
    """A transfer failed: another rank failed, a peer has ended, the link is down, or the timeout has passed."""


class Announcements:
    """Writes this rank's error into the world's store, and reads the errors of others.

    Attributes:
        attempt: number of the current attempt.
        interval: seconds of waiting for a transfer before the store is read, and between two readings.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.interval = 1.0
        self._error: BaseException | None = None  # that has ended the attempt on this rank
        self._stopped_alike = False  # on all ranks an error in the same line has ended the attempt
        self._announced_in: int | None = None  # attempt whose error other ranks may not have read
        self._world_store: Any = None
        self._store: Any = None

    @property
    def store(self) -> Any:
        """The store, through a separate connection; None before there are process groups."""
        if not dist.is_initialized():
            return None
        world_store = default_store()
        if world_store is not self._world_store:
            base: Any = base_store()
            # A wait of another thread on the world's connection would block this thread. (A FileStore has no connection.)
            has_connection = isinstance(base, TCPStore)
            self._store = base.clone() if has_connection else world_store
            self._world_store = world_store
        return self._store

    def start(self) -> None:
        """Starts an attempt."""
        self.attempt += 1 + self.attempt % 2
        self._error, self._stopped_alike = None, False

    def end(self) -> None:
        """Ends the attempt, after its groups have ended on this rank."""
        self.attempt += self.attempt % 2
        self._error, self._stopped_alike = None, False

    def announce(self, error: BaseException) -> None:
        """Announces this rank's error to all ranks, which raise it when they wait. Only the first announcement counts."""
        self._error = error
        store = self.store
        if store is None:
            return
        self._announced_in = self.attempt
        # If the process with the store has ended, others notice by their connections, and this rank raises the user's error.
        with suppress(dist.DistError):
            store.set(self._key(f"stopped/{dist.get_rank()}"), origin(error))
            store.compare_set(self._key("error"), "", in_words(error))

    def leave(self) -> None:
        """Records that this rank waits for no other rank any more in this attempt."""
        if self.store is not None:
            with suppress(dist.DistError):
                self.store.add(self._key("left"), 1)

    def announced(self) -> Exception | None:
        """Returns the first error that a rank has announced; None without one."""
        store = self.store
        if store is None:
            return None
        try:
            words = store.get(self._key("error")).decode() if store.check([self._key("error")]) else None
        except dist.DistError:  # the process with the store has ended, which transfers report
            return None
        return None if words is None else _from_words(words)

    def cause_of(self, error: BaseException) -> BaseException:
        """The error of another rank that this rank's error follows from, once that rank has announced it; else ``error``."""
        until = time.monotonic() + CAUSE_FOLLOWS
        while follows_from_another(error):
            if (announced := self.announced()) is not None:
                return error if str(announced) == str(error) else announced
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return error

    def look(self) -> None:
        """Raises the error that has ended this attempt, if there is one. Called repeatedly while a rank waits.

        Raises:
            BaseException: the error of this rank.
            ConfigError: another rank has announced one.
            TransferError: another rank has announced another error.
        """
        if self._error is not None:
            raise self._error
        if (error := self.announced()) is not None:
            raise error

    def gather(self, topic: str, value: str, limit: float) -> dict[int, str]:
        """Writes this rank's value and reads the values of all ranks that write theirs within ``limit`` seconds.

        Returns:
            The values by rank.

        Raises:
            Exception: as :meth:`look`.
        """
        store = self.store
        start = time.monotonic()
        keys = [self._key(f"{topic}/{rank}") for rank in range(dist.get_world_size())]
        store.set(keys[dist.get_rank()], value)
        while not (complete := store.check(keys)) and (waited := time.monotonic() - start) < limit:
            self.look()
            time.sleep(min(0.002 + waited / 8, LONGEST_NAP))
        ranks = [rank for rank, key in enumerate(keys) if complete or store.check([key])]
        return dict(zip(ranks, self._read([keys[rank] for rank in ranks]), strict=True))

    def all_stopped_alike(self) -> bool:
        """Whether every rank has stopped by an error in the same line, so that no rank waits for another one.

        The ranks may then continue together, under the number of another attempt.
        """
        store = self.store
        if self._stopped_alike or store is None or self._error is None:
            return self._stopped_alike
        keys = [self._key(f"stopped/{rank}") for rank in range(dist.get_world_size())]
        until = time.monotonic() + STORE_LINGERS
        try:
            while not (complete := store.check(keys)) and time.monotonic() < until:
                time.sleep(0.05)
            alike = complete and len(set(self._read(keys))) == 1
            # The decision of the first rank counts for all.
            decision = store.compare_set(self._key("saves"), "", "together" if alike else "nobody").decode()
        except dist.DistError:
            return False
        self._stopped_alike = decision == "together"
        if self._stopped_alike:
            self.attempt += 2
            self._error = None
        return self._stopped_alike

    def wait_until_heard(self) -> None:
        """Delays the end of the process with the store until all ranks have read this rank's error, or STORE_LINGERS has passed."""
        if self._announced_in is None or dist.get_rank() > 0:
            return
        until = time.monotonic() + STORE_LINGERS
        with suppress(dist.DistError):
            while self.store.add(self._key("left", self._announced_in), 0) < dist.get_world_size() and time.monotonic() < until:
                time.sleep(0.05)

    def _read(self, keys: list[str]) -> list[str]:
        """Returns the values of existing keys, by one request if the store can (a FileStore cannot)."""
        store = self.store
        values = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
        return [value.decode() for value in values]

    def _key(self, topic: str, attempt: int | None = None) -> str:
        # torchrun's agent keeps its store when it restarts the ranks.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"lightning_overlap/{life}/{self.attempt if attempt is None else attempt}/{topic}"


def base_store() -> Any:
    """Returns the world's store without the prefix of its keys."""
    store: Any = default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def follows_from_another(error: BaseException) -> bool:
    """Whether an error reports only a broken connection, so that another rank's error may be its cause."""
    return isinstance(error, TransferError | dist.DistError) or "/gloo/" in str(error)


def origin(error: BaseException) -> str:
    """Returns the file and line that raised an error."""
    at: TracebackType | None = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "unknown" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"


def in_words(error: BaseException) -> str:
    """Returns an error of this rank as text, for :func:`raise_from_words` on other ranks."""
    if isinstance(error, ConfigError):
        return f"ConfigError:{error}"
    rank = dist.get_rank() if dist.is_initialized() else 0
    return f"TransferError:rank {rank} has failed: {type(error).__name__}: {error}"


def raise_from_words(words: str) -> NoReturn:
    """Raises the error of another rank from its text.

    Raises:
        ConfigError: the error was a ConfigError.
        TransferError: the error was of another type.
    """
    raise _from_words(words)


def _from_words(words: str) -> Exception:
    kind, message = words.split(":", 1)
    return ConfigError(message) if kind == "ConfigError" else TransferError(message)
