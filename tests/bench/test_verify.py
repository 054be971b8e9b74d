"""``verify`` finds nothing where nothing is wrong, and every fault that is planted."""

import warnings
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_overlap import ConfigError, DataParallel, OverlapStrategy, PipelineParallel, TensorParallel, verify
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.modes.pipeline.transfers import PipelineTransfers
from lightning_overlap.modes.tensor.gemm import Gathered
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.steps.schedule import Action
from tests.helpers.pipelined import Net as PipelineNet
from tests.helpers.pipelined import loader
from tests.helpers.training import Net
from tests.trainer.tensor.test_numbers import Net as TensorNet

BUCKET = "data.grads[1]"
READ_IN_BATCH_1 = "is the first weight that forward reads with another value, in batch 1"


class Faults:
    """Each is a mistake that an overlap can make; in force while overlap is on."""

    def __init__(self):
        self.on = False
        self.held = []

    def waited_too_late(self):
        real = Pending.wait

        def wait(pending):
            if not self.on or not pending.transfer.label.startswith(BUCKET):
                return real(pending)
            for earlier in self.held:
                real(earlier)
            self.held = [pending]
            return None

        return mock.patch.object(Pending, "wait", wait)

    def reduced_twice(self):
        real = Group.reduce_scatter

        def reduce_scatter(group, x, bounds, **how):
            if self.on and how["label"].startswith(BUCKET):
                real(group, x, bounds, **how).wait()
            return real(group, x, bounds, **how)

        return mock.patch.object(Group, "reduce_scatter", reduce_scatter)

    def stale_weight(self):
        real = Group.all_gather

        def all_gather(group, x, bounds, **how):
            if self.on and how["label"].startswith("data.params[1]"):
                return group.completed(x, label=how["label"])
            return real(group, x, bounds, **how)

        return mock.patch.object(Group, "all_gather", all_gather)

    def wrong_scale(self):
        real = Group.reduce_scatter

        def reduce_scatter(group, x, bounds, **how):
            wrong = {"divisor": None} if self.on and how["label"].startswith(BUCKET) else {}
            return real(group, x, bounds, **{**how, **wrong})

        return mock.patch.object(Group, "reduce_scatter", reduce_scatter)


def verified(fault=None, against="off", optimizer="sgd", overlap="auto", **trainer):
    warnings.simplefilter("ignore")
    faults, real = Faults(), DataMode.__init__

    def made(mode, config, choices, setup):
        faults.on = choices.overlap_grad_reduce.value
        real(mode, config, choices, setup)

    size = dist.get_world_size()
    given = {"accelerator": "cpu", "devices": size, "plugins": [TorchElasticEnvironment()], **trainer}
    strategy = OverlapStrategy(DataParallel(bucket_size=500), overlap=overlap, cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * size
    model = Net(optimizer)
    del model.unused  # which counts as zero gradients, and is skipped on one process
    model.sometimes = torch.nn.Identity()
    with ExitStack() as planted:
        planted.enter_context(mock.patch.object(DataMode, "__init__", made))
        if fault is not None:
            planted.enter_context(getattr(faults, fault)())
        return [(verdict.equal, str(verdict)) for verdict in verify(model, None, strategy, given, steps=4, against=against)]


@pytest.mark.parametrize(
    "trainer", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str
)
def test_nothing_is_found_where_nothing_is_wrong(world, trainer):
    verdicts = world(2).run(told, trainer)
    assert verdicts[0] == verdicts[1]
    for equal, words in verdicts[0]:
        assert equal, words
    assert "4 norms of gradients" in verdicts[0][0][1]
    assert len(verdicts[0]) == 2


def told(trainer):
    return verified(against="single", **trainer)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("waited_too_late", ["norm of the gradients of step 0", READ_IN_BATCH_1]),
        ("reduced_twice", ["norm of the gradients of step 0", READ_IN_BATCH_1]),
        ("stale_weight", ["loss of batch 1", READ_IN_BATCH_1]),
        ("wrong_scale", ["norm of the gradients of step 0", READ_IN_BATCH_1]),
    ],
)
def test_a_planted_fault_is_found(world, fault, words):
    verdicts = world(2).run(verified, fault)
    assert verdicts[0] == verdicts[1], "the same on every rank"
    ((equal, said),) = verdicts[0]
    assert not equal
    assert all(word in said for word in words), said


def one_rank():
    with pytest.raises(ConfigError, match="one rank communicates nothing"):
        verified()


def test_one_rank_has_nothing_to_compare(world):
    world(1).run(one_rank)


def without_overlap():
    with pytest.raises(ConfigError, match="nothing overlaps in this plan"):
        verified(overlap="off")
    return verified(overlap="off", against="single")


def test_a_plan_in_which_nothing_overlaps_is_no_proof(world):
    for verdicts in world(2).run(without_overlap):
        ((equal, words),) = verdicts
        assert equal, words
        assert words.startswith("2 ranks and one process")


class Piped(PipelineNet):
    def __init__(self):
        super().__init__(blocks=4, optimizer="sgd")

    def train_dataloader(self):
        return loader(8)


def pipelined(size, fault):
    """With a fault, rank 0 hands on its second microbatch's hidden states wrongly while transfers run beside compute."""
    warnings.simplefilter("ignore")
    ranks = dist.get_world_size()
    given = {"accelerator": "cpu", "devices": ranks, "plugins": [TorchElasticEnvironment()]}
    pipeline = PipelineParallel(size=size, virtual_stages=2, microbatches=4)
    # The first step would show the fault by itself.
    strategy = OverlapStrategy(pipeline_parallel=pipeline, verify_first_step=False, cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * ranks
    real = PipelineTransfers._post_send

    def send(transfers, item, target, tensors):
        wrong = fault and transfers._prefetch is not None and item == Action("F", 0, 1)
        return real(transfers, item, target, [x * 1.01 for x in tensors] if wrong else tensors)

    with mock.patch.object(PipelineTransfers, "_post_send", send):
        return [(v.equal, str(v)) for v in verify(Piped(), None, strategy, given, steps=3, against="single")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pipeline_is_compared_whole(world, ranks):
    for verdicts in world(ranks).run(pipelined, 2, False):
        assert [equal for equal, _ in verdicts] == [True, True], verdicts
    verdicts = world(ranks).run(pipelined, 2, True)
    assert verdicts == [verdicts[0]] * ranks
    assert [equal for equal, _ in verdicts[0]] == [False, False]
    assert all(f"rank {rank}: 28 of 28 parameters differ" in verdicts[0][0][1] for rank in range(ranks)), verdicts[0][0][1]


class CutNet(TensorNet):
    def __init__(self):
        super().__init__(bias=False)


def cut(fault):
    """With a fault, what rank 0 gathers beside its products is wrong."""
    warnings.simplefilter("ignore")
    given = {"accelerator": "cpu", "devices": 2, "plugins": [TorchElasticEnvironment()]}
    parallel = TensorParallel(size=2, verify_blocks=False)
    strategy = OverlapStrategy(tensor_parallel=parallel, verify_first_step=False, cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * 2
    real = Gathered.received

    def received(gathered):
        for rank, low, rows in real(gathered):
            wrong = fault and gathered._exchange.overlapped
            yield rank, low, rows * 1.01 if wrong else rows

    with mock.patch.object(Gathered, "received", received):
        return [(v.equal, str(v)) for v in verify(CutNet(), None, strategy, given, steps=3, against="single")]


def test_cut_layers_are_compared_by_how_close_they_are(world):
    for verdicts in world(2).run(cut, False):
        assert [equal for equal, _ in verdicts] == [True, True], verdicts
        assert "to 1e-05" in verdicts[0][1]
    verdicts = world(2).run(cut, True)
    assert [equal for equal, _ in verdicts[0]] == [False, False]
    assert "without overlap" in verdicts[0][0][1]
