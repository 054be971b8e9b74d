import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_overlap import ConfigError, DataParallel, OverlapConfig, OverlapStrategy
from lightning_overlap.bench.advice import advise
from lightning_overlap.bench.measure import Measured, TimedRuns, _Clock, _Peers, measure, ranking, record_steps, sweep
from lightning_overlap.bench.rows import Row
from lightning_overlap.bench.runs import Runs
from lightning_overlap.bench.skip import Skipped
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.ranks.group import Group
from tests.helpers.training import Net, train
from tests.trainer.tensor.test_numbers import Net as TensorNet
from tests.tune.test_worker import MADE, FailsInStep2, StepsTwice


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
    drawn = record_steps(Runs(model, None, strategy, trainer), warmup=1)
    return (
        measured.as_dict(),
        measured.table(),
        {row: [[t.label for t in rank.transfers] for rank in step] for row, step in drawn.items()},
    )


def test_every_figure_is_measured(world):
    answers = world(2).run(bench)
    drawn = answers[0][2]
    assert list(drawn) == ["plain", "overlapped"]
    assert all("data.grads[0]" in labels for step in drawn.values() for labels in step), "of both ranks"
    assert answers[1][2] == {}
    for figures, table, _ in answers:
        assert [row["name"] for row in figures["rows"]] == ["overlapped", "plain", "compute", "communication"]
        assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in figures["rows"])
        assert figures["limit"] == max(figures["medians"]["compute"], figures["medians"]["communication"])
        assert "efficiency" in table


def test_transfers_that_cannot_be_left_out_are_refused(world):
    world(2).run(bench_by_post)


def bench_by_post():
    with (
        mock.patch.object(DataMode, "uncounted_transfers", "data_parallel sends by post; by wire, all transfers are seen"),
        pytest.raises(ConfigError, match="need to see all transfers, and data_parallel sends by post"),
    ):
        bench()


def test_several_steps_a_batch_are_refused():
    timed = TimedRuns(Runs(StepsTwice(), None, OverlapStrategy(), {"accelerator": "cpu"}), steps=2, warmup=1)
    with pytest.raises(ConfigError, match="a batch makes 2 optimizer steps, as manual optimization may"):
        timed.run(SingleDeviceStrategy("cpu"))


def test_a_peer_that_has_failed_is_freed():
    peers = _Peers(TimedRuns(Runs(Net(), None, OverlapStrategy(), {"accelerator": "cpu"}), steps=2, warmup=1), FailsInStep2())
    peers.makers = {"one rank": (lambda: SingleDeviceStrategy("cpu"), lambda module: module)}
    MADE.clear()
    peers.measure()
    assert peers.refused == {"one rank": "one rank is left out: the disk is gone"}
    assert [reference() for reference in MADE] == [None]


def test_the_table_says_what_may_not_be_trusted():
    steady = [Row(name, [1.0, 1.0, 1.0]) for name in ("overlapped", "plain", "communication")]
    table = Measured([*steady, Row("compute", [1.0, 2.0, 1.0])], 2, 5, ["compute differs"]).table()
    assert "doubtful: compute differs" in table


def asked_for():
    """Labels of the transfers of one step that a run of ``compute`` keeps, and how many any group made meanwhile."""
    made, kept = [], []

    class Watch(_Clock):
        def on_train_start(self, trainer, module):
            for group in trainer.strategy.modes[0].groups:
                group.log = made
            super().on_train_start(trainer, module)

        def on_train_end(self, trainer, module):
            self.sent = sum(t.nbytes for t in made)
            kept.extend(
                call.keywords["label"].split("[")[0] for s in self._skipped["data"] for call in s.calls if hasattr(call, "keywords")
            )
            super().on_train_end(trainer, module)

    watch = Watch(1, 2, skip=True)
    train(callbacks=[watch], max_steps=4, limit_val_batches=0)
    return watch.sent, kept, sum(t.nbytes for t in made)


def test_no_transfer_is_made_in_the_run_for_compute_and_all_are_in_the_replay(world):
    for sent, kept, replayed in world(2).run(asked_for):
        assert sent == 0
        assert kept.count("data.grads") == kept.count("data.params") > 1
        assert replayed > 0


def rows(overlapped, plain, compute, communication, exposed):
    medians = {"overlapped": overlapped, "plain": plain, "compute": compute, "communication": communication}
    made = {name: Row(name, [median]) for name, median in medians.items()}
    made["overlapped"].exposed = [{"data.grads": 0.75 * exposed, "data.params": 0.25 * exposed}]
    return made


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((1.1, 1.0, 0.9, 0.1, 0.1), "overlap costs 100 ms more than it hides here; set overlap: off"),
        ((1.0, 2.0, 0.9, 0.5, 0.01), "no setting can gain much, only 10 of 1000 ms are exposed"),
        ((1.0, 2.0, 0.8, 0.5, 0.2), "data.grads is exposed most, 150 of 1000 ms; try data_parallel: a smaller bucket_size"),
        ((1.0, 2.0, 0.5, 0.8, 0.2), "and the link is the limit; try data_parallel: reduce_scatter_with_fp32_accumulation: true"),
    ],
)
def test_the_advice_follows_from_the_figures(figures, words):
    assert words in advise(rows(*figures), OverlapConfig())


def swept(setting, tensor=1):
    warnings.simplefilter("ignore")
    trainer = {"accelerator": "cpu", "devices": dist.get_world_size(), "plugins": [TorchElasticEnvironment()]}
    strategy = OverlapStrategy(DataParallel(bucket_size=500), tensor_parallel=tensor, cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    model = Net() if tensor == 1 else TensorNet()
    ranked = sweep(Runs(model, None, strategy, trainer), setting, steps=2, warmup=1, repeats=2)
    return [(row.name, row.median, len(row.seconds), min(row.memory)) for row in ranked], ranking(ranked)


def test_a_sweep_ranks_values(world):
    for ranked, table in world(2).run(swept, "data_parallel.bucket_size=300,auto"):
        assert {name for name, *_ in ranked} == {"data_parallel.bucket_size=300", "data_parallel.bucket_size=auto"}
        assert [median for _, median, *_ in ranked] == sorted(median for _, median, *_ in ranked)
        assert all(runs == 2 and memory > 0 for *_, runs, memory in ranked)
        assert table.count("data_parallel.bucket_size=") == 2


def test_a_sweep_ranks_values_of_one_key_of_a_table(world):
    setting = "tensor_parallel.methods.column_dgrad"
    for ranked, _ in world(2).run(swept, f"{setting}=pipeline,bulk,plain", 2):
        assert {name for name, *_ in ranked} == {f"{setting}={method}" for method in ("pipeline", "bulk", "plain")}


def test_a_sweep_of_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"methods\.row_fprop must be pipeline or plain, got 'ring'"):
        sweep(Runs(Net(), None, OverlapStrategy(), {}), "tensor_parallel.methods.row_fprop=plain,ring", steps=1, warmup=1, repeats=1)


@pytest.mark.parametrize(
    "setting",
    [
        "data_parallel.bucket=1",
        "nothing=1",
        "data_parallel.bucket_size",
        "tensor_parallel.methods=plain",
        "tensor_parallel.splits.a=1",
    ],
)
def test_a_sweep_of_what_is_no_setting_is_refused(setting):
    runs = Runs(Net(), None, OverlapStrategy(), {})
    with pytest.raises(ConfigError, match=f"--sweep {setting} is not MODE.SETTING=VALUE"):
        sweep(runs, setting, steps=1, warmup=1, repeats=1)


class Recorded:
    """A group of two ranks that moves nothing."""

    def __init__(self):
        self.rank, self.made, self.ranks = 0, [], (0, 1)
        self.exposed = 0.0

    def note(self, label, nbytes, ranks=None): ...

    def reduce_scatter(self, x, bounds, **how):
        self.made.append(how["label"])

    all_gather = all_to_all = all_reduce = start_step = send = receive = reduce_scatter
    completed = Group.completed


@pytest.mark.parametrize(
    ("verb", "argument", "gives"),
    [
        ("reduce_scatter", [0, 2, 4], [0, 1]),
        ("all_gather", [0, 2, 4], [0, 1, 2, 3]),
        ("send", 1, [0, 1, 2, 3]),
        ("receive", 1, [0, 0, 0, 0]),
    ],
)
def test_what_is_skipped_is_made_by_a_replay(verb, argument, gives):
    group = Recorded()
    stand_in = Skipped(group)
    x = torch.arange(4.0)
    result = getattr(group, verb)(x, argument, label="a", key=0)._finish()
    assert result.tolist() == gives
    assert group.made == []
    stand_in.stop()
    stand_in.post()
    assert group.made == ["a"]
