"""A run of a flattened tensor, described so that torch's distributed checkpoint can save it in the tensor's own shape.

Shards cut through the rows of a matrix. A run [start, end) of a tensor that is flattened row by row is a handful of boxes: the
end of a row, whole rows, the beginning of a row; and so on in each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """The boxes (offsets, sizes) that tile the elements [start, end) of a row-major tensor, in their order.

    At most ``2 * len(shape) - 1``: two more for each dimension.
    """
    if start >= end:
        return []
    if len(shape) <= 1:
        return [((start,), (end - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # inside of one row
        return _inside(shape, last, start - last * row, end - last * row)
    found = _inside(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        found.append(((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return found + (_inside(shape, last, 0, end - last * row) if last * row < end else [])


def _inside(shape: Sequence[int], index: int, start: int, end: int) -> list[Box]:
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], start, end)]


@dataclass(frozen=True)
class Piece:
    """``flat`` holds the elements from ``start`` on of a flattened tensor of this ``shape``.

    The methods with underscores are the protocol of ``torch.distributed.checkpoint`` for objects of others' making.
    """

    flat: Tensor
    shape: torch.Size
    start: int

    def _boxes(self) -> list[Box]:
        return boxes(self.shape, self.start, self.start + self.flat.numel())

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self._boxes()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, None, TensorWriteData(chunk, properties, self.shape))
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        done = 0
        for offsets, sizes in self._boxes():
            size = math.prod(sizes)
            if torch.Size(offsets) == index.offset:
                return self.flat[done : done + size].view(sizes)
            done += size
        raise KeyError(f"{index} is not in the run of {self.flat.numel()} elements from {self.start} of {tuple(self.shape)}")
