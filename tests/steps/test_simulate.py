"""The simulator: what schedules cost and hold, its times by hand, and the order of the plain twin."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.transfers import between, sent_after
from lightning_overlap.steps.named_schedules import build
from lightning_overlap.steps.pairs import pair
from lightning_overlap.steps.schedule import Action, parse, validate
from lightning_overlap.steps.simulate import draw, simulate
from tests.helpers.schedules import schedules


@settings(deadline=None, max_examples=100)
@given(
    made=schedules,
    forward=st.floats(0.1, 3),
    backward=st.floats(0.1, 3),
    part=st.floats(0, 1),
    transfer=st.floats(0, 2),
)
def test_every_schedule_can_be_simulated(made, forward, backward, part, transfer):
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


# -- time and activations, with forwards of 1 and backwards of 2, half of it for weights ------------------------------------


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
    """An incomplete group, as in the last batch, takes no longer than a full one, and holds no more activations."""
    filled = -(-microbatches // ranks) * ranks
    for name in ("interleaved", "interleaved_zb"):
        run, full = (simulate(build(name, ranks, virtual, m)) for m in (microbatches, filled))
        most = simulate(build(name, ranks, virtual, 3 * ranks))
        assert run.seconds <= simulate(build("interleaved", ranks, virtual, filled)).seconds
        assert max(run.peak) <= max(full.peak) if microbatches == filled else max(run.peak) <= max(most.peak)
    assert seconds("interleaved_zb", ranks, virtual, microbatches) <= seconds("interleaved", ranks, virtual, microbatches)
    if microbatches >= ranks and virtual * microbatches < (virtual + 1) * ranks:  # one larger group holds no more
        assert seconds("interleaved", ranks, virtual, microbatches) == 3 * (virtual * microbatches + ranks - 1)
    if microbatches <= ranks:  # one group: the first microbatch passes all stages, and the others follow it
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
def test_eager_hides_transfers_in_steady_state(ranks, transfer):
    plain, eager = (simulate(build(name, ranks, 1, 4 * ranks), transfer=transfer) for name in ("1f1b", "eager_1f1b"))
    # Only the first way through all stages, and the last way back, are exposed.
    assert eager.exposed == pytest.approx(2 * (ranks - 1) * transfer)
    assert plain.exposed > 1.5 * eager.exposed


# -- the simulator, by hand ----------------------------------------------------------------------------------------------


def test_a_transfer_delays_the_next_stage():
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


def test_both_directions_share_a_ranks_link():
    made = parse("F0.0 F0.1 B0.0 B0.1\nF1.0 B1.0 F1.1 B1.1\nF2.0 B2.0 F2.1 B2.1\n")
    starts = {str(action): start for _, action, start, _ in simulate(made, transfer=4.0).spans}
    # B1.0 ends at 19 and sends until 23. F1.1 ends at 20, and its result arrives 4 after 23.
    assert (starts["B0.0"], starts["F1.1"], starts["F2.1"]) == (23.0, 19.0, 27.0)


def test_both_ranks_of_the_plain_twin_wait_for_a_transfer():
    run = simulate(build("gpipe", 2, 1, 3), transfer=2.0, overlapped=False)
    spans = {str(action): (start, end) for _, action, start, end in run.spans}
    assert [spans[f"F0.{m}"] for m in range(3)] == [(0.0, 1.0), (3.0, 4.0), (6.0, 7.0)]
    assert [spans[f"F1.{m}"] for m in range(3)] == [(3.0, 4.0), (6.0, 7.0), (9.0, 10.0)]
    assert spans["B1.0"] == (10.0, 12.0)
    assert (run.seconds, run.busy) == (24.0, (9.0, 9.0))


@settings(deadline=None, max_examples=150)
@given(made=schedules)
def test_the_plain_twin_never_deadlocks(made):
    """Simulates ranks that know only their own transfers: a transfer is complete when both ranks have reached it."""
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


def test_stages_of_one_rank_need_no_transfer():
    made = build("zb_v", 1, 2, 3)
    assert simulate(made, transfer=5.0).seconds == simulate(made).seconds


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


# -- pairs -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(made=schedules, waits=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_pairs_of_every_schedule(made, waits):
    paired = pair(made)
    validate(paired)
    assert parse(paired.text()).actions == paired.actions
    assert parse(paired.text()).paired == paired.paired
    for row, old in zip(paired.actions, made.actions, strict=True):
        assert Counter(row) == Counter(old)
        for kinds in ("F", "BI", "W"):  # sums of gradients have the same order
            assert [a for a in row if a.kind in kinds] == [a for a in old if a.kind in kinds]
    run = simulate(paired, waits=waits)
    assert run.seconds >= simulate(paired).seconds
    if made.ranks == 1 and not made.splits_backward:
        assert run.seconds <= simulate(made, waits=waits).seconds + 1e-9


def test_one_process_pairs_all_but_the_first_forward_and_the_last_backward():
    paired = pair(build("1f1b", 1, 1, 4))
    assert paired.text().splitlines()[1] == "F0.0 F0.1|B0.0 F0.2|B0.1 F0.3|B0.2 B0.3"
    # A pair of 1 + 2 hides waits of 1.5 + 1.5; alone they are exposed: 2.5, three pairs of the longer lane, 3.5
    assert simulate(paired, waits=(1.5, 1.5)).seconds == 2.5 + 3 * 3.5 + 3.5
    assert simulate(paired, waits=(0.5, 1.0)).seconds == 1.5 + 3 * 3 + 3
    assert simulate(pair(build("1f1b", 1, 1, 4)), waits=(0.5, 1.0)).exposed == 1.5


def test_pairs_at_which_ranks_would_wait_forever_are_split():
    assert not pair(build("1f1b", 2, 1, 4)).paired
    assert len(pair(build("eager_1f1b", 2, 1, 4)).paired) == 5


@pytest.mark.parametrize("text", ["F0.0|B0.0", "F0.0 B0.0|", "F0.0 B0.0|F0.1 B0.1", "F0.0|F0.1|B0.0 B0.1"])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(ConfigError, match="is no pair of an F and another microbatch's B or I"):
        parse(text)
