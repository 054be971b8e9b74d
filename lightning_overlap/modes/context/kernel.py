"""Attention of some queries to some of their keys, and how such parts become the whole.

Each part gives its output and the log-sum-exp of its logits, by which parts are weighed when they are merged. Backward needs no parts
in order: from the merged output and log-sum-exp, the gradients of each pair of queries and keys are exact by themselves.
(M. Milakov, N. Gimelshein, Online normalizer calculation for softmax, 2018; T. Dao et al., FlashAttention, 2022, appendix B.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field, replace

import torch
from torch import Tensor

from lightning_overlap.torch_seams import efficient_attention, flash_attention

ROWS_OF_EFFICIENT = 32
"""The efficient kernel's log-sum-exp has a multiple of so many queries."""
PLAIN_ROWS = 256
"""Queries for which the plain kernel makes its matrix at a time."""
ALIGNMENT_OF_EFFICIENT = 16
"""The rows of the efficient kernel's bias start at multiples of so many elements."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parts are summed."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Which pairs of some queries and some keys are visible.

    Args:
        causal: query i sees the keys up to ``first + i``, counted from the first of each.
        visible: as :meth:`Mask.visible` gives it; None: all pairs.
        queries: positions of the queries, in order, from query ``-first`` on.
        keys: positions of the keys.
        heads: numbers of the query heads, among all of the layer.
        first: 0, but for :meth:`rows`.
    """

    causal: bool = False
    visible: Tensor | None = None
    queries: tuple[range, ...]
    keys: range
    heads: range
    first: int = 0

    def rows(self, rows: range) -> Tile:
        """The tile of some of the queries."""
        visible = self.visible
        if visible is not None and visible.shape[-2] > 1:
            visible = visible[..., rows.start : rows.stop, :]
        return replace(self, visible=visible, first=self.first + rows.start)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits."""
        if self.visible is None or self.visible.dtype != torch.bool:
            return None if self.visible is None else self.visible.to(dtype)
        return torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill_(~self.visible, -torch.inf)

    def blind(self) -> Tensor | None:
        """The queries that see nothing, ``(..., q)``, bool; None: there are none."""
        if self.visible is None:
            return None
        return ~(self.visible if self.visible.dtype == torch.bool else self.visible > -torch.inf).any(-1)


class Kernel(ABC):
    """Attention of a tile. Arguments and results as those of :func:`~lightning_overlap.torch_seams.flash_attention`.

    Args:
        scale: the logits are multiplied by it.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """The output, and the log-sum-exp: ``-inf`` where a query sees nothing."""

    @abstractmethod
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values, in the shapes of ``q``, ``k`` and ``v``.

        Args:
            grad: of the output.
            q: queries.
            k: keys of the tile.
            v: values of the tile.
            output: of these queries, from all their keys.
            lse: of these queries' logits, of all their keys; anything finite where they see none.
            tile: as in forward.
        """


class FlashKernel(Kernel):
    """torch's flash kernel for CPUs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        output, lse = flash_attention(q, k, v, tile.causal, tile.bias(q.dtype), self.scale)
        blind = tile.blind()
        return output, lse if blind is None else lse.masked_fill(blind, -torch.inf)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_q, of_k, of_v = flash_attention(q, k, v, tile.causal, tile.bias(q.dtype), self.scale, (grad, output, lse))
        return of_q, of_k, of_v


class EfficientKernel(Kernel):
    """torch's efficient kernel for CUDA. It was not run yet: no test of this version has a device."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        k, v = repeated(k, q), repeated(v, q)
        output, lse = efficient_attention(q, k, v, tile.causal, self._bias(q, k, tile), self.scale)
        blind, lse = tile.blind(), lse[..., : q.shape[2]]
        return output, lse if blind is None else lse.masked_fill(blind, -torch.inf)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % ROWS_OF_EFFICIENT), value=torch.inf)
        keys, values = repeated(k, q), repeated(v, q)
        inputs = q, keys, values, tile.causal, self._bias(q, keys, tile), self.scale
        of_q, of_k, of_v = efficient_attention(*inputs, (grad, output, lse))
        return of_q, summed(of_k, k), summed(of_v, v)

    def _bias(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor | None:
        bias = tile.bias(q.dtype)
        if bias is None:
            return None
        columns = k.shape[2]
        bias = torch.nn.functional.pad(bias.expand(*bias.shape[:-1], columns), (0, -columns % ALIGNMENT_OF_EFFICIENT))[..., :columns]
        return bias.expand(*q.shape[:3], columns)


class PlainKernel(Kernel):
    """Attention by its formula: also with dropout and a soft cap. It makes the matrix of :data:`PLAIN_ROWS` queries at a time.

    Args:
        scale: as in :class:`Kernel`.
        dropout: probability with which a pair is dropped.
        softcap: the logits become ``softcap * tanh(logits / softcap)`` before the mask; None: they stay.
        seed: of dropout, see :func:`kept`.
    """

    def __init__(self, scale: float, dropout: float = 0.0, softcap: float | None = None, seed: int = 0) -> None:
        super().__init__(scale)
        self.dropout, self.softcap, self.seed = dropout, softcap, seed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        parts = [self._forward(q[:, :, rows.start : rows.stop], k, v, tile.rows(rows)) for rows in _blocks(q)]
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, 2), torch.cat(lses, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_q = []
        of_k, of_v = (x.new_zeros(x.shape, dtype=accumulator(x.dtype)) for x in (k, v))
        for rows in _blocks(q):
            grad_part, q_part, output_part, lse_part = (x[:, :, rows.start : rows.stop] for x in (grad, q, output, lse))
            made = self._backward(grad_part, q_part, k, v, output_part, lse_part, tile.rows(rows))
            of_q.append(made[0])
            of_k += made[1]
            of_v += made[2]
        return torch.cat(of_q, 2), of_k, of_v

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        logits, _ = self._logits(q, k, tile)
        lse = logits.logsumexp(-1)
        weights = (logits - finite(lse).unsqueeze(-1)).exp()
        if self.dropout:
            weights = weights * self._kept(weights, tile)
        return weights @ repeated(v, q).to(weights.dtype), lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, slope = self._logits(q, k, tile)
        weights = (logits - lse.unsqueeze(-1)).exp()
        dtype = weights.dtype
        grad = grad.to(dtype)
        of_weights = grad @ repeated(v, q).to(dtype).transpose(-1, -2)
        dropped = weights
        if self.dropout:
            kept = self._kept(weights, tile)
            dropped, of_weights = weights * kept, of_weights * kept
        of_logits = weights * (of_weights - (grad * output.to(dtype)).sum(-1, keepdim=True)) * self.scale
        if slope is not None:
            of_logits = of_logits * slope
        of_q = of_logits @ repeated(k, q).to(dtype)
        of_k = summed(of_logits.transpose(-1, -2) @ q.to(dtype), k)
        return of_q, of_k, summed(dropped.transpose(-1, -2) @ grad, v)

    def _logits(self, q: Tensor, k: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Those after soft cap and mask, in the accumulator's dtype, and the soft cap's derivative."""
        dtype, slope = accumulator(q.dtype), None
        logits = q.to(dtype) @ repeated(k, q).to(dtype).transpose(-1, -2) * self.scale
        if self.softcap is not None:
            bent = (logits / self.softcap).tanh()
            logits, slope = self.softcap * bent, 1 - bent**2
        if tile.causal:
            logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(tile.first + 1), -torch.inf)
        bias = tile.bias(dtype)
        return logits if bias is None else logits + bias, slope

    def _kept(self, weights: Tensor, tile: Tile) -> Tensor:
        """By what each weight is multiplied: 0, or what keeps the expected sum."""
        batch, _, rows, _ = weights.shape
        queries = positions_of(tile.queries, weights.device)[tile.first : tile.first + rows]
        pairs = kept(self.dropout, self.seed, batch, tile.heads, queries, positions_of([tile.keys], weights.device))
        return pairs / ((1 - self.dropout) or 1)


def kept(dropout: float, seed: int, batch: int, heads: range, queries: Tensor, keys: Tensor) -> Tensor:
    """Which pairs dropout keeps: by head and positions in the whole sequence alone, whichever rank computes a pair, when, and in
    which tile. So forward, backward and recomputation, and any number of ranks, drop the same pairs.

    Each pair's number is hashed. (G. Steele et al., Fast Splittable Pseudorandom Number Generators, 2014: SplitMix64.)

    Args:
        dropout: probability with which a pair is dropped.
        seed: of the attention.
        batch: number B of samples.
        heads: numbers of the query heads.
        queries: positions, ``(q,)``, int64.
        keys: positions, ``(k,)``, int64, on the same device.

    Returns:
        ``(B, heads, q, k)``, bool.
    """
    number = torch.full((1, 1, 1, 1), _signed(seed), device=queries.device)
    for axis, indices in enumerate((range(batch), heads, queries, keys)):
        along = torch.as_tensor(list(indices) if isinstance(indices, range) else indices, device=queries.device)
        number = _mixed(number + (along + 1).view([-1 if dim == axis else 1 for dim in range(4)]) * _GOLDEN_RATIO)
    return number >= min(int(dropout * (1 << 64)), (1 << 64) - 1) - (1 << 63)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose values look independent. It changes ``x``."""
    for shift, factor in ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # the shift of a signed number copies its sign
        x *= factor
    return x


def _signed(number: int) -> int:
    """The signed 64-bit integer with the bits of ``number``."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN_RATIO = _signed(0x9E3779B97F4A7C15)


def positions_of(parts: Iterable[range], device: torch.device) -> Tensor:
    """The positions in some ranges, ``(count,)``, int64."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])


def _blocks(q: Tensor) -> list[range]:
    return [range(start, min(start + PLAIN_ROWS, q.shape[2])) for start in range(0, q.shape[2], PLAIN_ROWS)]


def kernel_for(q: Tensor, v: Tensor, scale: float, dropout: float = 0.0, softcap: float | None = None, seed: int = 0) -> Kernel:
    """The fastest kernel that can do it. Arguments: see :class:`PlainKernel`; ``q`` and ``v`` tell device, dtype and head sizes."""
    if dropout or softcap is not None or q.shape[-1] != v.shape[-1]:
        return PlainKernel(scale, dropout, softcap, seed)
    if q.device.type == "cpu":
        return FlashKernel(scale)
    return EfficientKernel(scale) if q.device.type == "cuda" and q.dtype != torch.float64 else PlainKernel(scale)


@dataclass
class Merger:
    """Merges the parts of an attention, in the accumulator's dtype.

    Args:
        output: zeros, then of what was merged so far, ``(B, H, s, D)``.
        sinks: a logit for each head, ``(H,)``, that takes weight and has no value; None: there are none.

    Attributes:
        lse: of what was merged so far, ``(B, H, s)``.
    """

    output: Tensor
    sinks: InitVar[Tensor | None] = None
    lse: Tensor = field(init=False)

    def __post_init__(self, sinks: Tensor | None) -> None:
        self.lse = self.output.new_full(self.output.shape[:-1], -torch.inf)
        if sinks is not None:
            self.lse.copy_(sinks.view(-1, 1))

    def add(self, rows: range, output: Tensor, lse: Tensor) -> None:
        """Adds a part: some queries, and keys that were not added for them before."""
        into, before = self.output[:, :, rows.start : rows.stop], self.lse[:, :, rows.start : rows.stop]
        both = torch.logaddexp(before, lse)  # by the maximum and log1p: no overflow, and nothing is lost
        # A query that has seen nothing so far, nor in this part, takes nothing.
        into.lerp_(output.to(into.dtype), (lse - finite(both)).exp_().unsqueeze(-1))
        before.copy_(both)


def grad_of_sinks(sinks: Tensor, grad: Tensor, output: Tensor, lse: Tensor) -> Tensor:
    """The gradient of :class:`Merger`'s sinks, of its final output ``(B, H, s, D)`` and log-sum-exp ``(B, H, s)``."""
    weights = (sinks.to(lse.dtype).view(-1, 1) - lse).exp()
    return -(weights * (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)).sum((0, 2)).to(sinks.dtype)


def finite(lse: Tensor) -> Tensor:
    """0 where a query sees nothing: no logit has weight there."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, each head as often as there are query heads that use it."""
    times = q.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def summed(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of what :func:`repeated` was given."""
    if grad.shape[1] == x.shape[1]:
        return grad
    return grad.unflatten(1, (x.shape[1], -1)).sum(2)
