"""Which blocks each stage holds."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.layout import balanced, counted, expand, parse


def worst(costs, layout, first, last):
    sums = [sum(costs[i] for i in stage) for stage in layout]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 20), st.integers(0, 20))
def test_balanced_is_the_best_there_is(costs, stages, first, last):
    if stages > len(costs):
        with pytest.raises(ConfigError, match=f"at most {len(costs)}"):
            balanced(costs, stages, first=first, last=last)
        return
    made = balanced(costs, stages, first=first, last=last)
    assert [number for stage in made for number in stage] == list(range(len(costs)))
    assert all(made)
    every = ([0, *cuts, len(costs)] for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
    best = min(worst(costs, [range(a, b) for a, b in itertools.pairwise(bounds)], first, last) for bounds in every)
    assert worst(costs, made, first, last) == best


def test_balanced_gives_early_stages_more_where_it_is_the_same():
    assert [len(stage) for stage in balanced([1] * 7, 4)] == [2, 2, 2, 1]
    assert [len(stage) for stage in balanced([1] * 8, 4)] == [2, 2, 2, 2]


def test_counted():
    assert counted([1, 3, 0], 4, 3) == (range(0, 1), range(1, 4), range(4, 4))
    for counts in ([2, 2], [1, 2, 2], [5, -1, 0]):
        with pytest.raises(ConfigError, match="layers_per_stage"):
            counted(counts, 4, 3)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("xy(ab|cd|ef)*2,pq", "xyab|cd|efab|cd|efpq"),
        ("ab,(cd|)*2", "abcd|cd|"),
        ("(|ab)*2,cd", "|ab|abcd"),
        ("E|t*3|(t|)*5L", "E|ttt|t|t|t|t|t|L"),
        ("((a|)*2b)*2", "a|a|ba|a|b"),
    ],
)
def test_expand(text, plain):
    assert expand(text) == plain


@pytest.mark.parametrize("text", ["(ab", "a)b", "a*", "*3", "a**2"])
def test_what_cannot_be_expanded_is_refused(text):
    with pytest.raises(ConfigError, match="out of place"):
        expand(text)


def test_parse():
    made = parse("Et*3|(tt|)*29,tL", 62, 31)
    assert [len(stage) for stage in made] == [3, *[2] * 29, 1]
    assert parse("E||t|L", 1, 4) == (range(0, 0), range(0, 0), range(0, 1), range(1, 1))


@pytest.mark.parametrize(
    ("text", "blocks", "stages", "said"),
    [
        ("Et|mL", 1, 2, "multi-token"),
        ("tE|tL", 2, 2, "one E"),
        ("Et|t", 2, 2, "one L"),
        ("|Et|tL", 2, 3, "first stage"),
        ("Et|tL|", 2, 3, "last"),
        ("Et|tL", 2, 4, "has 2 stages, but there are 4"),
        ("Et|tL", 8, 2, "has 2 blocks, but the model has 8"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(text, blocks, stages, said):
    with pytest.raises(ConfigError, match=said):
        parse(text, blocks, stages)
