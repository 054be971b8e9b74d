"""A rehearsed rank posts and waits for the transfers that the rank of a real world posts and waits for, and holds as much memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, DataParallel, OverlapStrategy, PipelineParallel
from lightning_overlap.bench.runs import Runs, without_checks
from lightning_overlap.ranks.transfer import Transfer
from lightning_overlap.tune.memory import Memory, StepMemory
from lightning_overlap.tune.rehearsal import Compute, Post, Rehearsal, Wait
from lightning_overlap.tune.rehearser import RehearsalError, Rehearser, devices_of_players
from lightning_overlap.tune.worker import WARMUP
from tests.trainer.expert.fits import Hugging

PIPELINE = {"pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, microbatches=4)}
LANES = {"pipeline_parallel": PipelineParallel(size=2, microbatches=4, lanes=True)}
TENSOR, CONTEXT, EXPERT = ({f"{name}_parallel": 2} for name in ("tensor", "context", "expert"))
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "pipeline, interleaved": (2, PIPELINE),
    "pipeline x tensor, lanes": (4, {**LANES, **TENSOR}),
    "data": (4, {}),
    "tensor x data": (4, {**TENSOR, "data_parallel": DataParallel(bucket_size=65_536)}),
    "context x data": (4, CONTEXT),
    "expert x data": (4, EXPERT),
}
TIMED = 2
TRAINER = {"accelerator": "cpu", "gradient_clip_val": 0.5}


class Tokens(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        samples: Any = torch.randint(1, 64, (160, 12), generator=torch.Generator().manual_seed(3))
        return DataLoader(samples, batch_size=4)


def model() -> LightningModule:
    torch.manual_seed(1)
    return Hugging("mixtral", "adamw", num_hidden_layers=4)


class Event(NamedTuple):
    """A post or a wait; of a transfer in the step, ``number`` counts those of its label between its ranks."""

    kind: str
    label: str
    ranks: tuple[int, ...]
    number: int
    nbytes: int


class Log(Callback):
    """Keeps the transfers of all modes, and the times at which steps end."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for mode in trainer.strategy.modes:  # type: ignore[attr-defined]
            for group in mode.groups:
                group.log = self.transfers

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def events(self, step: int) -> list[Event]:
        """The events of one step, in their order."""
        start, end = self.ends[step - 1 : step + 1]
        transfers = [t for t in self.transfers if len(t.ranks) > 1]
        timed = [(t.posted, "post", t) for t in transfers if start <= t.posted < end]
        timed += [(t.waited[0], "wait", t) for t in transfers if t.waited is not None and start <= t.waited[0] < end]
        numbers: Counter[Any] = Counter()
        events = []
        for _, kind, t in sorted(timed, key=lambda each: each[0]):
            events.append(Event(kind, t.label, t.ranks, numbers[kind, t.label, t.ranks], t.nbytes))
            numbers[kind, t.label, t.ranks] += 1
        return events


def real(strategy: dict[str, Any]) -> tuple[list[Event], Memory]:
    """Trains as a rank of the world."""
    made = OverlapStrategy(**strategy, process_group_backend="gloo")
    runs = Runs(model(), Tokens(), made, {**TRAINER, "plugins": [TorchElasticEnvironment()]})
    log, memory = Log(), StepMemory(WARMUP - 1)
    size = torch.distributed.get_world_size()
    runs.fit(runs.ours(**without_checks(made.config)), WARMUP + TIMED, [log, memory], devices=size)
    assert memory.memory is not None
    return log.events(WARMUP + 1), memory.memory


def rehearsed(rehearsal: Rehearsal) -> list[Event]:
    """The events of the modes' transfers."""
    posts = {event.transfer: event for event in rehearsal.events if isinstance(event, Post)}
    numbers: Counter[Any] = Counter()
    events = []
    for event in rehearsal.events:
        if isinstance(event, Compute):
            continue
        post = posts[event.transfer]
        kind = "wait" if isinstance(event, Wait) else "post"
        if "." in post.label:  # else it is a blocking transfer, which a group does not log
            events.append(Event(kind, post.label, post.ranks, numbers[kind, post.label, post.ranks], post.nbytes))
            numbers[kind, post.label, post.ranks] += 1
    return events


@pytest.fixture(scope="module")
def rehearser() -> Iterator[Rehearser]:
    strategy = OverlapStrategy()
    Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with Rehearser(model(), Tokens(), strategy, TRAINER) as made:
        yield made


def sequences(events: Sequence[Event]) -> dict[str, list[Any]]:
    """The order of events, apart where it depends on what has arrived: a bucket is updated as soon as its sum has come."""
    apart: dict[str, list[Any]] = {}
    for event in events:
        mode, _, name = event.label.partition(".")
        key = f"{event.kind} {name.partition('[')[0]}" if mode == "data" else "all other modes"
        apart.setdefault(key, []).append(event[:4])
    return apart


@pytest.mark.parametrize("case", CASES)
def test_as_in_a_real_world(world: Any, rehearser: Rehearser, case: str) -> None:
    size, strategy = CASES[case]
    config = OverlapStrategy(**strategy).config
    ranks = world(size).run(real, strategy)
    rehearsals = rehearser.rehearse(config, size, steps=TIMED)
    for rehearsal in rehearsals:
        events, memory = ranks[rehearsal.rank]
        assert len(events) > 5
        assert sequences(rehearsed(rehearsal)) == sequences(events)
        by_routing = [event for event in events if event.label.startswith(("expert.dispatch", "expert.combine"))]
        nbytes = {event[:4]: event.nbytes for event in events if event not in by_routing}
        assert {event[:4]: event.nbytes for event in rehearsed(rehearsal) if event[:4] in nbytes} == nbytes
        assert (rehearsal.memory.weights, rehearsal.memory.gradients) == (memory.weights, memory.gradients)
        assert rehearsal.memory.optimizer == memory.optimizer
        assert rehearsal.memory.activations == pytest.approx(memory.activations, rel=0.1)
        assert rehearsal.memory.buffers == pytest.approx(memory.buffers, rel=0.5)  # as many as transfers are under way at one time


EVERYTHING = {**TENSOR, **CONTEXT, "expert_parallel": 4, "pipeline_parallel": PipelineParallel(size=2, microbatches=2)}


def test_a_world_that_does_not_fit_on_the_machine(rehearser: Rehearser) -> None:
    first, second = rehearser.rehearse(OverlapStrategy(**EVERYTHING).config, 16, ranks=[5, 13], steps=1)
    assert [(each.rank, each.stage, each.world_size) for each in (first, second)] == [(5, 0, 16), (13, 1, 16)]
    groups = {event.label.partition("[")[0]: event.ranks for event in first.events if isinstance(event, Post)}
    assert groups["tensor.input"] == (4, 5)
    assert groups["context.pieces"] == (5, 7)
    assert groups["expert.dispatch"] == (4, 5, 6, 7)
    assert groups["data.grads"] in ((1, 3, 5, 7), (1, 5))  # of weights, and of experts
    assert (groups["pipeline.forward"], groups["pipeline.backward"]) == ((5, 13), (13, 5))
    sent = [(each.label, each.nbytes) for each in first.events if isinstance(each, Post) and each.verb == "send"]
    received = [(each.label, each.received) for each in second.events if isinstance(each, Post) and each.verb == "receive"]
    assert sent == received


def test_players_have_devices():
    cpu, third = torch.device("cpu"), torch.device("cuda", 3)
    assert devices_of_players(cpu, 2, 0, alone=True) == (cpu, cpu)
    assert devices_of_players(third, 2, 4, alone=False) == (third, third), "the other devices are the other ranks'"
    on_paper = devices_of_players(torch.device("cuda", 0), 3, 2, alone=True)
    assert on_paper == (torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 0))


class Failing(Tokens):
    def train_dataloader(self) -> DataLoader[Tensor]:
        raise OSError("the disk is gone")


def test_errors_reach_the_caller_and_the_next_layout_is_rehearsed(rehearser: Rehearser) -> None:
    impossible = {**TENSOR, "pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, schedule="dualpipev", microbatches=4)}
    with pytest.raises(ConfigError, match="the schedule dualpipev splits backward"):
        rehearser.rehearse(OverlapStrategy(**impossible).config, 4)
    with pytest.raises(ValueError, match=r"ranks \[0, 1\] of 2 are not one of each of 1 stages"):
        rehearser.rehearse(OverlapStrategy().config, 2, ranks=[0, 1])
    (rehearsal,) = rehearser.rehearse(OverlapStrategy().config, 2, steps=1)
    assert rehearsal.seconds > 0
    strategy = OverlapStrategy()
    Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with Rehearser(model(), Failing(), strategy, TRAINER) as failing, pytest.raises(RehearsalError, match="the disk is gone"):
        failing.rehearse(OverlapStrategy(**PIPELINE).config, 2)
