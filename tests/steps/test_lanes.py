"""Lanes: who runs when, what each lane has for itself, and how errors end both."""

import contextvars
import threading
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_overlap.profiling.flops import FlopCount
from lightning_overlap.ranks.clock import Clock, Timeline
from lightning_overlap.ranks.transfer import Arrived, Pending, Transfer
from lightning_overlap.steps.lanes import Lane, LaneCancelled, Lanes
from lightning_overlap.steps.named_schedules import build
from lightning_overlap.steps.pairs import pair
from lightning_overlap.steps.runner import Runner
from lightning_overlap.steps.schedule import parse


@pytest.fixture
def lanes():
    lanes = Lanes()
    yield lanes
    lanes.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "backward lane"]


def run(lanes, forward, backward, timeline=None):
    lanes.run(Lane("F0.1", forward), Lane("B0.0", backward), timeline)


def test_lanes_alternate_from_wait_to_wait_and_the_longer_one_ends_alone(lanes):
    events: list[str] = []

    def lane(name, waits):
        def go():
            for number in range(waits):
                events.append(f"{name}{number}")
                lanes.hand_over()
            events.append(f"{name} ends")

        return go

    run(lanes, lane("f", 2), lane("b", 4))
    assert events == ["f0", "b0", "f1", "b1", "f ends", "b2", "b3", "b ends"]
    events.clear()
    run(lanes, lane("f", 3), lane("b", 0))
    assert events == ["f0", "b ends", "f1", "f2", "f ends"]
    lanes.hand_over()  # outside of a pair


class Counts(TorchFunctionMode):
    def __init__(self):
        self.calls = []
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((threading.current_thread().name, function))
        return function(*args, **(kwargs or {}))


def test_each_lane_has_its_random_numbers_and_the_backward_has_what_the_caller_has(lanes):
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("caller's")
    told: dict[str, Any] = {}

    def draws(seed, waits):
        def go():
            torch.manual_seed(seed)
            torch.set_default_dtype(torch.float64 if seed == 1 else torch.float32)
            told[f"numbers {seed}"] = []
            for _ in range(3):
                if waits:
                    lanes.hand_over()
                told[f"numbers {seed}"].append((torch.rand(()).item(), torch.get_default_dtype()))
            torch.set_default_dtype(torch.float32)

        return go

    def backward():
        told["variable"] = variable.get()
        variable.set("backward's")
        told["grad"], told["autocast"] = torch.is_grad_enabled(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        draws(2, True)()

    with Counts() as mode, FlopCount() as count, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(lanes, draws(1, True), backward)
    assert {name for name, _ in mode.calls} == {threading.current_thread().name, "backward lane"}
    assert count.flops == 2 * 2 * 2 * 2, "the backward's product"
    assert (told.pop("variable"), variable.get()) == ("caller's", "caller's")
    assert (told.pop("grad"), told.pop("autocast")) == (False, torch.bfloat16)
    beside = dict(told)
    run(lanes, draws(1, False), lambda: None)
    run(lanes, lambda: None, draws(2, False))
    assert beside == told


def test_an_error_of_a_lane_ends_the_other_and_is_raised(lanes):
    ended = []

    def waiting(name):
        def go():
            try:
                while True:
                    try:
                        lanes.hand_over()
                    except Exception:
                        ended.append("an Exception")
            except LaneCancelled:
                ended.append(name)
                raise

        return go

    def failing(error):
        def go():
            lanes.hand_over()
            raise error

        return go

    with pytest.raises(ZeroDivisionError):
        run(lanes, failing(ZeroDivisionError()), waiting("backward"))
    with pytest.raises(KeyboardInterrupt):
        run(lanes, waiting("forward"), failing(KeyboardInterrupt()))
    assert ended == ["backward", "forward"]
    done = []
    run(lanes, lambda: done.append("forward"), lambda: done.append("backward"))
    assert done == ["forward", "backward"]


def test_an_interrupt_of_the_caller_that_waits_for_its_turn_ends_both(lanes, monkeypatch):
    """As Ctrl-C does, which Python raises in the main thread, in whatever it waits."""
    began, ended = threading.Event(), threading.Event()

    class Interrupted:
        """The lock of the forward's turn, whose wait is interrupted while the backward computes."""

        def __init__(self, lock):
            self._lock = lock
            self.release, self.locked = lock.release, lock.locked

        def acquire(self):
            began.wait()
            raise KeyboardInterrupt

    def forward():
        pair, _ = lanes._local.place
        pair.turns = (Interrupted(pair.turns[0]), pair.turns[1])
        lanes.hand_over()

    def backward():
        began.set()
        try:
            while True:
                lanes.hand_over()
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        run(lanes, forward, backward)
    assert ended.is_set()


def test_spans_are_the_turns(lanes):
    timeline = Timeline(Clock())

    def lane():
        lanes.hand_over()

    run(lanes, lane, lane, timeline)
    spans = timeline.take()
    assert [name for name, *_ in spans] == ["F0.1", "B0.0", "F0.1", "B0.0"]
    assert all(end <= start for (_, _, end), (_, start, _) in pairwise(spans))


def test_cpu_time_of_the_backward_counts_as_that_of_the_main_thread(lanes):
    clock = Clock()
    seconds = []

    def backward():
        start = time.thread_time()
        torch.rand(300, 300) @ torch.rand(300, 300)
        seconds.append(time.thread_time() - start)

    run(lanes, lambda: None, backward, Timeline(clock))
    assert clock.ran() - time.thread_time() >= seconds[0]


class Exchange(torch.autograd.Function):
    """A transfer of a mode: posted and waited for, forward and backward."""

    @staticmethod
    def forward(ctx, x, group, name):
        ctx.group, ctx.name = group, name
        return group.exchange(x, name)

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.exchange(grad, f"{ctx.name}'"), None, None


class Recorder:
    """A group that records what it posts, and the waits."""

    def __init__(self, lanes):
        self.lanes, self.events = lanes, []

    def exchange(self, x, name):
        self.events.append(f"post {name}")
        transfer = Transfer(name, 0, 0, (0,), 0.0)
        pending = Pending(transfer, Arrived(), x.clone, self.lanes.hand_over)
        result = pending.wait()
        self.events.append(f"waited {name}")
        assert pending.wait() is result  # a second wait hands over no more
        return result


class Model:
    """The compute of a schedule: two layers with a transfer after each, dropout, activation checkpoints if ``recompute``."""

    def __init__(self, group, recompute):
        torch.manual_seed(0)
        self.layers = [nn.Linear(4, 4) for _ in range(2)]
        self.group, self.recompute = group, recompute
        self._losses: dict[int, torch.Tensor] = {}

    def _layer(self, number, microbatch, x):
        y = torch.nn.functional.dropout(self.layers[number](x), 0.5)
        return Exchange.apply(y, self.group, f"{microbatch}.{number}")

    def forward(self, stage, microbatch, inputs):
        torch.manual_seed(microbatch)
        x = torch.randn(3, 4)
        for number in range(2):
            run = checkpoint if self.recompute else lambda f, *args, **_: f(*args)
            x = run(self._layer, number, microbatch, x, use_reentrant=False)
        self._losses[microbatch] = x.square().mean()

    def backward(self, action, gradients):
        self._losses.pop(action.microbatch).backward()
        return []


@pytest.mark.parametrize("recompute", [False, True])
def test_pairs_of_a_schedule_have_the_bits_of_single_actions(lanes, recompute):
    schedule = pair(build("1f1b", 1, 1, 4))
    gradients, events = [], []
    for beside in (lanes, None):
        model = Model(Recorder(lanes), recompute)
        Runner(schedule, 0).run(model, lanes=beside)
        gradients.append([layer.weight.grad for layer in model.layers])
        events.append(model.group.events)
    assert all(map(torch.equal, *gradients))
    assert sorted(events[0]) == sorted(events[1])


def test_what_the_forward_posts_travels_while_the_backward_computes(lanes):
    model = Model(Recorder(lanes), False)
    Runner(parse("F0.0 F0.1|B0.0 B0.1"), 0).run(model, lanes=lanes)
    events = model.group.events
    assert events[4:] == [
        *("post 1.0", "post 0.1'", "waited 1.0", "post 1.1", "waited 0.1'", "post 0.0'", "waited 1.1", "waited 0.0'"),
        *("post 1.1'", "waited 1.1'", "post 1.0'", "waited 1.0'"),
    ]
