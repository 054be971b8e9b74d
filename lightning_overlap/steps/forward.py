"""The state that modes keep for one forward. Two forwards can be under way: each has its own state, also in backward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

State = TypeVar("State")


class Forward:
    """The state of all modes for one forward of the user's model and its backward.

    Attributes:
        in_backward: whether the backward runs. Activation checkpoints then run parts of the forward again.
    """

    def __init__(self) -> None:
        self.in_backward = False
        self._states: dict[type, Any] = {}

    def of(self, kind: type[State]) -> State:
        """Returns the state of one type, a mode's dataclass with defaults. The first call creates it."""
        if kind not in self._states:
            self._states[kind] = kind()
        return self._states[kind]

    def branch(self) -> Forward:
        """Returns a forward with copies of this one's states."""
        branch = Forward()
        branch.in_backward = self.in_backward
        branch._states = {kind: copy.copy(state) for kind, state in self._states.items()}
        return branch


class Forwards:
    """Finds the forward for which a hook is called.

    Each thread computes one forward at a time. Backward runs in the thread that calls it or, on CUDA, in a thread of autograd. Such a
    thread computes no forward, so there the forward is the one whose backward runs. One backward runs at a time.
    """

    def __init__(self) -> None:
        self._threads = threading.local()
        self._in_backward: Forward | None = None

    @property
    def current(self) -> Forward:
        """The forward that this thread computes, or whose backward it runs."""
        current: Forward | None = getattr(self._threads, "forward", None) or self._in_backward
        if current is None:
            # Not stored as ``forward``: a thread of autograd outlives the backward, and must find the forward of the next one.
            current = getattr(self._threads, "unstarted", None)
        if current is None:
            current = self._threads.unstarted = Forward()
        return current

    def start(self) -> Forward:
        """Starts a new forward in this thread."""
        self._threads.forward = Forward()
        return self._threads.forward

    @contextmanager
    def running(self, forward: Forward) -> Iterator[None]:
        """Inside, this thread computes ``forward``."""
        before = getattr(self._threads, "forward", None)
        self._threads.forward = forward
        try:
            yield
        finally:
            self._threads.forward = before

    def start_backward(self) -> None:
        """Marks the start of the backward of this thread's forward."""
        self._in_backward = self.current
        self._in_backward.in_backward = True

    def finish_backward(self) -> None:
        """Marks the end of the backward that was started last."""
        if self._in_backward is not None:
            self._in_backward.in_backward = False
        self._in_backward = None

    @contextmanager
    def backward(self, forward: Forward) -> Iterator[None]:
        """Inside, this thread runs the backward of ``forward``."""
        outer, was_in_backward = self._in_backward, forward.in_backward
        with self.running(forward):
            self.start_backward()
            try:
                yield
            finally:
                forward.in_backward, self._in_backward = was_in_backward, outer
