import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_overlap import DataParallel, OverlapStrategy
from lightning_overlap.bench.measure import Measured, Row, measure
from lightning_overlap.bench.skip import Skipped
from lightning_overlap.comm import Group
from tests.helpers.training import Net


def bench():
    warnings.simplefilter("ignore")
    trainer = {"accelerator": "cpu", "devices": dist.get_world_size(), "plugins": [TorchElasticEnvironment()]}
    strategy = OverlapStrategy(DataParallel(bucket_size=500), cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    model = Net()
    del model.unused
    before = [p.detach().clone() for p in model.parameters()]
    measured = measure(model, None, strategy, trainer, steps=2, warmup=2, repeats=2, with_peers=False)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True)), "the user's module is left alone"
    return measured.as_dict(), measured.table()


def test_every_figure_is_measured(world):
    for figures, table in world(2).run(bench):
        assert [row["name"] for row in figures["rows"]] == ["overlapped", "plain", "compute", "communication"]
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in figures["rows"])
        assert figures["limit"] == max(figures["medians"]["compute"], figures["medians"]["communication"])
        assert "efficiency" in table


def test_the_table_says_what_may_not_be_trusted():
    steady = [Row(name, [1.0, 1.0, 1.0]) for name in ("overlapped", "plain", "communication")]
    table = Measured([*steady, Row("compute", [1.0, 2.0, 1.0])], 2, 5, ["compute differs"]).table()
    assert "doubtful: compute differs" in table


class Recorded(Group):
    """A group of two ranks that moves nothing."""

    def __init__(self):
        self.rank, self.made, self.size = 0, [], 2
        self.exposed = 0.0

    def wait_for(self, label, works): ...

    def reduce_scatter(self, x, bounds, **how):
        self.made.append(how["label"])
        return Skipped(self)._done(x, how["label"])

    all_gather = reduce_scatter


@pytest.mark.parametrize("verb", ["reduce_scatter", "all_gather"])
def test_what_is_skipped_is_made_by_a_replay(verb):
    group = Recorded()
    stand_in = Skipped(group)
    x = torch.arange(4.0)
    result = getattr(stand_in, verb)(x, [0, 2, 4], label="a", key=0).wait()
    assert result.tolist() == ([0, 1] if verb == "reduce_scatter" else [0, 1, 2, 3])
    assert group.made == []
    stand_in.stop()
    stand_in.replay()
    assert group.made == ["a"]
