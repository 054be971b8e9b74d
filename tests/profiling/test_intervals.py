import itertools

from hypothesis import given
from hypothesis import strategies as st

from lightning_overlap.profiling.intervals import difference, intersection, length, union

SETS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


def instants(intervals):
    """The unit cells that they cover: the specification."""
    return {cell for start, end in intervals for cell in range(start, end)}


@given(SETS, SETS)
def test_they_are_sets_of_instants(a, b):
    assert instants(union(a)) == instants(a)
    assert instants(intersection(a, b)) == instants(a) & instants(b)
    assert instants(difference(a, b)) == instants(a) - instants(b)
    assert length(a) == len(instants(a))


@given(SETS, SETS)
def test_results_are_disjoint_and_in_order(a, b):
    for result in (union(a), intersection(a, b), difference(a, b)):
        assert all(start < end for start, end in result)
        assert all(first[1] < second[0] for first, second in itertools.pairwise(result))
