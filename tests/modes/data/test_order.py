"""The order of the mode's transfers among the layers' forwards and backwards."""

from datetime import timedelta

import pytest
import torch
from torch import nn

from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.modes.base import Setup
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.plan import resolve
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.strategy.probe import examine

LAYERS = 4


class Recorded:
    """A transfer that arrives at once."""

    def __init__(self, events, name, result):
        self.events, self.name, self.result = events, name, result

    def arrived(self):
        return True

    def wait(self):
        self.events.append(f"wait for {self.name}")
        return self.result


class Recorder:
    """The group of rank 0 of two, of which the other gives zeros."""

    size, rank, ranks, keyed, in_one_order, name = 2, 0, (0, 1), True, False, "recorded"

    def __init__(self, events):
        self.events = events

    def _transfer(self, kind, key, result):
        name = f"{kind} {LAYERS - 1 - key}"  # the last layer is in the first bucket
        self.events.append(name)
        return Recorded(self.events, name, result)

    def reduce_scatter(self, x, bounds, *, key, **_):
        return self._transfer("reduce", key, x[bounds[0] : bounds[1]])

    def all_gather(self, x, bounds, *, key, priority, **_):
        return self._transfer("gather", key, x)

    def share_object(self, mine):
        return mine

    def start_step(self):
        self.events.append("backward starts")


def layer(events, i):
    made = nn.Linear(8, 8, bias=False)

    def tell(what):
        events.append(f"{what} {i}")

    made.register_forward_pre_hook(lambda *_: tell("before"))
    made.register_forward_hook(lambda *_: tell("forward"))
    # before the layer's own gradient is made
    made.register_forward_hook(lambda _, inputs, out: out.register_hook(lambda grad: tell("backward")) and None)
    return made


@pytest.fixture
def make(monkeypatch):
    def make(overlap="auto", pipeline=1, data=None, in_one_order=False, **trainer):
        events = []
        recorder = type("Recorder", (Recorder,), {"in_one_order": in_one_order})
        monkeypatch.setattr(ParallelMesh, "group", lambda *_, **__: recorder(events))
        model = nn.Sequential(*(layer(events, i) for i in range(LAYERS)))
        optimizer = torch.optim.AdamW(model.parameters())
        own = DataParallel(bucket_size=64, **(data or {}))
        config = OverlapConfig(data_parallel=own, pipeline_parallel=PipelineParallel(size=pipeline), overlap=overlap)
        plan = resolve(config, Facts(world_size=2 * pipeline, optimizers=(examine(optimizer),), parameters=256, **trainer))
        setup = Setup(ParallelMesh(plan.degrees, 0), timedelta(seconds=1), roles={}, first_step_is_verified=False)
        mode = DataMode(own, plan.choices["data"], setup)
        mode.parallelize(model)
        mode.prepare_optimizers([optimizer])

        def step(*, hold=False):
            events.clear()
            mode.start_forward()
            if hold:
                with mode.hold_gradient_sync():
                    accumulate(mode, model)
            else:
                accumulate(mode, model)
                events.append("step")
                optimizer.step()
                optimizer.zero_grad()
            return list(events)

        return step

    return make


def accumulate(mode, model):
    loss = model(torch.ones(1, 8)).sum()
    mode.start_backward()
    loss.backward()
    mode.finish_backward()


def test_first_step(make):
    """A layer's gradients are sent, and its update and gather follow, before the layer beneath it is reached."""
    forward = [f"{what} {i}" for i in range(LAYERS) for what in ("before", "forward")]
    backward = [f"{what} {i}" for i in (3, 2, 1, 0) for what in ("backward", "reduce", "wait for reduce", "gather")]
    assert make()() == [*forward, "backward starts", *backward, "step"]


def test_next_forward_waits_where_a_weight_is_read(make):
    step = make()
    step()
    forward = [f"{what} {i}" for i in range(LAYERS) for what in ("before", "wait for gather", "forward")]
    assert step()[: len(forward)] == forward


def test_clipping_keeps_updates_until_all_is_reduced(make):
    events = make(gradient_clip_val=1.0)()
    backward = [f"{what} {i}" for i in (3, 2, 1, 0) for what in ("backward", "reduce", "wait for reduce")]
    # by bucket: the first that forward needs is updated and sent first
    assert events[2 * LAYERS + 1 :] == [*backward, "step", *(f"gather {i}" for i in range(LAYERS))]


@pytest.mark.parametrize("given", [{"pipeline": 2, "data": {"align_param_gather": True}}, {"in_one_order": True}])
def test_gathers_that_are_aligned_start_after_the_step(make, given):
    """Gathers of updates in backward, too, start after the step, in the order of forward. On NCCL, a rank that posted a gather when a
    reduction is complete could post it before the next reduction, and another rank after it."""
    step = make(**given)
    backward = [f"{what} {i}" for i in (3, 2, 1, 0) for what in ("backward", "reduce", "wait for reduce")]
    assert step()[2 * LAYERS + 1 :] == [*backward, "step", *(f"gather {i}" for i in range(LAYERS))]
    assert step()[: 3 * LAYERS] == [f"{what} {i}" for i in range(LAYERS) for what in ("before", "wait for gather", "forward")]


def test_off(make):
    events = make(overlap="off")()
    backward = [f"backward {i}" for i in (3, 2, 1, 0)]
    start = 2 * LAYERS + 1
    assert events[start : start + LAYERS] == backward
    assert sorted(events[start + LAYERS :]) == sorted(
        ["step", *(f"{what} {i}" for i in range(LAYERS) for what in ("reduce", "wait for reduce", "gather", "wait for gather"))]
    )


def test_accumulation_sends_nothing(make):
    step = make()
    assert not [event for event in step(hold=True) if "reduce" in event or "gather" in event]
    assert [event for event in step() if event.startswith("reduce")] == ["reduce 3", "reduce 2", "reduce 1", "reduce 0"]
