"""Two lanes: the forward of one microbatch and the backward of another run as two threads, which hand over wherever one would wait.

    forward     compute, post | wait ...... compute, post | wait ......
    backward                  | compute, post ...........| compute ...

A transfer of one lane travels while the other lane computes, whatever mode has posted it. One lane runs at a time, and hands over at
every wait, also where the transfer has arrived. So the order of all posts and waits is the same on all ranks, which transfers that are
matched by their order need; and every sum is the one that is computed without lanes.

The forward stays in the caller's thread, since it runs the user's code. Two forwards are no pair: a module may keep a tensor on itself
until the loss is computed, and the other forward would replace it. In one process they would gain nothing either: a forward hides more
beside a backward. Two backwards are no pair, because on CUDA a device has one thread for all of them.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.torch_seams import dispatch_modes, function_modes, running_dispatch_mode, running_function_mode

FORWARD, BACKWARD = 0, 1
"""The numbers of the lanes. The forward has the first turn: what it posts travels while the backward computes."""
EXIT_TIMEOUT = 2.0
"""Seconds in which the thread must end. After a failure it may be in a transfer that only ends with its group."""


class LaneCancelled(BaseException):
    """Ends a lane, because the other one has failed. Not an ``Exception``, which the user's code may catch."""


@dataclass(frozen=True)
class Lane:
    """What a lane runs.

    Attributes:
        name: of its spans in a timeline, such as ``F0.1``.
        run: the function.
    """

    name: str
    run: Callable[[], None]


class _ProcessState:
    """State of the process that each lane has for itself: torch's random numbers, the default dtype, no weights cast by autocast.

    Python's and NumPy's generators are left alone. A backward draws from them only where an activation checkpoint runs code again,
    and there the numbers differ from those of the forward anyway.
    """

    def __init__(self) -> None:
        self._numbers = torch.default_generator.get_state()
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        torch.default_generator.set_state(self._numbers)
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
        torch.clear_autocast_cache()  # the other lane may have cast weights without gradients


def _turns() -> tuple[threading.Lock, threading.Lock]:
    turns = threading.Lock(), threading.Lock()
    for turn in turns:
        turn.acquire()
    return turns


@dataclass
class _Pair:
    """Two lanes under way.

    Attributes:
        lanes: the forward and the backward.
        timeline: records the spans in which each lane computes.
        turns: by lane, a lock that the other lane releases to give it the turn.
        ended: by lane, whether it has ended.
        backward_ended: set when the backward has ended, in its thread.
        error: the first error of either lane.
        start: the process's state when both start.
    """

    lanes: tuple[Lane, Lane]
    timeline: Timeline | None
    turns: tuple[threading.Lock, threading.Lock] = field(default_factory=_turns)
    ended: list[bool] = field(default_factory=lambda: [False, False])
    backward_ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    start: _ProcessState = field(default_factory=_ProcessState)

    @contextmanager
    def computing(self, lane: int) -> Iterator[None]:
        """Records what is inside as a span of the lane."""
        with nullcontext() if self.timeline is None else self.timeline.during(self.lanes[lane].name):
            yield

    def give_turn(self, lane: int) -> None:
        """Lets the other lane than ``lane`` run, if it waits for its turn. After an interrupt it may run already."""
        if self.turns[1 - lane].locked():
            self.turns[1 - lane].release()

    def take_turn(self, lane: int) -> None:
        """Waits for the turn of ``lane``.

        Raises:
            LaneCancelled: the other lane has failed.
        """
        self.turns[lane].acquire()
        if self.error is not None:
            raise LaneCancelled

    def fail(self, error: BaseException) -> None:
        """Keeps the first error. The other lane ends where it next hands over."""
        self.error = self.error or error


class Lanes:
    """Runs pairs of lanes, the second one in a thread that lives until :meth:`close`. See the module's docstring."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, forward: Lane, backward: Lane, timeline: Timeline | None = None) -> None:
        """Runs two lanes to their ends; the forward begins, in the caller's thread.

        The backward has the caller's context variables, function and dispatch modes, autocast, grad mode, random numbers and default
        dtype.

        Args:
            forward: the first lane.
            backward: the second lane.
            timeline: records the spans in which each lane computes, from turn to turn.

        Raises:
            BaseException: the first error of a lane. The other lane has ended, too.
        """
        pair = _Pair((forward, backward), timeline)
        self._start_thread()
        self._work.put(_inheriting(lambda: self._run_lane(pair, BACKWARD)))
        self._run_lane(pair, FORWARD)
        try:
            pair.backward_ended.wait()
        except BaseException as error:  # an interrupt
            pair.fail(error)
            pair.backward_ended.wait()
        if pair.error is not None:
            try:
                raise pair.error
            finally:
                del pair  # which the error's traceback would keep, and the pair the error

    def hand_over(self) -> None:
        """Lets the other lane run until it hands over or ends. Outside of a pair it does nothing. Called before each wait.

        Raises:
            LaneCancelled: the other lane has failed.
        """
        if (place := getattr(self._local, "place", None)) is None:
            return
        pair, lane = place
        if pair.error is not None:
            raise LaneCancelled
        if pair.ended[1 - lane]:
            return
        state = _ProcessState()
        self._local.spans.close()
        pair.give_turn(lane)
        pair.take_turn(lane)
        self._local.spans.enter_context(pair.computing(lane))
        state.restore()

    def _run_lane(self, pair: _Pair, lane: int) -> None:
        """Runs a lane of a pair. Its error is kept in the pair."""
        self._local.place, self._local.spans = (pair, lane), ExitStack()
        cpu_start = time.thread_time()
        try:
            if lane == BACKWARD:
                pair.take_turn(lane)
                pair.start.restore()
            with self._local.spans as spans:
                spans.enter_context(pair.computing(lane))
                pair.lanes[lane].run()
        except BaseException as error:
            pair.fail(error)
        finally:
            del self._local.place, self._local.spans
            if lane == BACKWARD and pair.timeline is not None:  # the main thread waits meanwhile: it counts as its own
                pair.timeline.clock.lane_seconds += time.thread_time() - cpu_start
            pair.ended[lane] = True
            pair.give_turn(lane)
            if lane == BACKWARD:
                pair.backward_ended.set()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="backward lane", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # what it holds is free before the next pair

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(EXIT_TIMEOUT)
            self._thread = None


def _inheriting(function: Callable[[], None]) -> Callable[[], None]:
    """A function that does the same in another thread, with what this thread has for itself."""
    context = contextvars.copy_context()
    modes = [*map(running_function_mode, function_modes()), *map(running_dispatch_mode, dispatch_modes())]
    grad, autocast, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run() -> None:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(torch.autocast("cpu", dtype=dtype, enabled=autocast))
            function()

    return lambda: context.run(run)
