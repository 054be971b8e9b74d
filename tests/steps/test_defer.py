"""Deferral: a part of the last stage's gradients of weights runs later, and the step ends sooner."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_overlap.steps.defer import defer
from lightning_overlap.steps.named_schedules import build
from lightning_overlap.steps.schedule import validate
from lightning_overlap.steps.simulate import simulate
from tests.helpers.schedules import schedules


def test_deferral_by_hand():
    """The last stage waits for its last forward, for as long as the head's gradients take; if the head is heavier, it never waits."""
    made = build("1f1b", 2, 1, 3)
    one_in_the_gap = "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"
    assert [defer(made, [1, f], [2, 2 * f], 1).text().splitlines()[2] for f in (1, 2)] == [one_in_the_gap] * 2
    free = simulate(made).seconds, simulate(made, forward=[1, 2], backward=[2, 4]).seconds
    assert free == (12, 21)
    for f, before in zip((1, 2), free, strict=True):
        times = {"forward": [1, f], "backward": [2, 2 * f]}
        assert simulate(defer(made, *times.values(), 1), **times, weight=[0, 1]).seconds == before - 2


def test_more_is_deferred_where_it_gains_more():
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
def test_deferral_keeps_the_schedule_and_saves_time(made, block, head, limit):
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
        most = max(most, left - (action.kind == "I"))  # its own W may follow at once
    assert left == 0
    assert most <= limit or not limit
    before = simulate(made, forward=forward, backward=backward).seconds
    after = simulate(later, forward=forward, backward=backward, weight=[*forward[:-1], head])
    assert after.seconds <= before * (1 + 1e-9)
    if made.stages == made.ranks:  # earlier ranks end one W sooner at least, and the last rank ends before them
        assert after.seconds <= (before - min(head, 2 * block)) * (1 + 1e-9)


@pytest.mark.parametrize(("name", "virtual", "takes"), [("1f1b", 1, 56), ("eager_1f1b", 1, 54.5), ("interleaved", 2, 102.5)])
def test_the_gain_of_deferral(name, virtual, takes):
    """Four ranks, sixteen microbatches, stages that take 3, of which the head of the last one takes a sixth."""
    made = build(name, 4, virtual, 16)
    forward, backward = [1.0] * made.stages, [2.0] * made.stages
    later = defer(made, forward, backward, 0.5)
    assert simulate(made).seconds == {1: 57, 2: 105}[virtual]
    assert simulate(later, forward=forward, backward=backward, weight=[*forward[:-1], 0.5]).seconds == takes
