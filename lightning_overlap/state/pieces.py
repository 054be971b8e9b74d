"""Tensors that are sharded along a dim, and the sharded parameters of a model.

Parameters keep their names and objects; their data becomes this rank's piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_overlap.ranks.group import Group
from lightning_overlap.state.absent import is_absent
from lightning_overlap.state.shards import Place


def shares(n: int, size: int) -> tuple[int, ...]:
    """``size + 1`` offsets that split ``n`` as evenly as possible."""
    return tuple(n * r // size for r in range(size + 1))


@dataclass(frozen=True)
class Piece:
    """How a tensor is sharded along one dim.

    Attributes:
        shape: of the unsharded tensor.
        dim: the dim.
        parts: sizes along it of the fused layers (q, k, v), each of which is sharded by itself.
    """

    shape: torch.Size
    dim: int
    parts: tuple[int, ...]

    def of(self, unsharded: Tensor, rank: int, size: int) -> Tensor:
        """A rank's piece of a tensor of the unsharded shape: a view if there is one part."""
        parts = [
            part.narrow(self.dim, low, high - low)
            for part in unsharded.split(list(self.parts), self.dim)
            for low, high in [shares(part.shape[self.dim], size)[rank : rank + 2]]
        ]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]

    def shape_of(self, rank: int, size: int) -> torch.Size:
        """The shape of a rank's piece."""
        local = sum(shares(n, size)[rank + 1] - shares(n, size)[rank] for n in self.parts)
        return torch.Size([*self.shape[: self.dim], local, *self.shape[self.dim + 1 :]])

    def place(self, rank: int, size: int) -> Place:
        """Where a rank's piece lies in the unsharded tensor."""
        spans, start = [], 0
        for n in self.parts:
            low, high = shares(n, size)[rank : rank + 2]
            spans.append((start + low, high - low))
            start += n
        return Place(self.shape, {self.dim: tuple(spans)})

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The unsharded tensor of all ranks' pieces, by rank."""
        size = len(pieces)
        sizes = [[shares(n, size)[rank + 1] - shares(n, size)[rank] for n in self.parts] for rank in range(size)]
        parts = [piece.split(sizes[rank], self.dim) for rank, piece in enumerate(pieces)]
        return torch.cat([parts[rank][number] for number in range(len(self.parts)) for rank in range(size)], self.dim)


@torch.no_grad()
def gather_pieces(piece: Piece, local: Tensor, group: Group, label: str) -> Tensor:
    """Gathers all ranks' pieces into the unsharded tensor. Collective, blocking.

    Args:
        piece: how the tensor is sharded.
        local: this rank's piece, on the device that the group transfers from.
        group: the ranks.
        label: of the transfer.

    Returns:
        A tensor of shape ``piece.shape``, dtype and device as ``local``.
    """
    shapes = [piece.shape_of(rank, group.size) for rank in range(group.size)]
    bounds = [0, *itertools.accumulate(shape.numel() for shape in shapes)]
    flat = torch.empty(bounds[-1], dtype=local.dtype, device=local.device)
    flat[bounds[group.rank] : bounds[group.rank + 1]] = local.detach().flatten()
    group.all_gather(flat, bounds, key=0, label=label).wait()
    return piece.join([flat[a:b].view(shape) for shape, (a, b) in zip(shapes, itertools.pairwise(bounds), strict=True)])


class Partition:
    """The sharded parameters of a model.

    Args:
        model: the user's.
        pieces: by parameter of the model, how it is sharded.
        group: the ranks.
        label: of the transfers that gather the parameters.

    Attributes:
        pieces: by id of a parameter, how it is sharded.
        parameters: by id, the parameter.
        is_sharded: whether the parameters have this rank's pieces.
    """

    def __init__(self, model: nn.Module, pieces: Mapping[nn.Parameter, Piece], group: Group, label: str) -> None:
        self._ids = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._group = group
        self._label = label
        self.pieces = {id(parameter): piece for parameter, piece in pieces.items()}
        self.parameters = {id(parameter): parameter for parameter in pieces}
        self.is_sharded = False

    def piece(self, name: str) -> Piece | None:
        """How the parameter or buffer with a name is sharded; None if it is not."""
        return self.pieces.get(self._ids.get(name, 0))

    def shard(self) -> None:
        """Replaces every parameter's data by this rank's piece."""
        self.is_sharded = True
        for number, piece in self.pieces.items():
            parameter = self.parameters[number]
            unsharded = parameter.data
            if is_absent(unsharded):  # on another stage of a pipeline
                parameter.data = unsharded.as_strided((), ()).expand(piece.shape_of(self._group.rank, self._group.size))
            else:
                local = piece.of(unsharded, self._group.rank, self._group.size)
                parameter.data = local.clone(memory_format=torch.contiguous_format)

    def restore(self, *, complete: bool) -> None:
        """Gives every parameter its unsharded shape: with ``complete`` the present weights (collective), otherwise NaN."""
        self.is_sharded = False
        for number, piece in self.pieces.items():
            parameter = self.parameters[number]
            local = parameter.data
            parameter.grad = None
            if is_absent(local):
                parameter.data = local.as_strided((), ()).expand(piece.shape)
            elif complete:
                parameter.data = self.gather(piece, local)
            else:
                parameter.data = local.new_full(piece.shape, float("nan"))

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside, every parameter has its unsharded shape and the present weights. Collective."""
        local = [(parameter, parameter.data) for parameter in self.parameters.values()]
        try:
            self.restore(complete=True)
            yield
        finally:
            for parameter, data in local:
                parameter.data = data
            self.is_sharded = True

    @torch.no_grad()
    def gather(self, piece: Piece, local: Tensor) -> Tensor:
        """Gathers a tensor that is sharded like a parameter (the parameter, or its optimizer's state). Collective, blocking.

        Args:
            piece: how it is sharded.
            local: this rank's piece, of any dtype and device.

        Returns:
            A tensor of shape ``piece.shape``, dtype and device as ``local``.
        """
        device = self._group.device_of(local)  # after a fit, Lightning has moved everything to the CPU
        return gather_pieces(piece, local.to(device), self._group, self._label).to(local.device)
