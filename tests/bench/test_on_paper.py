import pytest
import torch.distributed as dist

from lightning_overlap import ConfigError, PipelineParallel
from lightning_overlap.bench.measure import Measured
from lightning_overlap.bench.on_paper import busiest, describe_times, on_paper
from lightning_overlap.bench.rows import Row
from lightning_overlap.steps.named_schedules import build


def told(config, forward, backward):
    """Each rank says what its own stages' actions took, with a first one that is out of the way."""
    rank = dist.get_rank()
    work, now = [], 0.0
    for action in config.plan(config.count).actions[rank]:
        seconds = {"F": forward, "B": backward}[action.kind] * (1 + action.stage)
        seconds *= 9 if not work else 1
        work.append((str(action), now, now + seconds))
        now += seconds
    waits = 7.0 if rank == 0 else 0.0  # for the other, which computes longer
    return on_paper(config.plan(config.count), work, now + 5.0 + waits, [8.0], steps=1)


def test_a_schedule_is_simulated_from_what_was_measured(world):
    config = PipelineParallel(size=2, microbatches=4, schedule="1f1b")
    first, second = world(2).run(told, config, 1.0, 2.0)
    assert first == second
    assert (first.forward, first.backward, first.transfer) == (1.5, 3.0, 2.0)  # 8 seconds for 4 transfers in each direction
    # Stage 1 takes 2 and 4 and is never idle but at the ends: 1 before its first action, 2 after its last.
    assert first.outside == 5.0
    assert first.ideal == 1 + 4 * 6 + 2 + 5.0
    assert first.simulated > first.ideal
    assert "measured: 2.00 x" in first.describe(2 * first.simulated)


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "transfers"),
    [("1f1b", 2, 1, 6), ("1f1b", 4, 1, 12), ("interleaved", 4, 2, 24), ("zb_v", 2, 2, 12)],
)
def test_transfers_of_the_busiest_rank(name, ranks, virtual, transfers):
    assert busiest(build(name, ranks, virtual, 6)) == transfers


def test_a_modes_efficiency_leaves_out_what_the_others_are_waited_for():
    exposed = {"overlapped": {"data.grads": 0.1, "pipeline.forward": 0.3}}
    seconds = {"overlapped": 2.0, "compute": 1.2, "communication": 1.4}
    rows = [Row(name, [s], [exposed[name]] if name in exposed else []) for name, s in seconds.items()]
    measured = Measured(rows, 2, 1, [], modes={"data": [0.5], "pipeline": [1.36]})
    assert measured.efficiency("data") == pytest.approx(1.2 / 1.7)
    assert measured.efficiency("pipeline") == pytest.approx(1.36 / 1.9)
    assert "pipeline: communication 1360, waited for 300, efficiency 72%" in measured.table()


def test_a_schedule_is_told_from_given_times():
    # Two ranks, four microbatches, 1 + 2 each: 12 of compute and 3 of bubble. 1F1B cannot hide transfers at its ends.
    free = describe_times(build("1f1b", 2, 1, 4), "1,2,0")
    assert free.startswith("simulated: a batch takes 15 ms, of which 0 ms are exposed transfers (15 ms without overlap)")
    assert free.endswith("without transfers 15 ms, of which the bubble is 20%")
    slow = describe_times(build("1f1b", 2, 1, 4), "10,20,5")
    assert "without transfers 150 ms, of which the bubble is 20%" in slow
    assert not slow.startswith("simulated: a batch takes 150 ms")
    with pytest.raises(ConfigError, match="is not FORWARD,BACKWARD,TRANSFER"):
        describe_times(build("1f1b", 2, 1, 4), "1,2")
