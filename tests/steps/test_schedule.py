"""Schedules: the reference's orders, and that every one is complete, runs, costs and holds what it should."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.transfers import between, sent_after
from lightning_overlap.steps.defer import defer
from lightning_overlap.steps.schedule import SCHEDULES, STAGES_OF_A_RANK, Action, Schedule, build, parse, validate
from lightning_overlap.steps.simulate import draw, simulate

SPLIT = {"zb_h1", "interleaved_zb", "zb_v", "dualpipev"}


def numbers(text):
    return [int(word) for word in text.split()]


def virtual_of(name, asked):
    """A number of stages a rank that the schedule can have."""
    return STAGES_OF_A_RANK.get(name, max(asked, 2) if name.startswith("interleaved") else asked)


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
    """A rank's actions as the reference writes them: which of its stages, from 1; negative for a backward."""
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
    """By rank, the forwards before the first backward, less the one with which the turns begin."""
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
    """The first two are the reference's; the others it refuses."""
    made = build("interleaved", 4, 2, microbatches, group=group)
    forwards = [chunk for chunk in chunks(made, 0) if chunk > 0]
    assert forwards == [chunk for count in counts for chunk in (1, 2) for _ in range(count)]


def dualpipev_oracle(rank, text):
    """As the reference writes it: F and B with way and microbatch, b with a W left, pairs in brackets, Ws in the order left."""
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
    """What torch's schedules ask of a stage before they run."""

    def __init__(self, index, ranks, stages):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, index % ranks
        self.is_first, self.is_last, self.has_backward = index == 0, index == stages - 1, True
        self.device, self.submod, self.group = "cpu", None, None


def torch_order(made):
    """By rank, the order in which torch runs the schedule of the same name, without bubbles and sums over ranks."""
    name = {"gpipe": "GPipe", "1f1b": "1F1B", "dualpipev": "DualPipeV"}.get(made.name, "Interleaved1F1B")
    stages = [TorchStage(s, made.ranks, made.stages) for s in made.stages_of(0)]
    single = name in ("GPipe", "1F1B")
    theirs = torch_schedules.get_schedule_class(name)(stages[0] if single else stages, made.microbatches, lambda *_: None)
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
    # What torch prints of the last rank's 1F1B counts forwards from 1; it is not what it runs.
    ranks -= name == "1f1b"
    assert ours[:ranks] == torch_order(made)[:ranks]


# -- all schedules -------------------------------------------------------------------------------------------------------

schedules = st.builds(
    lambda name, ranks, virtual, microbatches: build(name, ranks, virtual_of(name, virtual), microbatches),
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 20),
)


@settings(deadline=None, max_examples=150)
@given(schedules)
def test_every_schedule_is_complete_and_in_order(made):
    virtual = made.stages // made.ranks
    validate(made)
    if made.name != "dualpipev" or made.microbatches >= 2 * made.ranks:  # which splits the last ones
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


@settings(deadline=None, max_examples=100)
@given(
    made=schedules,
    forward=st.floats(0.1, 3),
    backward=st.floats(0.1, 3),
    part=st.floats(0, 1),
    transfer=st.floats(0, 2),
)
def test_every_schedule_runs_on_paper(made, forward, backward, part, transfer):
    costs = {"forward": forward, "backward": backward, "weight": part * backward}
    free = simulate(made, **costs)
    late = simulate(made, **costs, transfer=transfer)
    plain = simulate(made, **costs, transfer=transfer, overlapped=False)
    work = (forward + backward) * made.microbatches * made.stages / made.ranks
    through = made.stages * (forward + backward * (1 - part if made.splits_backward else 1))
    hops = sum(a != b for a, b in pairwise(made.placement))
    assert free.seconds >= max(work, through) - 1e-9
    assert late.seconds >= max(free.seconds, through + 2 * hops * transfer) - 1e-9
    assert plain.seconds >= late.seconds - 1e-9
    assert free.exposed == 0
    for run in (late, plain):
        assert run.exposed == pytest.approx(run.seconds - free.seconds)
        assert run.peak == free.peak
        assert run.busy == pytest.approx([work] * made.ranks)
        assert run.bubble == pytest.approx(1 - work / run.seconds)
        end_of = {action.result: end for _, action, _, end in run.spans}
        free_at = [0.0] * made.ranks
        for rank, action, start, end in run.spans:
            assert start >= max([free_at[rank], *(end_of[need] for need in made.needs(action))])
            free_at[rank] = end


# -- what they cost and hold, with forwards of 1 and backwards of 2, half of it for weights ----------------------------------


def seconds(name, ranks, virtual, microbatches):
    return simulate(build(name, ranks, virtual, microbatches)).seconds


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 20), forward=st.floats(0.1, 3), backward=st.floats(0.1, 3))
def test_bubbles_of_one_stage_a_rank(ranks, microbatches, forward, backward):
    for name in ("gpipe", "1f1b", "eager_1f1b"):
        run = simulate(build(name, ranks, 1, microbatches), forward=forward, backward=backward)
        assert run.seconds == pytest.approx((microbatches + ranks - 1) * (forward + backward))
        assert run.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(1, 8), virtual=st.integers(2, 4), rounds=st.integers(1, 3), forward=st.floats(0.1, 3))
def test_bubbles_of_interleaved_stages(ranks, virtual, rounds, forward):
    microbatches = rounds * ranks
    run = simulate(build("interleaved", ranks, virtual, microbatches), forward=forward, backward=2.0)
    assert run.seconds == pytest.approx((microbatches * virtual + ranks - 1) * (forward + 2.0))
    assert seconds("interleaved_zb", ranks, virtual, microbatches) == 3 * microbatches * virtual + ranks - 1


@settings(deadline=None, max_examples=100)
@given(ranks=st.integers(1, 8), virtual=st.integers(2, 4), microbatches=st.integers(1, 20))
def test_interleaved_counts_without_groups(ranks, virtual, microbatches):
    """No longer than with the last group filled up, and nothing more is held, since a last batch is often smaller."""
    filled = -(-microbatches // ranks) * ranks
    for name in ("interleaved", "interleaved_zb"):
        run, full = (simulate(build(name, ranks, virtual, m)) for m in (microbatches, filled))
        most = simulate(build(name, ranks, virtual, 3 * ranks))
        assert run.seconds <= simulate(build("interleaved", ranks, virtual, filled)).seconds
        assert max(run.peak) <= max(full.peak) if microbatches == filled else max(run.peak) <= max(most.peak)
    assert seconds("interleaved_zb", ranks, virtual, microbatches) <= seconds("interleaved", ranks, virtual, microbatches)
    if microbatches >= ranks and virtual * microbatches < (virtual + 1) * ranks:  # one larger group holds no more
        assert seconds("interleaved", ranks, virtual, microbatches) == 3 * (virtual * microbatches + ranks - 1)
    if microbatches <= ranks:  # a group of its own: as long as the way through all stages, and what follows the first
        assert seconds("interleaved", ranks, virtual, microbatches) == 3 * (ranks * virtual + microbatches - 1)


@settings(deadline=None, max_examples=80)
@given(ranks=st.integers(1, 8), more=st.integers(0, 12))
def test_a_split_backward_makes_the_bubble_a_third(ranks, more):
    microbatches = ranks + more
    assert seconds("zb_h1", ranks, 1, microbatches) == 3 * microbatches + ranks - 1
    assert seconds("zb_v", ranks, 2, microbatches) == 6 * microbatches + ranks - 1
    assert seconds("dualpipev", ranks, 2, microbatches + ranks) == 6 * (microbatches + ranks) + ranks - 1


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 20))
def test_activations_held(ranks, microbatches):
    def peak(name, virtual):
        return simulate(build(name, ranks, virtual, microbatches)).peak

    most = min(ranks, microbatches)
    assert peak("gpipe", 2) == (2 * microbatches,) * ranks
    assert peak("1f1b", 1) == tuple(min(ranks - rank, microbatches) for rank in range(ranks))
    assert peak("eager_1f1b", 1) == tuple(min(2 * (ranks - rank) - 1, microbatches) for rank in range(ranks))
    assert peak("zb_h1", 1) == (most,) * ranks
    assert max(peak("zb_v", 2)) <= 2 * most
    assert max(peak("dualpipev", 2)) <= min(2 * ranks + 1, 2 * microbatches)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("virtual", [2, 4])
@pytest.mark.parametrize("name", ["interleaved", "interleaved_zb"])
def test_activations_held_by_interleaved_stages(ranks, virtual, name):
    assert max(simulate(build(name, ranks, virtual, 3 * ranks)).peak) == (virtual - 1) * ranks + 2 * ranks - 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("transfer", [0.2, 0.5])
def test_eager_hides_what_is_exposed_in_steady_state(ranks, transfer):
    plain, eager = (simulate(build(name, ranks, 1, 4 * ranks), transfer=transfer) for name in ("1f1b", "eager_1f1b"))
    # A way through all stages and back is left, at the beginning and at the end.
    assert eager.exposed == pytest.approx(2 * (ranks - 1) * transfer)
    assert plain.exposed > 1.5 * eager.exposed


# -- the simulator, by hand ----------------------------------------------------------------------------------------------


def test_a_transfer_stands_between_stages():
    run = simulate(build("1f1b", 2, 1, 1), transfer=0.5)
    assert run.spans == (
        (0, Action("F", 0, 0), 0.0, 1.0),
        (1, Action("F", 1, 0), 1.5, 2.5),
        (1, Action("B", 1, 0), 2.5, 4.5),
        (0, Action("B", 0, 0), 5.0, 7.0),
    )
    assert (run.seconds, run.exposed, run.busy, run.peak) == (7.0, 1.0, (3.0, 3.0), (1, 1))
    assert run.bubble == pytest.approx(1 - 3 / 7)


def test_a_link_carries_one_transfer_at_a_time():
    made = build("gpipe", 2, 1, 3)
    starts = {str(action): start for _, action, start, _ in simulate(made, transfer=2.0).spans}
    assert [starts[f"F1.{m}"] for m in range(3)] == [3.0, 5.0, 7.0]
    assert [starts[f"B0.{m}"] for m in range(3)] == [12.0, 14.0, 16.0]


def test_what_goes_on_and_what_goes_back_share_a_ranks_link():
    made = parse("F0.0 F0.1 B0.0 B0.1\nF1.0 B1.0 F1.1 B1.1\nF2.0 B2.0 F2.1 B2.1\n")
    starts = {str(action): start for _, action, start, _ in simulate(made, transfer=4.0).spans}
    # B1.0 ends at 19 and sends until 23; F1.1 ends at 20, and what it gives is there 4 after that.
    assert (starts["B0.0"], starts["F1.1"], starts["F2.1"]) == (23.0, 19.0, 27.0)


def test_the_plain_twin_stands_still_at_both_ends():
    run = simulate(build("gpipe", 2, 1, 3), transfer=2.0, overlapped=False)
    spans = {str(action): (start, end) for _, action, start, end in run.spans}
    assert [spans[f"F0.{m}"] for m in range(3)] == [(0.0, 1.0), (3.0, 4.0), (6.0, 7.0)]
    assert [spans[f"F1.{m}"] for m in range(3)] == [(3.0, 4.0), (6.0, 7.0), (9.0, 10.0)]
    assert spans["B1.0"] == (10.0, 12.0)
    assert (run.seconds, run.busy) == (24.0, (9.0, 9.0))


@settings(deadline=None, max_examples=150)
@given(made=schedules)
def test_the_plain_twin_never_waits_for_ever(made):
    """Run by ranks that know their own places only: a transfer is over when both ends have come to it."""
    places = [between(made, rank) for rank in range(made.ranks)]
    at, posted, over = [0] * made.ranks, Counter(), []
    for rank in range(made.ranks):
        posted.update(places[rank][0])
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(made.actions):
            if at[rank] < len(row) and all(posted[item] == 2 for item in places[rank][at[rank]]):
                gave = {*sent_after(over, made.stages)}
                stage, microbatch = row[at[rank]].stage, row[at[rank]].microbatch
                needs = [Action("F", stage - 1, microbatch)] if row[at[rank]].kind == "F" and stage else []
                assert gave.issuperset(needs)
                over.append(row[at[rank]])
                at[rank] += 1
                posted.update(places[rank][at[rank]])
                moved = True
    assert at == [len(row) for row in made.actions]
    hops = sum(a != b for a, b in pairwise(made.placement))
    assert Counter(posted.values()) == Counter({2: 2 * hops * made.microbatches} if hops else {})


def test_nothing_is_sent_within_a_rank():
    made = build("zb_v", 1, 2, 3)
    assert simulate(made, transfer=5.0).seconds == simulate(made).seconds


# -- a head's gradients put off ---------------------------------------------------------------------------------------------


def test_a_head_put_off_by_hand():
    """The last stage waits for its last forward, for as long as the head's gradients take; if it is heavier, it never does."""
    made = build("1f1b", 2, 1, 3)
    one_in_the_gap = "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"
    assert [defer(made, [1, f], [2, 2 * f], 1).text().splitlines()[2] for f in (1, 2)] == [one_in_the_gap] * 2
    free = simulate(made).seconds, simulate(made, forward=[1, 2], backward=[2, 4]).seconds
    assert free == (12, 21)
    for f, before in zip((1, 2), free, strict=True):
        times = {"forward": [1, f], "backward": [2, 2 * f]}
        assert simulate(defer(made, *times.values(), 1), **times, weight=[0, 1]).seconds == before - 2


def test_more_is_left_where_it_wins_more():
    rows = [defer(build("eager_1f1b", 2, 1, 4), [4, 4], [8, 8], 1, limit).text().splitlines()[2] for limit in (1, 2, 0)]
    assert rows == [
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 F1.3 I1.3 W1.2 W1.3",
        "F1.0 I1.0 F1.1 I1.1 F1.2 I1.2 W1.0 F1.3 I1.3 W1.1 W1.2 W1.3",
        "F1.0 I1.0 F1.1 I1.1 F1.2 I1.2 F1.3 I1.3 W1.0 W1.1 W1.2 W1.3",
    ]


@settings(deadline=None, max_examples=100)
@given(
    made=schedules.filter(lambda made: made.ranks > 1 and not made.splits_backward),
    block=st.floats(0.1, 3),
    head=st.floats(0, 3),
    limit=st.integers(0, 4),
)
def test_a_head_put_off(made, block, head, limit):
    forward = [block] * (made.stages - 1) + [block + head]
    backward = [2 * f for f in forward]
    later = defer(made, forward, backward, head, limit)
    validate(later)
    last, rank = made.stages - 1, made.placement[-1]
    row = later.actions[rank]
    assert [a.result for a in row if a.kind != "W"] == list(made.actions[rank])
    assert [a.microbatch for a in row if a.kind == "W"] == [
        a.microbatch for a in made.actions[rank] if a.kind == "B" and a.stage == last
    ]
    left = most = 0
    for action in row:
        left += {"I": 1, "W": -1}.get(action.kind, 0)
        most = max(most, left - (action.kind == "I"))  # its own may be computed at once
    assert left == 0
    assert most <= limit or not limit
    before = simulate(made, forward=forward, backward=backward).seconds
    after = simulate(later, forward=forward, backward=backward, weight=[*forward[:-1], head])
    assert after.seconds <= before * (1 + 1e-9)
    if made.stages == made.ranks:  # the ranks in front are done sooner by one at least, and the last one is before them
        assert after.seconds <= (before - min(head, 2 * block)) * (1 + 1e-9)


@pytest.mark.parametrize(("name", "virtual", "takes"), [("1f1b", 1, 56), ("eager_1f1b", 1, 54.5), ("interleaved", 2, 102.5)])
def test_what_a_head_put_off_wins(name, virtual, takes):
    """Four ranks, sixteen microbatches, stages that take 3, and a head that is a sixth of the last one's 3."""
    made = build(name, 4, virtual, 16)
    forward, backward = [1.0] * made.stages, [2.0] * made.stages
    later = defer(made, forward, backward, 0.5)
    assert simulate(made).seconds == {1: 57, 2: 105}[virtual]
    assert simulate(later, forward=forward, backward=backward, weight=[*forward[:-1], 0.5]).seconds == takes


def test_a_drawing():
    assert draw(build("1f1b", 2, 1, 2)) == (
        "rank 0  F0.0 F0.1 ..........B0.0      .....B0.1\n"
        "rank 1  .....F1.0 B1.0      F1.1 B1.1\n"
    )  # fmt: skip


def test_times_by_stage():
    run = simulate(build("1f1b", 2, 1, 1), forward=[1.0, 3.0], backward=[2.0, 5.0])
    assert (run.seconds, run.busy) == (11.0, (3.0, 8.0))
    split = simulate(build("zb_h1", 2, 1, 1), backward=[2.0, 5.0], weight=[0.5, 4.0])
    assert [end - start for _, action, start, end in split.spans if action.kind in "IW" and action.stage == 1] == [1.0, 4.0]
    assert split.seconds == 7.0
    with pytest.raises(ConfigError, match="backward has 3 times, but schedule 1f1b has 2 stages"):
        simulate(build("1f1b", 2, 1, 1), backward=[1.0, 2.0, 3.0])


# -- what is wrong is named ----------------------------------------------------------------------------------------------


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
        "1f1b",  # rank 1 waits for a microbatch that rank 0 begins only after the backward of the first
        swapped(Action("F", 1, 0), Action("F", 1, 2)),
        "rank 0 at B0.0, which needs B1.0; rank 1 at F1.2, which needs F0.2",
    ),
]


@pytest.mark.parametrize(("name", "change", "said"), WRONG)
def test_what_is_wrong_is_named(name, change, said):
    with pytest.raises(ConfigError, match=said):
        validate(changed(build(name, 2, 1, 4), 1, change))


def test_a_rank_without_a_stage_is_named():
    with pytest.raises(ConfigError, match=r"has 2 ranks, but its placement names the ranks \[0\]"):
        validate(Schedule("odd", 1, (0,), ((Action("F", 0, 0), Action("B", 0, 0)), ())))


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_a_file_that_is_wrong_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_a_file_has_room_for_remarks():
    made = parse("F0.0 B0.0  # both\n\n   # of the other\nF1.0 B1.0 # too")
    assert made.placement == (0, 1)
    assert made.actions == build("1f1b", 2, 1, 1).actions
    assert parse("# my own\nF0.0 B0.0").name == "my own"


@pytest.mark.parametrize(
    ("name", "virtual", "group", "said"),
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
def test_schedules_that_there_are_not(name, virtual, group, said):
    with pytest.raises(ConfigError, match=said):
        build(name, 2, virtual, 4, group=group)
