import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_overlap.profiling.callback import largest_imbalances
from lightning_overlap.profiling.chrome_trace import write_chrome_trace
from lightning_overlap.profiling.trace import Step, Summary, observe_transfers
from lightning_overlap.profiling.usage import Usage, samples_and_tokens
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


def inside(event, bars):
    """The bars of an event's thread that are around its time."""
    return [
        bar
        for bar in bars
        if (bar["pid"], bar["tid"]) == (event["pid"], event["tid"]) and bar["ts"] <= event["ts"] <= bar["ts"] + bar["dur"]
    ]


def test_chrome_trace(tmp_path):
    """As Perfetto and chrome://tracing read it: bars of a thread do not overlap, arrows begin and end at bars, all have names."""
    phases = [("forward", 5.0, 8.0), ("backward and step", 8.0, 15.0)]
    hidden = transfer(6.5, (12, 12), "data.grads[1]", started=7, done=10)  # travels while the first one does
    step = [Step(3, 5.0, 15.0, phases, [transfer(6, (7, 9), done=9), hidden]) for _ in range(2)]
    write_chrome_trace([step], tmp_path / "new" / "trace.json")
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    bars = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in bars} == {0, 1}
    wire = next(e for e in bars if e["name"] == "data.grads[0]")
    assert (wire["ts"], wire["dur"], wire["args"]["bytes"], wire["cat"]) == (1e6, 3e6, 1000, "transfer")
    assert next(e for e in bars if e["name"] == "waited: data.grads[0]")["dur"] == 2e6
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    sort = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert [threads[tid] for tid in sorted(sort, key=sort.get)] == ["compute", "waits", "data.grads", "data.grads (2)"]
    processes = {e["pid"]: e["args"] for e in events if e["name"] in ("process_name", "process_sort_index")}
    assert processes == {0: {"sort_index": 0}, 1: {"sort_index": 1}}
    for one in bars:
        assert not [two for two in inside({**one, "ts": one["ts"] + one["dur"] / 2}, bars) if two is not one], "bars overlap"
    flows = {}
    for event in events:
        if event["ph"] in "stf":
            flows.setdefault(event["id"], []).append(event)
            assert inside(event, bars), event
    assert len(flows) == 4
    for flow in flows.values():
        assert [e["ph"] for e in flow] == ["s", "t", "f"]
        assert [e["ts"] for e in flow] == sorted(e["ts"] for e in flow)
        assert flow[-1]["bp"] == "e"
    ends = {flow[0]["name"]: [inside(e, bars)[0]["name"] for e in flow] for flow in flows.values()}
    assert ends["data.grads[0]"] == ["forward", "data.grads[0]", "waited: data.grads[0]"]
    assert ends["data.grads[1]"] == ["forward", "data.grads[1]", "backward and step"]


def test_what_a_step_takes_and_gives():
    first, second = (Step(0, 0.0, 2.0, samples=8, tokens=80) for _ in range(2))
    told = Summary(sharers=2, usage=Usage.of_all([Usage(3e9, "", 4e9, 5_000_000), Usage(1e9, "", 4e9, 7_000_000)]))
    told.add([first, second])  # the two share a batch
    assert told.samples == 8
    assert told.per_second(told.samples) == 4.0
    assert told.flops_per_second == 2e9
    assert told.utilisation == 25.0
    text = " ".join(told.table().split())
    assert "4.0 samples/s, 40 tokens/s, 0.002 TFLOP/s on all ranks (25.0% of the devices' peak), up to 7 MB a rank" in text
    later = Summary(sharers=2, usage=Usage(None, "no formula is known for linear_gelu"))
    later.add([first, second])
    told.merge(later)
    assert told.per_second(told.samples) == 4.0
    assert told.flops_per_second is told.utilisation is None
    assert "operations are not counted: no formula is known for linear_gelu" in told.table()
    assert Usage.of_all([Usage(1.0, "", 1.0, 1), Usage(None, "", None, 2)]) == Usage(None, "", None, 2)


def test_samples_and_tokens_of_a_batch():
    ids, images = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 2, 4, 4)
    assert samples_and_tokens(ids) == samples_and_tokens((ids, images)) == (3, 15)
    assert samples_and_tokens({"attention_mask": ids[:1], "input_ids": ids}) == (3, 15)
    assert samples_and_tokens([images, ids]) == samples_and_tokens({"mask": ids.bool(), "input": images}) == (3, 0)
    assert samples_and_tokens(["text", torch.tensor(1.0)]) == (0, 0)


def test_the_largest_imbalance_is_told():
    measured = {
        "overlap/expert/blocks.0.mlp/experts_max_over_mean": 1.5,
        "overlap/expert/blocks.1.mlp/experts_max_over_mean": 2.5,
        "overlap/expert/blocks.1.mlp/tokens_of_expert_0": 9.0,
        "overlap/expert/blocks.0.mlp/ranks_max_over_mean": 1.1,
    }
    worst = largest_imbalances(measured)
    assert worst == {("expert", "experts"): (2.5, "blocks.1.mlp"), ("expert", "ranks"): (1.1, "blocks.0.mlp")}
    assert "expert: the largest load of experts is 2.50 x the mean (blocks.1.mlp)" in Summary(imbalances=worst).table()


def test_the_table_fits_a_hundred_columns():
    labels = [f"{mode}.{'x' * 20}[{i}]" for mode in ("data", "tensor", "context", "expert") for i in range(3)]
    transfers = [transfer(i, (i + 0.1, i + 0.9), label, started=i, done=i + 0.9) for i, label in enumerate(labels)]
    told = Summary(usage=Usage(1e12, "a reason " * 20, 1e15, 10**11))
    told.add([Step(0, 0.0, 12.0, [], transfers, samples=1000, tokens=10**6)] * 2)
    assert max(map(len, told.table().splitlines())) <= 100


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
