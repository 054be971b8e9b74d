"""Bucket layouts against the reference's oracles, and the properties that every layout has."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_overlap.modes.data.layout import bucket_multiple, lateness, lay_out, pad


def sizes(buckets):
    return [b.end - b.start for b in buckets]


def unpadded(buckets):
    return [b.slots[-1].end - b.start for b in buckets]


def test_padding():
    assert [pad(offset, 64) for offset in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
    assert pad(1, bucket_multiple(4)) == 128
    assert pad(1, bucket_multiple(4, high_busbw=True)) == 65536
    assert pad(128, bucket_multiple(2)) == 128


def test_reverse_order_without_padding():
    (bucket,) = lay_out([10000, 2500], bucket_size=None, sharded=False)
    assert [(s.parameter, s.start, s.end) for s in bucket.slots] == [(1, 0, 2500), (0, 2500, 12500)]
    assert sizes(lay_out([10000] * 3, bucket_size=15000, sharded=False)) == [20000, 10000]


@pytest.mark.parametrize(("busbw", "starts"), [(False, [0, 5056, 10112]), (True, [0, 5056, 65536])])
def test_sharded_starts_and_ends(busbw, starts):
    buckets = lay_out([5000] * 3, bucket_size=8000, shards=2, sharded=True, high_busbw=busbw)
    assert [s.start for b in buckets for s in b.slots] == starts
    assert unpadded(buckets) == [10056, 5000]
    assert [(b.start, b.end) for b in buckets] == ([(0, 65536), (65536, 131072)] if busbw else [(0, 10112), (10112, 15232)])


def test_buckets_grow_towards_the_middle():
    grown = sizes(lay_out([100] * 96, bucket_size=300, largest=10_000, sharded=False))
    assert grown == [300, 300, 300, 500, 700, 1100, 1600, 1600, 1100, 700, 500, 300, 300, 300], "a 32nd of all at both ends"
    assert max(sizes(lay_out([100] * 96, bucket_size=300, largest=700, sharded=False))) == 700
    assert set(sizes(lay_out([100] * 96, bucket_size=300, largest=200, sharded=False))) == {300}


LINEAR, BIAS = [9025] * 10, [9025, 95] * 10


@pytest.mark.parametrize(
    ("parameters", "bucket_size", "plain", "sharded"),
    [
        (LINEAR, None, [90250], [(90817, 90880)]),
        (LINEAR, 9000, [9025] * 10, [(9025, 9088)] * 10),
        (LINEAR, 9025, [9025] * 10, [(9025, 9088)] * 10),
        (LINEAR, 9050, [18050] * 5, [(18113, 18176)] * 5),
        (LINEAR, 18000, [18050] * 5, [(18113, 18176)] * 5),
        (LINEAR, 20000, [27075] * 3 + [9025], [(27201, 27264)] * 3 + [(9025, 9088)]),
        (BIAS, None, [91200], [(92097, 92160)]),
        (BIAS, 9050, [9120] * 10, [(9153, 9216)] * 10),
        (BIAS, 18050, [18240] * 5, [(18369, 18432)] * 5),
        (BIAS, 20000, [27360] * 3 + [9120], [(27585, 27648)] * 3 + [(9153, 9216)]),
    ],
)
@pytest.mark.parametrize("shards", [2, 8])
def test_reference_bucket_sizes(parameters, bucket_size, plain, sharded, shards):
    assert sizes(lay_out(parameters, bucket_size=bucket_size, sharded=False)) == plain
    buckets = lay_out(parameters, bucket_size=bucket_size, shards=shards, sharded=True)
    assert list(zip(unpadded(buckets), sizes(buckets), strict=True)) == sharded


@given(
    parameters=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    bucket_size=st.none() | st.integers(1, 20000),
    shards=st.integers(1, 8),
    whole=st.booleans(),
)
def test_every_layout(parameters, bucket_size, shards, whole):
    buckets = lay_out(parameters, bucket_size=bucket_size, shards=shards, sharded=True)
    slots = [s for b in buckets for s in b.slots]
    assert [s.parameter for s in slots] == list(reversed(range(len(parameters))))
    assert [s.end - s.start for s in slots] == list(reversed(parameters))
    assert buckets[0].start == 0
    assert all(a.end == b.start for a, b in itertools.pairwise(buckets))
    for bucket in buckets:
        bounds = bucket.bounds(shards, whole_parameters=whole)
        assert bounds[0] == 0
        assert bounds[-1] == bucket.end - bucket.start
        assert list(bounds) == sorted(bounds)
        assert len(bounds) == shards + 1
        if whole:
            starts = {s.start - bucket.start for s in bucket.slots}
            assert set(bounds[1:-1]) <= starts | {0, bounds[-1]}
        else:
            assert len({b - a for a, b in itertools.pairwise(bounds)}) == 1


def test_lateness_of_layouts():
    sizes = [100] * 8
    buckets = lay_out(sizes, bucket_size=200, sharded=False)
    backward, scattered = [7, 6, 5, 4, 3, 2, 1, 0], [7, 5, 3, 1, 6, 4, 2, 0]
    # As laid out: buckets are there after 2, 4, 6 and 8 of 8 gradients.
    assert lateness(buckets, sizes, backward) == pytest.approx((2 + 4 + 6 + 8) / 4 / 8)
    # Scattered: 7 and 6 are there after the 5th, and so on.
    assert lateness(buckets, sizes, scattered) == pytest.approx((5 + 6 + 7 + 8) / 4 / 8)


@given(st.permutations(range(12)))
def test_following_the_order_seen_is_never_later(order):
    sizes = [100 + i for i in range(12)]
    seen = [sizes[i] for i in reversed(order)]
    then = lateness(lay_out(seen, bucket_size=250, sharded=False), seen, range(11, -1, -1))
    assert then <= lateness(lay_out(sizes, bucket_size=250, sharded=False), sizes, order) + 0.1
