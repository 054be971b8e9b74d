"""Schedules: the reference's orders, and that every one is complete, runs, and costs what it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.schedule import (
    SCHEDULES,
    STAGES_OF_A_RANK,
    Action,
    Schedule,
    build,
    parse,
    simulate,
    table,
    validate,
)


def chunks(schedule, rank):
    """A rank's actions as the reference writes them: which of its stages, from 1; negative for a backward."""
    return [(a.stage // schedule.ranks + 1) * (1 if a.kind == "F" else -1) for a in schedule.actions[rank]]


def numbers(text):
    return [int(word) for word in text.split()]


def test_the_table_is_the_references():
    assert [m for m, _ in table(2, 5, 3)] == numbers("0 1 2 0 1 2 3 4 3 4")
    assert [chunk for _, chunk in table(2, 5, 3)] == numbers("0 0 0 1 1 1 0 0 1 1")
    assert [m for m, _ in table(2, 4, 2)] == numbers("0 1 0 1 2 3 2 3")
    assert [chunk for _, chunk in table(2, 4, 2)] == numbers("0 0 1 1 0 0 1 1")


@pytest.mark.parametrize(
    ("ranks", "group", "microbatches", "rank", "order"),
    [
        (2, 3, 5, 0, "1 1 1 2 2 2 -2 1 -2 1 -2 2 -1 2 -1 -1 -2 -2 -1 -1"),
        (2, 3, 5, 1, "1 1 1 2 -2 2 -2 2 -2 1 -1 1 -1 2 -1 2 -2 -2 -1 -1"),
        (4, 4, 8, 0, "1 1 1 1 2 2 2 2 1 1 1 -2 1 -2 2 -2 2 -2 2 -1 2 -1 -1 -1 -2 -2 -2 -2 -1 -1 -1 -1"),
        (4, 4, 8, 3, "1 1 1 1 2 -2 2 -2 2 -2 2 -2 1 -1 1 -1 1 -1 1 -1 2 -2 2 -2 2 -2 2 -2 -1 -1 -1 -1"),
    ],
)
def test_interleaved_is_the_references(ranks, group, microbatches, rank, order):
    assert chunks(build("interleaved", ranks, 2, microbatches, group=group), rank) == numbers(order)


def warmup(schedule, rank):
    """Forwards before the first backward, less the one with which the turns begin."""
    kinds = [a.kind for a in schedule.actions[rank]]
    return kinds.index("B") - 1


def test_warm_up_is_the_references():
    assert [warmup(build("1f1b", 4, 1, 8), rank) for rank in range(4)] == [3, 2, 1, 0]
    assert [warmup(build("interleaved", 4, 2, 8, group=4), rank) for rank in range(4)] == [10, 8, 6, 4]


def virtual_of(name, asked):
    return STAGES_OF_A_RANK.get(name, asked)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 3), st.integers(1, 17))
def test_any_schedule(name, ranks, virtual, microbatches):
    virtual = virtual_of(name, virtual)
    made = build(name, ranks, virtual, microbatches)  # validates
    split = made.splits_backward
    assert split == (name in ("zb_h1", "interleaved_zb", "zb_v"))
    assert sum(map(len, made.actions)) == (3 if split else 2) * ranks * virtual * microbatches
    for rank, row in enumerate(made.actions):
        assert all(made.placement[a.stage] == rank for a in row)
        for stage in made.stages_of(rank):  # gradients are summed in the order of the microbatches
            for kind in "FBIW":
                order = [a.microbatch for a in row if a.kind == kind and a.stage == stage]
                assert order == sorted(order)
    assert parse(made.text()).actions == made.actions
    free = simulate(made)
    assert free.seconds >= 3 * virtual * microbatches
    assert free.busy == (3.0 * virtual * microbatches,) * ranks
    late = simulate(made, transfer=0.5)
    assert late.seconds >= free.seconds
    assert late.exposed == pytest.approx(late.seconds - free.seconds)
    assert simulate(made, transfer=0.5, overlapped=False).seconds >= late.seconds - 1e-9
    ends = [{(a.kind, a.stage, a.microbatch): end for r, a, _, end in late.spans if r == rank} for rank in range(ranks)]
    for rank in range(ranks):  # one after the other
        assert list(ends[rank].values()) == sorted(ends[rank].values())


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_bubbles_are_as_published(ranks, microbatches):
    for name in ("gpipe", "1f1b", "eager_1f1b"):
        assert simulate(build(name, ranks, 1, microbatches)).seconds == 3 * (microbatches + ranks - 1)
    if microbatches % ranks == 0:
        for virtual in (2, 3):
            made = build("interleaved", ranks, virtual, microbatches)
            assert simulate(made).seconds == 3 * (virtual * microbatches + ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("transfer", [0.2, 0.5])
def test_eager_hides_what_is_exposed_in_steady_state(ranks, transfer):
    plain, eager = (simulate(build(name, ranks, 1, 4 * ranks), transfer=transfer) for name in ("1f1b", "eager_1f1b"))
    # A way through all stages and back is left, at the beginning and at the end.
    assert eager.exposed == pytest.approx(2 * (ranks - 1) * transfer)
    assert plain.exposed > 1.5 * eager.exposed
    assert simulate(build("eager_1f1b", ranks, 1, 4 * ranks)).seconds == 3 * (5 * ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_activations_held_are_as_published(ranks):
    microbatches = 3 * ranks
    assert simulate(build("gpipe", ranks, 1, microbatches)).peak == (microbatches,) * ranks
    held = tuple(ranks - rank for rank in range(ranks))
    assert simulate(build("1f1b", ranks, 1, microbatches)).peak == held
    assert simulate(build("zb_h1", ranks, 1, microbatches)).peak == held
    assert max(simulate(build("zb_v", ranks, 2, microbatches)).peak) <= 2 * ranks
    plain, split = build("interleaved", ranks, 2, microbatches), build("interleaved_zb", ranks, 2, microbatches)
    assert all(s <= p for s, p in zip(simulate(split).peak, simulate(plain).peak, strict=True))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_a_split_backward_makes_the_bubble_smaller(ranks, rounds):
    microbatches = rounds * ranks
    seconds = {name: simulate(build(name, ranks, virtual_of(name, 2), microbatches)).seconds for name in SCHEDULES}
    assert seconds["zb_h1"] < seconds["1f1b"]
    assert seconds["interleaved_zb"] <= seconds["interleaved"]
    assert seconds["zb_v"] < seconds["interleaved"]


def changed(schedule, rank, change):
    rows = [list(row) for row in schedule.actions]
    change(rows[rank])
    return Schedule("changed", schedule.microbatches, schedule.placement, tuple(map(tuple, rows)))


def swapped(row):
    forward, backward = row.index(Action("F", 1, 0)), row.index(Action("B", 1, 0))
    row[forward], row[backward] = row[backward], row[forward]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.remove(Action("B", 1, 2)), "stage 1, microbatch 2 is run as F"),
        (lambda row: row.append(Action("B", 1, 2)), "B1.2 is run twice"),
        (lambda row: row.append(Action("B", 0, 0)), "B0.0 is run twice, by ranks 0 and 1"),
        (lambda row: row.append(Action("W", 0, 0)), "W0.0 is run by rank 1"),
        (lambda row: row.append(Action("W", 1, 0)), "stage 1, microbatch 0 is run as FBW"),
        (swapped, "rank 1 at B1.0, which needs F1.0"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(ConfigError, match=said):
        validate(changed(build("1f1b", 2, 1, 4), 1, change))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F0.0 X0.0", "line 1 of the schedule: 'X0.0'"),
        ("F0.0 B0.0\n\nF2.0 B2.0", r"stages \[0, 2\]"),
        ("", r"stages \[\]"),
        ("F0.0 B0.0\nB1.0 F1.0", "stands still"),
    ],
)
def test_a_file_that_is_wrong_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_a_file_has_room_for_remarks():
    assert parse("# mine\nF0.0 B0.0  # both\n\nF1.0 B1.0\n").placement == (0, 1)


@pytest.mark.parametrize(("name", "virtual"), [("1f1b", 2), ("zb_h1", 3), ("zb_v", 1), ("none", 1)])
def test_schedules_that_there_are_not(name, virtual):
    with pytest.raises(ConfigError, match=name):
        build(name, 2, virtual, 4)


def torch_order(kind, ranks, virtual, microbatches):
    """The order in which torch's own schedule runs."""
    from torch.distributed.pipelining import schedules

    class Stage:
        def __init__(self, index):
            self.stage_index, self.num_stages, self.group_size, self.group_rank = index, ranks * virtual, ranks, index % ranks
            self.is_first, self.is_last, self.has_backward = index == 0, index == ranks * virtual - 1, True
            self.device, self.submod, self.group = "cpu", None, None
            self.stage_index_to_group_rank = {s: s % ranks for s in range(ranks * virtual)}

        def _prepare_forward_infra(self, *_): ...

    rows = []
    for rank in range(ranks):
        if kind == "interleaved":
            own = [Stage(s) for s in range(rank, ranks * virtual, ranks)]
            made = schedules.ScheduleInterleaved1F1B(own, microbatches, lambda *_: None)
            row = made.pipeline_order[rank]
        else:
            made = schedules.Schedule1F1B(Stage(rank), microbatches, lambda *_: None)
            row = made._get_pipeline_order()[rank]
        rows.append([str(a) for a in row if a is not None and "REDUCE" not in str(a)])
    return rows


@pytest.mark.parametrize(("ranks", "virtual", "rounds"), [(2, 1, 2), (4, 1, 2), (2, 2, 2), (4, 2, 2), (4, 3, 3)])
def test_torch_runs_the_same_order(ranks, virtual, rounds):
    name = "1f1b" if virtual == 1 else "interleaved"
    ours = build(name, ranks, virtual, rounds * ranks)
    theirs = torch_order(name, ranks, virtual, rounds * ranks)
    # torch's printed 1F1B numbers the last rank's microbatches from 1; it does not run what it prints.
    for rank in range(ranks if virtual > 1 else ranks - 1):
        assert [f"{a.stage}{a.kind}{a.microbatch}" for a in ours.actions[rank]] == theirs[rank]
