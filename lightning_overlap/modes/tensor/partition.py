"""Which part of each cut weight a rank holds. Names and objects of parameters stay; their data is this rank's piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_overlap.modes.tensor.gemm import shares
from lightning_overlap.modes.tensor.plan import Cut
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.absent import is_absent
from lightning_overlap.state.shards import Place


@dataclass(frozen=True)
class Piece:
    """How a tensor is cut.

    Attributes:
        shape: of all of it.
        dim: that is cut.
        parts: sizes along it of what is fused (q, k, v); each is dealt out by itself.
    """

    shape: torch.Size
    dim: int
    parts: tuple[int, ...]

    def of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """A rank's piece of a tensor of the parameter's whole shape."""
        found = [
            part.narrow(self.dim, low, high - low)
            for part in whole.split(list(self.parts), self.dim)
            for low, high in [shares(part.shape[self.dim], size)[rank : rank + 2]]
        ]
        return torch.cat(found, self.dim) if len(found) > 1 else found[0]

    def shape_of(self, rank: int, size: int) -> torch.Size:
        """Of a rank's piece."""
        own = sum(shares(n, size)[rank + 1] - shares(n, size)[rank] for n in self.parts)
        return torch.Size([*self.shape[: self.dim], own, *self.shape[self.dim + 1 :]])

    def place(self, rank: int, size: int) -> Place:
        """Of a rank's piece in the whole."""
        spans, start = [], 0
        for n in self.parts:
            low, high = shares(n, size)[rank : rank + 2]
            spans.append((start + low, high - low))
            start += n
        return Place(self.shape, {self.dim: tuple(spans)})

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """All ranks' pieces as one tensor."""
        size = len(pieces)
        sizes = [[shares(n, size)[rank + 1] - shares(n, size)[rank] for n in self.parts] for rank in range(size)]
        cut = [piece.split(sizes[rank], self.dim) for rank, piece in enumerate(pieces)]
        return torch.cat([cut[rank][number] for number in range(len(self.parts)) for rank in range(size)], self.dim)


@torch.no_grad()
def joined(piece: Piece, own: Tensor, group: Group, label: str) -> Tensor:
    """All ranks' pieces as one tensor. Collective, blocking.

    Args:
        piece: how it is cut.
        own: this rank's piece, where the group transfers from.
        group: the ranks.
        label: of the transfer.
    """
    shapes = [piece.shape_of(rank, group.size) for rank in range(group.size)]
    bounds = [0, *itertools.accumulate(shape.numel() for shape in shapes)]
    flat = torch.empty(bounds[-1], dtype=own.dtype, device=own.device)
    flat[bounds[group.rank] : bounds[group.rank + 1]] = own.detach().flatten()
    group.all_gather(flat, bounds, key=0, label=label).wait()
    return piece.join([flat[a:b].view(shape) for shape, (a, b) in zip(shapes, itertools.pairwise(bounds), strict=True)])


class Partition:
    """The cut parameters of a model.

    Args:
        cuts: modules whose weights are cut; what they share is cut once.
        group: the ranks.
    """

    def __init__(self, cuts: Iterable[Cut], group: Group) -> None:
        self._group = group
        self.pieces: dict[int, Piece] = {}
        """By id of the parameter."""
        self.parameters: dict[int, nn.Parameter] = {}
        """The same."""
        for cut in cuts:
            weight, bias = cut.module.weight, getattr(cut.module, "bias", None)
            assert isinstance(weight, nn.Parameter), "roles are given to layers with weights"
            self._cut(weight, cut.dim, cut.parts)
            if isinstance(bias, nn.Parameter) and cut.role != "row":
                self._cut(bias, 0, cut.parts)

    def _cut(self, parameter: nn.Parameter, dim: int, parts: tuple[int, ...]) -> None:
        self.pieces.setdefault(id(parameter), Piece(parameter.shape, dim, parts))
        self.parameters[id(parameter)] = parameter

    def keep(self) -> None:
        """Every parameter becomes this rank's piece."""
        for number, piece in self.pieces.items():
            parameter = self.parameters[number]
            whole = parameter.data
            if is_absent(whole):  # on another stage of a pipeline
                parameter.data = whole.as_strided((), ()).expand(piece.shape_of(self._group.rank, self._group.size))
            else:
                own = piece.of(whole, self._group.rank, self._group.size)
                parameter.data = own.clone(memory_format=torch.contiguous_format)

    def give_back(self, *, complete: bool) -> None:
        """Every parameter is whole again; not a number, unless ``complete``. Collective, if it is."""
        for number, piece in self.pieces.items():
            parameter = self.parameters[number]
            own = parameter.data
            parameter.grad = None
            if is_absent(own):
                parameter.data = own.as_strided((), ()).expand(piece.shape)
            elif complete:
                parameter.data = self.whole(piece, own)
            else:
                parameter.data = own.new_full(piece.shape, float("nan"))

    @torch.no_grad()
    def whole(self, piece: Piece, own: Tensor) -> Tensor:
        """What is cut like a parameter, of all ranks. Collective, blocking.

        Args:
            piece: how it is cut.
            own: this rank's piece, of any dtype and device.
        """
        device = self._group.device_of(own)  # after a fit Lightning has everything on the CPU
        return joined(piece, own.to(device), self._group, "tensor.whole").to(own.device)
