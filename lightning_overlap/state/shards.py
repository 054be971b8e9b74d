"""Shards of tensors for torch.distributed.checkpoint, which reads and writes them as boxes of the unsharded tensor."""

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
    """Returns offsets and sizes of the boxes that tile the elements [start, end) of a tensor, in the order of the elements.

    At most ``2 * len(shape) - 1`` boxes: the end of the first row, complete rows, the start of the last row, and so on inside a row.
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
    tiles = []
    if into_first:
        tiles += [((first, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, into_first, row)]
        first += 1
    if first < last:
        tiles.append(((first, *[0] * len(inner)), (last - first, *inner)))
    if into_last:
        tiles += [((last, *offsets), (1, *sizes)) for offsets, sizes in boxes(inner, 0, into_last)]
    return tiles


Spans = tuple[tuple[int, int], ...]
"""Ranges along a dim of a tensor: start and length of each."""


def _ranges(spans: Spans, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Divides a range of a piece, which is a concatenation of spans, into parts that are contiguous in the unsharded tensor.

    Yields:
        The start of a part in the range, its length, and its start in the unsharded tensor.
    """
    first = 0
    for offset, n in spans:
        low, high = max(first, start), min(first + n, start + length)
        if low < high:
            yield low - start, high - low, offset + low - first
        first += n


@dataclass(frozen=True)
class Place:
    """The position of a shard in the unsharded tensor: a product of spans along dims.

    Attributes:
        shape: of the unsharded tensor.
        spans: by sharded dim, the ranges of the unsharded tensor whose concatenation is the shard.
    """

    shape: torch.Size
    spans: Mapping[int, Spans]

    @property
    def piece(self) -> torch.Size:
        """The shard's shape."""
        sizes = {dim: sum(n for _, n in spans) for dim, spans in self.spans.items()}
        return torch.Size([sizes.get(dim, n) for dim, n in enumerate(self.shape)])

    def _along(self, dim: int) -> Spans:
        return self.spans.get(dim, ((0, self.shape[dim]),))

    def cut(self, inner: Place) -> Place:
        """Returns the position, in the unsharded tensor, of a shard of this shard.

        Args:
            inner: its position in this shard.
        """
        assert inner.shape == self.piece, "the inner position is one in this shard"
        spans = dict(self.spans)
        for dim, parts in inner.spans.items():
            spans[dim] = tuple((offset, n) for start, length in parts for _, n, offset in _ranges(self._along(dim), start, length))
        return Place(self.shape, spans)

    def boxes(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
        """Divides a box of the shard into boxes that are contiguous in the unsharded tensor.

        Yields:
            A part of the box, as slices of it, and the part's offsets in the unsharded tensor.
        """
        ranges = [list(_ranges(self._along(dim), start, n)) for dim, (start, n) in enumerate(zip(offsets, sizes, strict=True))]
        for parts in itertools.product(*ranges):
            yield tuple(slice(low, low + n) for low, n, _ in parts), tuple(offset for _, _, offset in parts)


class Run:
    """A contiguous run of the elements of a tensor or of a shard.

    Args:
        shape: of the tensor or the shard.
        start: the first element's index in it.
        flat: the elements, 1-dimensional; a view, if the caller loads into it.
        place: position of the shard; None for an unsharded tensor.
    """

    def __init__(self, shape: torch.Size, start: int, flat: Tensor, place: Place | None = None) -> None:
        self.shape = shape
        self.start = start
        self.flat = flat
        self.place = place

    def size(self) -> torch.Size:
        """The shape of the unsharded tensor, which torch compares with the saved one."""
        return self.shape if self.place is None else self.place.shape

    def at(self, place: Place | None) -> Run:
        """Returns the same run of a shard with this position."""
        return Run(self.shape, self.start, self.flat, place)

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the elements of this run in another tensor of the same shape."""
        return tensor.reshape(-1)[self.start : self.start + self.flat.numel()]

    def copy(self) -> Run:
        """Returns a copy on the CPU."""
        return Run(self.shape, self.start, self.flat.to("cpu", copy=True), self.place)

    def _boxes(self) -> Iterator[tuple[torch.Size, Tensor]]:
        """Yields offsets in the unsharded tensor, and a view of the elements there."""
        first = 0
        for offsets, sizes in boxes(self.shape, self.start, self.start + self.flat.numel()):
            box = self.flat[first : first + math.prod(sizes)].view(sizes)
            first += box.numel()
            if self.place is None:
                yield torch.Size(offsets), box
            else:
                for part, unsharded_offsets in self.place.boxes(offsets, sizes):
                    yield torch.Size(unsharded_offsets), box[part]

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
        raise ValueError(f"{index} is not a box of this run")
