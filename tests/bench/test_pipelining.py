"""The peer that torch's pipelining is trains what we train."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_overlap import OverlapStrategy, PipelineParallel
from lightning_overlap.bench.peers.pipeline import SCHEDULES, TorchPipelining, peers
from lightning_overlap.bench.runs import Runs
from tests.helpers.pipelined import Net, loader


class Piped(Net):
    def __init__(self):
        super().__init__(blocks=4, optimizer="sgd")

    def train_dataloader(self):
        return loader(8)


def trained_by_both(schedule, virtual):
    warnings.simplefilter("ignore")
    ranks = dist.get_world_size()
    pipeline = PipelineParallel(size=ranks, virtual_stages=virtual, microbatches=4, schedule=schedule)
    strategy = OverlapStrategy(pipeline_parallel=pipeline, cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * ranks
    seed_everything(1, verbose=False)
    runs = Runs(Piped(), None, strategy, {"accelerator": "cpu", "devices": ranks, "plugins": [TorchElasticEnvironment()]})
    (name, (make, _)), *none = peers(strategy.config, ranks, "gloo").items()
    assert name == "torch.distributed.pipelining"
    assert not none
    made = make()
    assert isinstance(made.config, TorchPipelining)
    found = []
    for each in (runs.ours(), made):
        module = copy.deepcopy(runs.model)
        runs.fit(each, 3, Callback(), module)
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert not found[0].equal(torch.cat([p.detach().flatten() for p in runs.model.parameters()])), "something was trained"
    return found


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)])
def test_the_same_weights(world, schedule, virtual):
    assert schedule in SCHEDULES
    for ours, theirs in world(2).run(trained_by_both, schedule, virtual):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_no_row_where_torch_has_no_such_schedule():
    config = OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, schedule="zb_h1")).config
    assert peers(config, 2, "gloo") == {}
