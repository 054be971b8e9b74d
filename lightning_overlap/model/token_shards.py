"""Which tokens each rank has, and the two ways from their parts to what is the same on all ranks: a gather and a sum.

Inside of the sharded part every gradient is the number of ranks times that of one process, since gradients of parameters are averaged
over the ranks afterwards. So both ways multiply the gradient on its way back; the way in, a choice of rows, needs nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_overlap.ranks.group import Group


@dataclass(frozen=True, eq=False)
class TokenShards:
    """Which positions of a dim each rank has.

    Attributes:
        group: the ranks.
        positions: by rank, ascending, int64 ``(count,)`` on the CPU. Each position is one rank's.
        size: of the whole dim.
    """

    group: Group
    positions: tuple[Tensor, ...]
    size: int

    @property
    def local(self) -> Tensor:
        """The positions of this rank."""
        return self.positions[self.group.rank]

    def equal(self, other: TokenShards) -> bool:
        """Whether each rank has the same positions in both."""
        if self is other:
            return True
        pairs = zip(self.positions, other.positions, strict=True)
        return self.group is other.group and self.size == other.size and all(a.equal(b) for a, b in pairs)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x``, which is whole along ``dim``."""
        return x.index_select(dim, self.local.to(x.device, non_blocking=True))

    def gather(self, local: Tensor, dim: int) -> Tensor:
        """The whole tensor, ``(..., size, ...)``, of which this rank has ``local``. All ranks go on with it alike. Collective."""
        return _Gather.apply(local, dim, self)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what each rank computed of its tokens, in the shape of ``x``. All ranks go on with it alike. Collective."""
        return _Total.apply(x, self.group)

    # -- other shapes ------------------------------------------------------------------------------------------------

    def merged(self, count: int) -> TokenShards:
        """The shards of ``count`` x ``size`` positions: of the dim merged with those before it."""
        offsets = self.size * torch.arange(count).unsqueeze(1)
        return TokenShards(self.group, tuple((offsets + p).flatten() for p in self.positions), count * self.size)

    def divided(self, count: int) -> TokenShards | None:
        """The shards whose :meth:`merged` ones these are; None: a rank does not have the same positions of each part."""
        parts = TokenShards(self.group, tuple(p[: len(p) // count] for p in self.positions), self.size // count)
        return parts if parts.merged(count).equal(self) else None

    def sliced(self, start: int, stop: int) -> tuple[TokenShards, slice]:
        """The shards of the positions from ``start`` to ``stop``, and where this rank's lie among those that it has."""
        positions = tuple(p[(p >= start) & (p < stop)] - start for p in self.positions)
        first = int((self.local < start).sum())
        return TokenShards(self.group, positions, stop - start), slice(first, first + len(positions[self.group.rank]))

    def masked(self, mask: Tensor, dim: int) -> TokenShards:
        """The shards of the rows that ``mask`` takes: a bool tensor, the same on all ranks, that is whole along ``dim``."""
        rows = (mask.flatten().cumsum(0) - 1).view(mask.shape).cpu()
        mask = mask.cpu()
        positions = tuple(rows.index_select(dim, p)[mask.index_select(dim, p)] for p in self.positions)
        return TokenShards(self.group, positions, int(mask.sum()))


class _Gather(Function):
    """Gathers the tokens of all ranks.

    Forward: ``local`` ``(..., count, ...)`` -> ``(..., size, ...)``. Backward: this rank's part of the gradient, times the ranks.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, shards: TokenShards) -> Tensor:
        ctx.dim, ctx.shards = dim, shards
        rows = local.movedim(dim, 0)
        group, width = shards.group, rows.shape[1:].numel()
        bounds = [0, *itertools.accumulate(width * len(p) for p in shards.positions)]
        flat = rows.new_empty(bounds[-1])
        flat[bounds[group.rank] : bounds[group.rank + 1]] = rows.flatten()
        group.all_gather(flat, bounds, key=0, label=f"{group.name}.tokens").wait()
        order = torch.cat(shards.positions).argsort()
        return flat.view(shards.size, *rows.shape[1:]).index_select(0, order.to(flat.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.shards.take(grad, ctx.dim) * ctx.shards.group.size, None, None


class _Total(Function):
    """Sums over the ranks. Forward: ``x`` -> the sum, in its shape and dtype. Backward: the gradient, times the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.size = group.size
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format), label=f"{group.name}.total").wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.size, None
