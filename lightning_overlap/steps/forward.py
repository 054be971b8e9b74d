"""The state of one forward, so that two forwards can be under way: each has its own, in hooks as in backward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

State = TypeVar("State")


class Forward:
    """What modes remember during one forward of the user's model and its backward.

    Attributes:
        in_backward: whether its backward runs, in which activation checkpoints run parts of the forward again.
    """

    def __init__(self) -> None:
        self.in_backward = False
        self._states: dict[type, Any] = {}

    def of(self, kind: type[State]) -> State:
        """The forward's state of a kind (a mode's dataclass with defaults), which is made when it is asked for first."""
        if kind not in self._states:
            self._states[kind] = kind()
        return self._states[kind]

    def branch(self) -> Forward:
        """A forward that starts from copies of this one's states, and leaves this one as it is."""
        made = Forward()
        made.in_backward = self.in_backward
        made._states = {kind: copy.copy(state) for kind, state in self._states.items()}
        return made


class Forwards:
    """Tells hooks which forward they are called for.

    Each thread computes one forward at a time. Backward runs in the thread that calls it, or, on CUDA, in a thread of autograd's,
    which knows no forward of its own: there it is the one whose backward runs. One backward runs at a time.
    """

    def __init__(self) -> None:
        self._threads = threading.local()
        self._in_backward: Forward | None = None

    @property
    def current(self) -> Forward:
        """The forward that this thread computes, or whose backward it runs."""
        current: Forward | None = getattr(self._threads, "forward", None) or self._in_backward
        if current is None:
            # Kept apart from those that were started: a thread of autograd's lives on, and must ask for the next backward's forward.
            current = getattr(self._threads, "unstarted", None)
        if current is None:
            current = self._threads.unstarted = Forward()
        return current

    def start(self) -> Forward:
        """From here on this thread computes a new forward."""
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
        """The backward of this thread's forward starts."""
        self._in_backward = self.current
        self._in_backward.in_backward = True

    def finish_backward(self) -> None:
        """The backward that was started last is over."""
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
