import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_overlap.profiling.trace import Step, Summary, observe_transfers, write_chrome_trace
from lightning_overlap.ranks.group import Transfer


def transfer(posted, waited, label="data.grads[0]", started=None, done=None, number=0):
    return Transfer(label, number, 1000, (0, 1), posted, started, done, waited)


def summary(*ranks):
    told = Summary()
    told.add([Step(0, 0.0, 10.0, [], list(transfers)) for transfers in ranks])
    return told


def test_what_is_waited_for_is_exposed_and_what_is_not_is_hidden():
    waits, goes_on = [transfer(1, (1, 3), done=3)], [transfer(1, (5, 5), done=3)]
    (exposed,), (hidden,) = observe_transfers([Step(0, 0, 10, [], waits), Step(0, 0, 10, [], goes_on)])
    assert exposed.wire == hidden.wire == (1, 3)
    assert exposed.exposed == (1, 3)
    assert hidden.exposed == (5, 5)
    told = summary(waits, goes_on)
    assert (told.mean().communication, told.mean().exposed, told.mean().hidden) == (2, 1, 1)
    assert told.compute == 9
    assert told.waited_for() == [("data.grads[0]", 1.0)]
    assert told.mean().bandwidth == 8 * 1000 / 2


def test_a_late_peer_is_told_from_the_wire():
    told = summary([transfer(1, (1, 5), done=5)], [transfer(4, (4, 5), done=5)])
    assert told.mean().late == 1.5  # (4 - 1) on one of two ranks
    assert told.mean().exposed == 1.0
    assert told.mean().communication == 1.0
    assert told.straggler() == (1, 3.0)
    assert "rank 1 kept the others waiting for 3000.0 ms" in told.table()


def test_a_transfer_is_the_same_by_its_label_and_number():
    first, second = transfer(0, (1, 2), done=2), transfer(5, (5, 6), done=6, number=1)
    alone = observe_transfers([Step(0, 0, 10, [], [first, second]), Step(0, 0, 10, [], [replace(second, posted=5.5)])])
    assert [s.late for s in alone[0]] == [(1, 1), (5, 5.5)]


def test_only_what_lies_in_the_step_counts():
    told = summary([transfer(-5, (-1, 2), done=2)], [transfer(-5, (-1, -1), done=-2)])
    assert told.mean().exposed == 1.0
    assert told.mean().nbytes == 0, "posted in an earlier step"


TIMES = st.integers(0, 12)
RECORDS = st.lists(st.tuples(TIMES, TIMES, TIMES, TIMES, st.sampled_from(["data", "tensor"])), max_size=6)


@given(st.lists(RECORDS, min_size=1, max_size=3))
def test_a_step_is_compute_and_waits_and_a_wire_is_hidden_or_waited_for(records):
    ranks = []
    for rank in records:
        # The main thread does one thing at a time: waits follow each other.
        held, free = [], 0
        for i, (posted, started, done, wait, mode) in enumerate(rank):
            start = max(free, posted)
            free = start + wait
            held.append(transfer(posted, (start, free), f"{mode}.x[{i}]", posted + started, posted + started + done))
        ranks.append(held)
    told = summary(*ranks)
    mean = told.mean()
    assert told.compute + mean.exposed + mean.late == pytest.approx(10)
    assert told.compute >= -1e-9
    assert mean.hidden <= mean.communication + 1e-9
    assert mean.communication <= mean.hidden + mean.exposed + mean.late + 1e-9
    for name in told.names:
        assert told.mean(name).communication <= mean.communication + 1e-9


def test_records_move_to_another_clock():
    step = Step(0, 100.0, 110.0, [("forward", 101.0, 102.0)], [transfer(101, (103, 104), started=101, done=104)])
    moved = step.on_clock(100.0)
    assert (moved.start, moved.end, moved.phases) == (0.0, 10.0, [("forward", 1.0, 2.0)])
    assert moved.transfers == [transfer(1, (3, 4), started=1, done=4)]
    assert step.transfers[0].posted == 101, "the log's own record is left alone"


def test_summaries_add_up():
    one, two = summary([transfer(1, (1, 3), done=3)]), summary([transfer(1, (4, 4), done=2)])
    one.merge(two)
    assert one.steps == 2
    assert one.mean().exposed == 1.0
    assert one.mean().communication == 1.5


def test_chrome_trace(tmp_path):
    step = [Step(3, 5.0, 15.0, [("forward", 5.0, 6.0)], [transfer(6, (7, 9), done=9)]) for _ in range(2)]
    write_chrome_trace([step], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in complete} == {0, 1}
    wire = next(e for e in complete if e["name"] == "data.grads[0]")
    assert (wire["ts"], wire["dur"], wire["args"]["bytes"]) == (1e6, 3e6, 1000)
    assert next(e for e in complete if e["name"] == "waited: data.grads[0]")["dur"] == 2e6
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"compute", "data.grads", "waits"}


def test_a_core_that_others_have_is_told_from_what_is_waited_for():
    phases = [("forward", 0.0, 4.0), ("backward and step", 4.0, 9.0), ("between batches", 9.0, 12.0)]
    # 9 seconds of compute, 2 of them waited for, 5.5 run: 1.5 were somebody else's. The data loader's 3 are not looked at.
    step = Step(0, 0.0, 12.0, phases, [transfer(1, (5, 7), done=7)], cpu_seconds=5.5)
    assert step.core_taken == step.on_clock(3.0).core_taken == 1.5
    assert Step(0, 0.0, 12.0, phases).core_taken == 0.0, "not known on a device"
    told = Summary()
    told.add([step, step])
    assert told.core_taken == 1.5
    assert told.compute + told.mean().exposed + told.mean().late + told.core_taken == told.step == 12.0
    assert "core taken 1500.0" in told.table()
