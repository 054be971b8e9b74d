"""Which tokens each rank has, and the two ways from their parts to what is the same on all ranks: a gather and a sum.

Gradients of parameters are averaged over the ranks after the backward. So the gradient of any tensor is the average of what the
ranks compute for it: for one that all ranks have, whether they go on with it alike or each with its tokens; and for the part of one
rank, which alone computes a gradient, that is the number of ranks times the gradient of one process. Both ways sum gradients over the
ranks, which is right in all cases. The way in, a choice of rows, needs nothing.
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

    def bounds(self, width: int) -> list[int]:
        """Where the tokens of each rank begin, and the last ones end, in a flat buffer of ``width`` numbers a token, by rank."""
        return [0, *itertools.accumulate(width * len(p) for p in self.positions)]

    def gather(self, local: Tensor, dim: int) -> Tensor:
        """The whole tensor, ``(..., size, ...)``, of which this rank has ``local``. Collective, also in backward."""
        return _Gather.apply(local, dim, self)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what each rank computed of its tokens, in the shape of ``x``. Collective, also in backward."""
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

    Forward: ``local`` ``(..., count, ...)`` -> ``(..., size, ...)``. Backward: the other way, with a sum over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, shards: TokenShards) -> Tensor:
        ctx.dim, ctx.shards = dim, shards
        rows, group = local.movedim(dim, 0), shards.group
        bounds = shards.bounds(rows.shape[1:].numel())
        flat = rows.new_empty(bounds[-1])
        flat[bounds[group.rank] : bounds[group.rank + 1]] = rows.flatten()
        group.all_gather(flat, bounds, key=0, label=f"{group.name}.tokens").wait()
        order = torch.cat(shards.positions).argsort().to(flat.device)
        return flat.view(shards.size, *rows.shape[1:]).index_select(0, order).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shards, group = ctx.shards, ctx.shards.group
        rows = grad.movedim(ctx.dim, 0).index_select(0, torch.cat(shards.positions).to(grad.device))
        bounds = shards.bounds(rows.shape[1:].numel())
        local = group.reduce_scatter(rows.flatten(), bounds, key=0, label=f"{group.name}.tokens_grad").wait()
        return local.view(len(shards.local), *rows.shape[1:]).movedim(0, ctx.dim), None, None


class _Total(Function):
    """Sums over the ranks. Forward: ``x`` -> its sum, in its shape and dtype. Backward: the same of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(x, group, f"{group.name}.total")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _summed(grad, ctx.group, f"{ctx.group.name}.total_grad"), None


def _summed(x: Tensor, group: Group, label: str) -> Tensor:
    return group.all_reduce(x.clone(memory_format=torch.contiguous_format), label=label).wait()
