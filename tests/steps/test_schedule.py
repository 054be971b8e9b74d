"""Schedules: the reference's orders; each is complete and in order; wrong ones are refused."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from torch.distributed.pipelining import schedules as torch_schedules

from lightning_overlap.decision import ConfigError
from lightning_overlap.steps.named_schedules import build
from lightning_overlap.steps.schedule import Action, Schedule, parse, validate
from tests.helpers.schedules import schedules

SPLIT = {"zb_h1", "interleaved_zb", "zb_v", "dualpipev"}


def numbers(text):
    return [int(word) for word in text.split()]


# -- the reference's orders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "microbatches", "microbatch_ids", "chunk_ids"),
    [(3, 5, "0 1 2 0 1 2 3 4 3 4", "0 0 0 1 1 1 0 0 1 1"), (2, 4, "0 1 0 1 2 3 2 3", "0 0 1 1 0 0 1 1")],
)
def test_the_table_is_the_references(group, microbatches, microbatch_ids, chunk_ids):
    made = build("interleaved", 2, 2, microbatches, group=group)
    for rank in range(2):
        forwards = [a for a in made.actions[rank] if a.kind == "F"]
        assert [a.microbatch for a in forwards] == numbers(microbatch_ids)
        assert [a.stage // 2 for a in forwards] == numbers(chunk_ids)


def chunks(schedule, rank):
    """Returns a rank's actions in the reference's notation: the index of its stage, from 1; negative for a backward."""
    return [(a.stage // schedule.ranks + 1) * (1 if a.kind == "F" else -1) for a in schedule.actions[rank]]


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


@pytest.mark.parametrize(("ranks", "group"), [(1, 1), (2, 2), (2, 4), (4, 4), (4, 5), (8, 9), (8, 11)])
@pytest.mark.parametrize("microbatches", [8, 32])
@pytest.mark.parametrize("virtual", [1, 2, 4, 8])
def test_the_references_invariants(ranks, group, microbatches, virtual):
    grouped = {"group": group} if virtual > 1 else {}
    made = build("interleaved" if virtual > 1 else "1f1b", ranks, virtual, microbatches, **grouped)
    for rank in range(ranks):
        order = chunks(made, rank)
        assert len(order) == microbatches * virtual * 2
        outstanding = 0
        for chunk in order:
            outstanding += 1 if chunk > 0 else -1
            assert outstanding >= 0
        assert outstanding == 0
        assert Counter(chunk for chunk in order if chunk < 0) == {-chunk - 1: microbatches for chunk in range(virtual)}


def warmup(schedule):
    """Returns the number of warm-up forwards of each rank."""
    return [[a.kind for a in row].index("B") - 1 for row in schedule.actions]


def test_warm_up_is_the_references():
    assert warmup(build("1f1b", 4, 1, 8)) == [3, 2, 1, 0]
    assert warmup(build("interleaved", 4, 2, 8, group=4)) == [10, 8, 6, 4]
    assert warmup(build("eager_1f1b", 4, 1, 8)) == [6, 4, 2, 0]


@pytest.mark.parametrize(
    ("group", "microbatches", "counts"),
    [(5, 9, [5, 4]), (4, 8, [4, 4]), (4, 10, [3, 3, 4]), (9, 8, [8]), (3, 8, [4, 4]), (4, 3, [3])],
)
def test_groups_of_any_size(group, microbatches, counts):
    """The first two cases are the reference's. It refuses the others."""
    made = build("interleaved", 4, 2, microbatches, group=group)
    forwards = [chunk for chunk in chunks(made, 0) if chunk > 0]
    assert forwards == [chunk for count in counts for chunk in (1, 2) for _ in range(count)]


def dualpipev_oracle(rank, text):
    """Reads the reference's notation: F and B with direction and microbatch, b for I, pairs in brackets, W for the oldest pending."""
    order, left = [], []
    for word in text.replace("[", "").replace("]", "").replace("|", " ").split():
        if word == "W":
            order.append(left.pop(0))
            continue
        way, microbatch = numbers(word[1:].replace(".", " "))
        stage = 3 - rank if way else rank
        order.append(Action({"F": "F", "B": "B", "b": "I"}[word[0]], stage, microbatch))
        if word[0] == "b":
            left.append(Action("W", stage, microbatch))
    return tuple(order)


@pytest.mark.parametrize(
    ("rank", "order"),
    [
        (0, "F0.0 F0.1 F0.2 F1.0 b1.0 W F1.1 [F0.3|B1.1] [F1.2|B0.0] B1.2 [F1.3|B0.1] B1.3 b0.2 W b0.3 W"),
        (1, "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 [F1.2|B0.0] [F0.3|B1.1] [F1.3|B0.1] B1.2 B0.2 b1.3 b0.3 W W"),
    ],
)
def test_dualpipev_is_the_references(rank, order):
    assert build("dualpipev", 2, 2, 4).actions[rank] == dualpipev_oracle(rank, order)


def test_dualpipev_counts_are_the_references():
    rows = build("dualpipev", 4, 2, 10).actions
    assert [sum(a.kind == "W" for a in row) for row in rows] == [7, 6, 5, 4]
    pairs = [sum(a.kind == "F" and b.kind == "B" for a, b in pairwise(row)) for row in rows]
    assert pairs == [9, 10, 11, 11 + 1]  # the reference runs the last rank's first pair apart


class TorchStage:
    """A stage with the attributes that torch's schedules need before they run."""

    def __init__(self, index, ranks, stages):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, index % ranks
        self.is_first, self.is_last, self.has_backward = index == 0, index == stages - 1, True
        self.device, self.submod, self.group = "cpu", None, None


def torch_order(made):
    """Returns the order of each rank in torch's schedule of the same name, without bubbles and sums over ranks."""
    name = {"gpipe": "GPipe", "1f1b": "1F1B", "dualpipev": "DualPipeV"}.get(made.name, "Interleaved1F1B")
    stages = [TorchStage(s, made.ranks, made.stages) for s in made.stages_of(0)]
    single = name in ("GPipe", "1F1B")
    try:
        theirs = torch_schedules.get_schedule_class(name)(stages[0] if single else stages, made.microbatches, lambda *_: None)
    except ValueError as error:
        if made.microbatches < made.stages:
            pytest.skip(f"this version of torch: {error}")  # 2.10, say
        raise
    order = theirs._get_pipeline_order() if single else theirs.pipeline_order
    parts = [[part for a in order[rank] if a is not None for part in (a.sub_actions or (a,))] for rank in range(made.ranks)]
    return [[str(part) for part in row if part.microbatch_index is not None] for row in parts]


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "microbatches"),
    [
        *(("gpipe", ranks, 1, microbatches) for ranks in (2, 4) for microbatches in (1, 4, 9)),
        *(("1f1b", ranks, 1, microbatches) for ranks in (2, 4) for microbatches in (4, 6, 9)),
        *(
            ("eager_1f1b", ranks, 1, rounds * ranks) for ranks in (2, 4) for rounds in (1, 2, 3)
        ),  # torch: interleaved, one stage a rank
        *(("interleaved", ranks, virtual, rounds * ranks) for ranks in (2, 4) for virtual in (2, 3) for rounds in (1, 2, 3)),
        *(("dualpipev", ranks, 2, microbatches) for ranks in (2, 3, 4) for microbatches in (8, 11)),
    ],
)
def test_torch_runs_the_same_order(name, ranks, virtual, microbatches):
    made = build(name, ranks, virtual, microbatches)
    ours = [[f"{a.stage}{a.kind}{a.microbatch}" for a in row] for row in made.actions]
    # Torch's printed order of the last rank's 1F1B counts forwards from 1; torch does not run that order.
    ranks -= name == "1f1b"
    assert ours[:ranks] == torch_order(made)[:ranks]


# -- all schedules -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(schedules)
def test_every_schedule_is_complete_and_in_order(made):
    virtual = made.stages // made.ranks
    validate(made)
    if made.name != "dualpipev" or made.microbatches >= 2 * made.ranks:  # it splits only the last of at least 2 x ranks
        assert made.splits_backward == (made.name in SPLIT)
    for rank, row in enumerate(made.actions):
        assert {a.stage for a in row} == set(made.stages_of(rank))
        halves = sum(a.kind == "I" for a in row)
        assert len(row) == 2 * virtual * made.microbatches + halves
        for stage in made.stages_of(rank):  # gradients are the same sums as in one process
            for kinds in ("F", "BI", "W"):
                order = [a.microbatch for a in row if a.kind in kinds and a.stage == stage]
                assert order == sorted(order)
    assert parse(made.text()) == made


# -- errors --------------------------------------------------------------------------------------------------------------


def changed(schedule, rank, change):
    rows = [list(row) for row in schedule.actions]
    change(rows[rank])
    return replace(schedule, actions=tuple(map(tuple, rows)))


def swapped(first, second):
    def change(row):
        i, j = row.index(first), row.index(second)
        row[i], row[j] = row[j], row[i]

    return change


WRONG = [
    ("1f1b", lambda row: row.remove(Action("B", 1, 2)), "B1.2 missing"),
    ("1f1b", lambda row: row.remove(Action("F", 1, 2)), "F1.2 missing"),
    ("zb_h1", lambda row: row.remove(Action("W", 1, 2)), "W1.2 missing"),
    ("zb_h1", lambda row: row.remove(Action("I", 1, 2)), "I1.2 missing"),
    ("1f1b", lambda row: row.append(Action("B", 1, 2)), "ranks 1 and 1 both run B1.2"),
    ("1f1b", lambda row: row.append(Action("B", 0, 0)), "ranks 0 and 1 both run B0.0"),
    ("1f1b", lambda row: row.append(Action("W", 0, 0)), "rank 1 runs W0.0, but its stage is on rank 0"),
    ("1f1b", lambda row: row.append(Action("W", 1, 0)), "W1.0 redundant"),
    ("zb_h1", lambda row: row.append(Action("B", 1, 0)), "I1.0, W1.0 redundant"),
    ("1f1b", lambda row: row.append(Action("X", 1, 0)), "rank 1 runs X1.0"),
    ("1f1b", lambda row: row.append(Action("F", 2, 0)), "rank 1 runs F2.0"),
    ("1f1b", lambda row: row.append(Action("F", 1, 4)), "rank 1 runs F1.4"),
    ("1f1b", swapped(Action("F", 1, 0), Action("B", 1, 0)), "rank 1 at B1.0, which needs F1.0"),
    ("zb_h1", swapped(Action("I", 1, 0), Action("W", 1, 0)), "rank 1 at W1.0, which needs I1.0"),
    (
        "1f1b",  # rank 1 waits for a microbatch that rank 0 starts only after the backward of the first
        swapped(Action("F", 1, 0), Action("F", 1, 2)),
        "rank 0 at B0.0, which needs B1.0; rank 1 at F1.2, which needs F0.2",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_errors_name_the_actions(name, change, message):
    with pytest.raises(ConfigError, match=message):
        validate(changed(build(name, 2, 1, 4), 1, change))


def test_a_rank_without_a_stage_is_named():
    with pytest.raises(ConfigError, match=r"has 2 ranks, but its placement names the ranks \[0\]"):
        validate(Schedule("odd", 1, (0,), ((Action("F", 0, 0), Action("B", 0, 0)), ())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0.0 X0.0", "line 1 of the schedule: 'X0.0' is no action"),
        ("# mine\n\nF0.0 B0.0\nF1.0 B1", "line 4 of the schedule: 'B1' is no action"),
        ("F0.0 B0.0\nF1.0 B1.0 W0.0", "line 2 of the schedule: 'W0.0' is an action of stage 0, which is on line 1"),
        ("F0.0 B0.0\n\nF2.0 B2.0", r"stages \[0, 2\]"),
        ("", r"stages \[\]"),
        ("F0.0 B0.0\nB1.0 F1.0", "deadlocks"),
        ("F0.0 B0.0 F0.999999999 B0.999999999", "F0.1, B0.1 missing"),
    ],
)
def test_a_wrong_file_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_file_may_have_comments():
    made = parse("F0.0 B0.0  # both\n\n   # of the other\nF1.0 B1.0 # too")
    assert made.placement == (0, 1)
    assert made.actions == build("1f1b", 2, 1, 1).actions
    assert parse("# my own\nF0.0 B0.0").name == "my own"


@pytest.mark.parametrize(
    ("name", "virtual", "group", "message"),
    [
        ("none", 1, None, "schedule 'none' does not exist; known are gpipe, 1f1b"),
        ("1f1b", 2, None, "1f1b needs virtual_stages: 1, not 2"),
        ("zb_h1", 3, None, "zb_h1 needs virtual_stages: 1, not 3"),
        ("zb_v", 1, None, "zb_v needs virtual_stages: 2, not 1"),
        ("dualpipev", 3, None, "dualpipev needs virtual_stages: 2, not 3"),
        ("interleaved", 1, None, "interleaved needs virtual_stages of at least 2"),
        ("interleaved_zb", 1, None, "interleaved_zb needs virtual_stages of at least 2"),
        ("1f1b", 1, 4, "1f1b has no groups of microbatches: remove group=4"),
        ("gpipe", 0, None, "gpipe cannot have virtual=0"),
        ("interleaved", 2, 0, "interleaved cannot have group=0"),
    ],
)
def test_schedules_that_do_not_exist(name, virtual, group, message):
    with pytest.raises(ConfigError, match=message):
        build(name, 2, virtual, 4, group=group)
