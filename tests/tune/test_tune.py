"""The comparison of layouts with made-up rehearsals: the table, the best, and its configuration."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_overlap import ConfigError, DataParallel, OverlapConfig, OverlapStrategy, TensorParallel
from lightning_overlap.facts import Facts
from lightning_overlap.plan import resolve
from lightning_overlap.tune.layouts import Batch, Layout
from lightning_overlap.tune.machine import Machine, memory_of_a_rank
from lightning_overlap.tune.memory import Memory
from lightning_overlap.tune.network import Link, Network
from lightning_overlap.tune.rehearsal import Compute, Post, Rehearsal, Wait
from lightning_overlap.tune.training import Training
from lightning_overlap.tune.tune import tune

MACHINE = Machine(4, 2, False, torch.device("cpu"), "gloo")
NETWORK = Network(2, Link(1e12), Link(1e6))
GB = 10**9


class MadeUp:
    """In place of a user's training: a step computes 1 s, then data ranks send a megabyte, which tensor ranks share."""

    def batch(self, data_ranks):
        return Batch(4, data_ranks, 1)

    def start(self, batch):
        pass

    def close(self):
        self.closed = True

    def rehearse(self, layout, machine):
        degrees = layout.plan.degrees
        if degrees.context > 1 or degrees.pipeline > 1:
            raise ConfigError("there are no blocks")
        ranks = tuple(range(0, 4, degrees.tensor))
        post = Post(0, "data.grads[0]", 0, 10**6 // degrees.tensor, ranks, "reduce_scatter", True)
        events = (Compute(1.0), *((post, Wait(0)) if len(ranks) > 1 else ()))
        return [Rehearsal(0, 0, 4, events, Memory(GB * degrees.data, 0, 0, 0, 0, 0))]


def tuned(config=None, memory=80 * GB, training=None, machine=MACHINE, **options):
    def decide(config):
        return resolve(config, Facts(world_size=4, parameters=10_000_000))

    return tune(training or MadeUp(), config or OverlapConfig(), decide, machine, NETWORK, memory, **options)


def test_the_best_ten_and_the_references_have_a_reason():
    result = tuned(OverlapConfig(data_parallel=DataParallel(bucket_size=70_000)), layouts=20)
    assert result.best.name == "tensor 2 x data 2, bucket_size 70000", "the layouts with half the transfers between hosts"
    lines = result.table().splitlines()
    assert lines[0].startswith("4 ranks on 2 hosts, on paper;")
    assert "between hosts: 8 Mbit/s" in " ".join(lines[:2])
    head = next(number for number, line in enumerate(lines) if line.split() == "ms a step plain exposed MB a rank".split())  # noqa: SIM905
    assert lines[head + 1].startswith("1  tensor 2 x data 2 ")
    text = " ".join(" ".join(lines).split())
    assert "since there are no blocks" in text
    assert "(configured, bucket_size 70000): transfers of data.grads wait 1333 ms" in text
    assert "(data parallelism alone): transfers of data.grads wait 1333 ms" in text
    assert max(map(len, lines)) <= 100


def test_a_comparison_says_when_it_is_none():
    one = tuned(layouts=1)
    assert "nothing was compared: one layout was rehearsed" in one.table()
    assert "1 layout rehearsed" in " ".join(one.table().split())
    several = tuned(layouts=20)
    assert "nothing was compared" not in several.table()
    seconds = several.ranked[0].figures.overlapped.seconds
    several.measured[several.ranked[0].layout.name] = 1.2 * seconds
    assert "far off" not in several.table()
    several.measured[several.ranked[0].layout.name] = 2 * seconds
    assert "predictions are far off: other programs use the machine" in several.table()


def test_what_does_not_fit_is_left_out():
    small = tuned(memory=3 * GB)
    assert small.best.plan.degrees.data == 2
    assert "need more than 3.0 GB a rank" in small.table()
    assert "data 4" not in small.table().split("left out")[0].replace("data 4,", "")
    with pytest.raises(ConfigError, match=r"no layout fits: the smallest needs 2\.0 GB a rank, which has 0\.5 GB"):
        _ = tuned(memory=GB // 2).best


def test_what_the_user_has_set_is_not_left_for_a_faster_reference():
    result = tuned(OverlapConfig(tensor_parallel=TensorParallel(size=4)), layouts=3)
    assert result.best.plan.degrees.tensor == 4


class OneSample(MadeUp):
    """Two data ranks with a sample each: data parallelism over all four ranks has not enough."""

    def batch(self, data_ranks):
        return Batch(1, data_ranks, 1)


class Broken(MadeUp):
    def rehearse(self, layout, machine):
        raise TypeError("cannot pickle a lock")


def test_data_parallelism_alone_may_be_impossible():
    result = tuned(OverlapConfig(tensor_parallel=TensorParallel(size=2)), training=OneSample(), seconds=0)
    assert list(result.notes.values()) == ["configured"]
    assert "2 samples do not divide over 4 data ranks" in " ".join(result.table().split())


def test_any_error_of_a_rehearsal_is_told_to_all_ranks():
    with pytest.raises(ConfigError, match="no layout can run: cannot pickle a lock"):
        tuned(training=Broken(), seconds=0)


class Net(LightningModule):
    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_what_cannot_be_pickled_is_found_before_the_search():
    with pytest.raises(ConfigError, match=r"^processes of their own rehearse the training"):
        tuned(training=Training(Locked(), None, OverlapStrategy(), {}))


def test_another_batch_is_also_that_of_the_hyperparameters():
    model = Net()
    config = OverlapConfig(tensor_parallel=TensorParallel(size=2))
    layout = Layout(config, resolve(config, Facts(world_size=4)), batch_size=8, accumulate=1, is_allowed=True)
    other = Training(model, None, OverlapStrategy(), {}).runs(layout).model
    assert (other.batch_size, other.hparams.batch_size, other.hparams["batch_size"]) == (8, 8, 8)
    assert (model.batch_size, model.hparams.batch_size) == (4, 4), "the user's module is left alone"


class Measured(MadeUp):
    """The layout that is measured first fails in its second run."""

    def __init__(self):
        self.runs = Counter()

    def measure(self, layout):
        self.runs[layout.name] += 1
        if self.runs[layout.name] == 2 and layout.name == next(iter(self.runs)):
            raise ConfigError("the sequence is odd")
        return 1.0


def test_a_measured_layout_that_fails_leaves_the_others():
    there = replace(MACHINE, is_there=True)
    training = Measured()
    result = tuned(training=training, machine=there, layouts=20, measure=2)
    (failed, runs), (measured, others) = training.runs.items()
    assert (runs, others) == (2, 3)
    assert f"{failed} fails where it is measured: the sequence is odd" in " ".join(result.table().split())
    assert result.measured == {measured: 1.0}
    assert result.best.name == measured
    assert all(candidate.layout.name != failed for candidate in result.ranked)
    with pytest.raises(ConfigError, match="no layout can run: tensor 2 x data 2 fails where it is measured: the sequence is odd"):
        tuned(OverlapConfig(tensor_parallel=TensorParallel(size=2)), training=Measured(), machine=there, seconds=0, measure=1)


def test_what_is_measured_decides():
    result = tuned(OverlapConfig(data_parallel=DataParallel(bucket_size=70_000)), layouts=20)
    second = next(candidate.layout for candidate in result.ranked[1:] if candidate.layout.is_allowed)
    result.measured = {result.best.name: 2.0, second.name: 1.0}
    assert result.best is second


def test_no_time_is_left_but_for_what_the_search_starts_with():
    result = tuned(OverlapConfig(data_parallel=DataParallel(bucket_size=70_000)), seconds=0)
    assert [candidate.layout.name for candidate in result.ranked] == ["data 4, bucket_size 70000", "data 4"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="--measure needs the ranks"):
        tuned(measure=3)
    with pytest.raises(ConfigError, match="--memory is a number of bytes, such as 80GB or 900MB; got 'much'"):
        memory_of_a_rank(MACHINE, "much")
    assert memory_of_a_rank(MACHINE, "1.5GB") == 1_500_000_000
    assert memory_of_a_rank(MACHINE, None) > 0
