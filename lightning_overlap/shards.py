"""A rank's part of a tensor, as torch's distributed checkpoints read and write it: in boxes of the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class Run:
    """A contiguous run of the elements of a tensor.

    Args:
        shape: the whole tensor's.
        start: where the run starts in it, in elements.
        flat: the run's elements: a view, when it is to be loaded into.
    """

    def __init__(self, shape: torch.Size, start: int, flat: Tensor) -> None:
        self.shape = shape
        self.start = start
        self.flat = flat

    def size(self) -> torch.Size:
        """The whole tensor's, which torch compares with what was saved."""
        return self.shape

    def of(self, whole: Tensor) -> Tensor:
        """This run of a whole tensor."""
        return whole.reshape(-1)[self.start : self.start + self.flat.numel()]

    def copy(self) -> Run:
        """The same in memory of its own, on the CPU."""
        return Run(self.shape, self.start, self.flat.to("cpu", copy=True))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        tiles = boxes(self.shape, self.start, self.start + self.flat.numel())
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tiles]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        place = 0
        for chunk in self.__create_chunk_list__():
            size = math.prod(chunk.sizes)
            if chunk.offsets == index.offset:
                return self.flat[place : place + size].view(chunk.sizes)
            place += size
        raise ValueError(f"{index} is no box of this run")


def is_absent(tensor: Tensor) -> bool:
    """Whether it stands for a tensor that is on another rank: of its shape, and with the memory of one element."""
    return tensor.numel() > 1 and all(stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
