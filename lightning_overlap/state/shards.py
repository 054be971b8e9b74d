"""A rank's part of a tensor, as torch's distributed checkpoints read and write it: in boxes of the whole tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_overlap.torch_seams import WithoutSubclasses


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


def is_absent(tensor: Tensor) -> bool:
    """Whether it stands for a tensor that is on another rank: of its shape, and with the memory of one element."""
    return tensor.numel() > 1 and all(stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


_WRITES = frozenset(["__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"])
_NO_WRITES = frozenset(["requires_grad_", "share_memory_"])


class _Absent:
    """What stands for a tensor that is on another rank. Whatever writes to it writes nothing, as the rank that has it does that."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        target = args[0] if args else next(iter(kwargs.values()), None)
        if name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES):
            if isinstance(target, _Absent):
                return target
            if name.startswith("_foreach") and isinstance(target, list | tuple):
                here = [place for place, tensor in enumerate(target) if not isinstance(tensor, _Absent)]
                if not here:
                    return target  # torch takes no empty list
                args = [[x[i] for i in here] if isinstance(x, list | tuple) and len(x) == len(target) else x for x in args]
        with WithoutSubclasses():
            result = function(*args, **kwargs)
            view = isinstance(target, _Absent) and isinstance(result, Tensor) and _share_memory(target, result)
            return result.as_subclass(AbsentTensor) if view else result


def _share_memory(one: Any, other: Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


class AbsentTensor(_Absent, Tensor):
    """A view of an :class:`AbsentParameter`: its data, or a slice."""


class AbsentParameter(_Absent, nn.Parameter):
    """The class of a parameter while it is absent. A copy is absent, too; one that is pickled is an ordinary parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentParameter:
        if id(self) not in memo:
            memo[id(self)] = AbsentParameter(absent_like(self), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(absent_like(self), self.requires_grad).__reduce_ex__(protocol)


def leave(parameter: nn.Parameter) -> None:
    """The parameter is on other ranks from here on: it keeps its shape, without memory for it."""
    parameter.data = absent_like(parameter)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = AbsentParameter


def take(parameter: nn.Parameter, *, room: bool) -> None:
    """The parameter will be here again; with ``room``, it has memory, of no values yet."""
    if isinstance(parameter, AbsentParameter):
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    if room:
        parameter.data = parameter.data.contiguous()


def absent_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """What stands for it elsewhere. Not a number: what should not have been used shows."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device or tensor.device).expand(tensor.shape)
