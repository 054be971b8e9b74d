"""Boxes tile a run."""

import copy
import itertools
import math
import pickle

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from lightning_overlap.state.shards import Place, Run, boxes, is_absent, leave, take


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


@st.composite
def placed_runs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    spans, start = [], 0
    while start < shape[dim]:
        n = draw(st.integers(0, shape[dim] - start))
        spans.append((start, n))
        start += n + draw(st.integers(0, 2)) + (n == 0)
    place = Place(torch.Size(shape), dim, tuple(spans))
    first = draw(st.integers(0, place.own.numel()))
    return place, first, draw(st.integers(first, place.own.numel()))


@settings(deadline=None)
@given(placed_runs())
def test_a_run_of_a_piece_is_where_it_lies_in_the_whole(case):
    place, start, end = case
    whole = torch.arange(place.shape.numel()).view(place.shape)
    piece = torch.cat([whole.narrow(place.dim, there, n) for there, n in place.spans], place.dim)
    assert piece.shape == place.own
    mine = Run(piece.shape, start, piece.reshape(-1)[start:end], place)
    assert mine.size() == place.shape
    found = []
    for chunk in mine.__create_chunk_list__():
        box = mine.__get_tensor_shard__(MetadataIndex("x", chunk.offsets))
        there = whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]
        assert box.equal(there)
        found += box.flatten().tolist()
    assert sorted(found) == sorted(piece.reshape(-1)[start:end].tolist())


def test_writes_to_what_is_absent_write_nothing():
    module, here = nn.Linear(4, 3, bias=False).requires_grad_(False), nn.Parameter(torch.ones(3, 4))
    absent = module.weight
    leave(absent)
    with torch.no_grad():
        absent.clamp_(0, 1)
        absent.copy_(here)
        absent.data[:2].zero_()
        absent[0] = 3
        absent /= absent.norm(dim=1, keepdim=True)
        nn.init.normal_(absent)
        torch._foreach_mul_([absent, here], [2.0, 3.0])
    assert is_absent(absent)
    assert absent.isnan().all()
    assert here.eq(3).all(), "of a list, what is here is written"
    assert type(absent + 1) is torch.Tensor
    assert is_absent(copy.deepcopy(module).weight)
    assert type(pickle.loads(pickle.dumps(module)).weight) is nn.Parameter
    take(absent, room=True)
    assert type(absent) is nn.Parameter
    assert not is_absent(absent)
