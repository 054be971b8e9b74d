"""A rank's part of a tensor, as torch's distributed checkpoints read and write it: in boxes of the whole tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def boxes(shape: Sequence[int], start: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that tile the run [start, end) of a tensor's elements, in their order.

    At most ``2 * len(shape) - 1``: the end of a first row, whole rows, the start of a last one, and so on inside a row.
    """
    if start >= end:
        return []
    if not shape:
        return [((), ())]
    inner = shape[1:]
    row = math.prod(inner)
    first, into_first = divmod(start, row)
    last, into_last = divmod(end, row)
    if first == last:
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, into_first, into_last)]
    found = []
    if into_first:
        found += [((first, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, into_first, row)]
        first += 1
    if first < last:
        found.append(((first, *[0] * len(inner)), (last - first, *inner)))
    if into_last:
        found += [((last, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, 0, into_last)]
    return found


Spans = tuple[tuple[int, int], ...]
"""Runs along a dim of a tensor: where each starts, and its length."""


def _ranges(spans: Spans, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """A run of a piece that was put together from spans, in parts that lie together in the whole.

    Yields:
        Where a part starts in the run, its length, and where it starts in the whole.
    """
    first = 0
    for in_whole, n in spans:
        low, high = max(first, start), min(first + n, start + length)
        if low < high:
            yield low - start, high - low, in_whole + low - first
        first += n


@dataclass(frozen=True)
class Place:
    """Where a piece that was cut out of a tensor lies in it: a product of cuts along dims.

    Attributes:
        shape: of the whole.
        spans: by dim that is cut: of what the piece is put together, in its order.
    """

    shape: torch.Size
    spans: Mapping[int, Spans]

    @property
    def piece(self) -> torch.Size:
        """The piece's shape."""
        sizes = {dim: sum(n for _, n in spans) for dim, spans in self.spans.items()}
        return torch.Size([sizes.get(dim, n) for dim, n in enumerate(self.shape)])

    def _along(self, dim: int) -> Spans:
        return self.spans.get(dim, ((0, self.shape[dim]),))

    def cut(self, inner: Place) -> Place:
        """Where a piece of this piece lies in the whole.

        Args:
            inner: where it lies in this piece.
        """
        assert inner.shape == self.piece, "the inner cut is one of this piece"
        spans = dict(self.spans)
        for dim, parts in inner.spans.items():
            spans[dim] = tuple((there, n) for start, length in parts for _, n, there in _ranges(self._along(dim), start, length))
        return Place(self.shape, spans)

    def boxes(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
        """A box of the piece as boxes of the whole: each is a part of the box, and has offsets in the whole."""
        ranges = [list(_ranges(self._along(dim), start, n)) for dim, (start, n) in enumerate(zip(offsets, sizes, strict=True))]
        for parts in itertools.product(*ranges):
            yield tuple(slice(low, low + n) for low, n, _ in parts), tuple(there for _, _, there in parts)


class Run:
    """A contiguous run of the elements of a tensor, or of a piece that was cut out of one.

    Args:
        shape: the tensor's, or the piece's.
        start: where the run starts in it, in elements.
        flat: the run's elements: a view, when it is to be loaded into.
        place: of the piece; None for a tensor that is whole.
    """

    def __init__(self, shape: torch.Size, start: int, flat: Tensor, place: Place | None = None) -> None:
        self.shape = shape
        self.start = start
        self.flat = flat
        self.place = place

    def size(self) -> torch.Size:
        """The whole tensor's, which torch compares with what was saved."""
        return self.shape if self.place is None else self.place.shape

    def put(self, place: Place | None) -> Run:
        """The same, of a piece that lies there."""
        return Run(self.shape, self.start, self.flat, place)

    def of(self, whole: Tensor) -> Tensor:
        """This run of a whole tensor."""
        return whole.reshape(-1)[self.start : self.start + self.flat.numel()]

    def copy(self) -> Run:
        """The same in memory of its own, on the CPU."""
        return Run(self.shape, self.start, self.flat.to("cpu", copy=True), self.place)

    def _boxes(self) -> Iterator[tuple[torch.Size, Tensor]]:
        """Offsets in the whole tensor, and the elements there: views."""
        first = 0
        for offsets, sizes in boxes(self.shape, self.start, self.start + self.flat.numel()):
            box = self.flat[first : first + math.prod(sizes)].view(sizes)
            first += box.numel()
            if self.place is None:
                yield torch.Size(offsets), box
            else:
                for part, offsets_in_whole in self.place.boxes(offsets, sizes):
                    yield torch.Size(offsets_in_whole), box[part]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.shape) for offsets, box in self._boxes()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offsets, box in self._boxes():
            if offsets == index.offset:
                return box
        raise ValueError(f"{index} is no box of this run")
