"""Boxes tile a run."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from lightning_overlap.state.shards import Place, Run, boxes


@st.composite
def runs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@settings(deadline=None)
@given(runs())
def test_boxes_tile_the_run_in_order(run):
    shape, start, end = run
    numbers = torch.arange(math.prod(shape)).view(shape)
    tiles = boxes(shape, start, end)
    found = [numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] for offsets, sizes in tiles]
    assert list(itertools.chain.from_iterable(tile.flatten().tolist() for tile in found)) == list(range(start, end))
    assert len(tiles) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(runs())
def test_a_run_gives_its_boxes_as_views(run):
    shape, start, end = run
    numbers = torch.arange(math.prod(shape)).view(shape)
    mine = Run(numbers.shape, start, numbers.view(-1)[start:end])
    for item in mine.__create_write_items__("x", mine):
        box = mine.__get_tensor_shard__(MetadataIndex("x", item.index.offset))
        chunk = item.tensor_data.chunk
        there = numbers[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]
        assert box.equal(there)
        assert box.data_ptr() == there.data_ptr()


def draw_spans(draw, length):
    """Some spans of a dim, in order."""
    spans, start = [], 0
    while start < length:
        n = draw(st.integers(0, length - start))
        spans.append((start, n))
        start += n + draw(st.integers(0, 2)) + (n == 0)
    return tuple(spans) or ((0, 0),)


def draw_place(draw, shape):
    dims = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    return Place(torch.Size(shape), {dim: draw_spans(draw, shape[dim]) for dim in dims})


@st.composite
def placed_runs(draw):
    """A run of a piece that one mode, or one after the other, has cut, and the places of both."""
    places = [draw_place(draw, draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))]
    if draw(st.booleans()):
        places.append(draw_place(draw, places[0].piece))
    size = places[-1].piece.numel()
    first = draw(st.integers(0, size))
    return places, first, draw(st.integers(first, size))


def cut(whole, place):
    for dim, spans in place.spans.items():
        whole = torch.cat([whole.narrow(dim, start, n) for start, n in spans], dim)
    return whole


@settings(deadline=None)
@given(placed_runs())
def test_a_run_of_a_piece_is_where_it_lies_in_the_whole(case):
    places, start, end = case
    whole = torch.arange(places[0].shape.numel()).view(places[0].shape)
    piece, place = whole, None
    for each in places:
        assert each.piece == cut(piece, each).shape
        piece, place = cut(piece, each), each if place is None else place.cut(each)
    assert place.piece == piece.shape
    mine = Run(piece.shape, start, piece.reshape(-1)[start:end], place)
    assert mine.size() == whole.shape
    found = []
    for chunk in mine.__create_chunk_list__():
        box = mine.__get_tensor_shard__(MetadataIndex("x", chunk.offsets))
        there = whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]
        assert box.equal(there)
        found += box.flatten().tolist()
    assert sorted(found) == sorted(piece.reshape(-1)[start:end].tolist())
