"""A rank's part of a tensor, as torch's distributed checkpoints read and write it: in boxes of the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Place:
    """Where a piece that was cut out of a tensor lies in it.

    Attributes:
        shape: of the whole.
        dim: along which it was cut.
        spans: of what the piece is put together, in its order: where each span starts in the whole, and its length.
    """

    shape: torch.Size
    dim: int
    spans: tuple[tuple[int, int], ...]

    @property
    def own(self) -> torch.Size:
        """The piece's shape."""
        return torch.Size([*self.shape[: self.dim], sum(n for _, n in self.spans), *self.shape[self.dim + 1 :]])

    def boxes(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """A box of the piece as boxes of the whole: each is a part of it along the dim (first, length), and has offsets there."""
        start, d = 0, self.dim
        for there, n in self.spans:
            low, high = max(start, offsets[d]), min(start + n, offsets[d] + sizes[d])
            if low < high:
                yield low - offsets[d], high - low, (*offsets[:d], there + low - start, *offsets[d + 1 :])
            start += n


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
                for low, n, there in self.place.boxes(offsets, sizes):
                    yield torch.Size(there), box.narrow(self.place.dim, low, n)

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


def is_absent(tensor: Tensor) -> bool:
    """Whether it stands for a tensor that is on another rank: of its shape, and with the memory of one element."""
    return tensor.numel() > 1 and all(stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def absent_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """What stands for it elsewhere. Not a number: what should not have been used shows."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device or tensor.device).expand(tensor.shape)
