"""Attention over whole sequences of which each rank has some tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.config import Method
from lightning_overlap.modes.context.deferred import completed
from lightning_overlap.modes.context.exchange import EXCHANGES, Chain, Peers, PieceExchange
from lightning_overlap.modes.context.heads import ByHeads, FirstHeads, HeadAttention, HeadExchange, HeadShares, PostFirstHeads
from lightning_overlap.modes.context.kernel import Kernel, grad_of_sinks, kernel_for
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import PLAIN, AttentionOptions
from lightning_overlap.modes.context.part import PartOfHeads, TileMasks
from lightning_overlap.modes.context.pieces import PieceMethod, Plans, make_plan
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import saved_tensor_hooks


class _PieceAttention(Function):
    """Attention whose keys and values come in pieces; in backward they come again, and their gradients leave piece by piece.

    Forward: ``q`` ``(B, H, s, D)``, ``k``, ``v`` ``(B, heads, s, D)``, ``sinks`` ``(H)`` or None -> ``(B, H, s, D)`` in the dtype of
    ``q``. Backward: gradients of the inputs' shapes and dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        part: PartOfHeads,
        make: Callable[[Tensor, Tensor], PieceExchange],
        chain: Chain | None,
    ) -> Tensor:
        output, lse = part.forward(q, make(k, v), sinks)
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, output, lse)
        ctx.part, ctx.make = part, make
        ctx.exchange = ctx.post_next = None
        if chain is not None:
            ctx.exchange = make(k.detach(), v.detach())
            ctx.post_next = chain.add(ctx.exchange)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, sinks, output, lse = ctx.saved_tensors
        exchange: PieceExchange = ctx.exchange or ctx.make(k, v)
        of_q, of_k, of_v = ctx.part.backward(grad, q, output, lse, exchange, ctx.post_next)
        ctx.exchange = ctx.post_next = None  # which keep tensors that autograd frees now
        of_sinks = None if sinks is None else grad_of_sinks(sinks, grad, output, lse)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_sinks, None, None, None


class ContextAttention:
    """Attention whose queries, keys and values are those of this rank's tokens.

    Args:
        group: the ranks that have different tokens of the same sequences.
        method: ``p2p``: each rank gets those pieces of the others' keys and values that its queries see; ``all_gather``: all ranks
            get the same pieces; ``a2a``: ranks exchange tokens for heads; ``a2a+p2p``: heads among neighbours, pieces among these.
        pieces: of ``p2p`` and ``all_gather``: number of pieces that a rank gets if it gets all tokens of the others. More hide more,
            and make smaller products.
        overlapped: False: each transfer is waited for where it is posted. The numbers are the same.
        hierarchical_sizes: of ``a2a+p2p``: ranks that exchange heads, which are neighbours, and ranks that exchange pieces.
        chain: returns the earlier attentions of the same forward; None: in backward, keys and values travel under their own attention
            only.
        kernels: makes the kernel of a call; a measurement passes kernels that do not compute.

    Raises:
        ConfigError: ``hierarchical_sizes`` do not fit the method or the group.
    """

    def __init__(
        self,
        group: Group,
        method: Method = "p2p",
        *,
        pieces: int = 8,
        overlapped: bool = True,
        hierarchical_sizes: tuple[int, int] | None = None,
        chain: Callable[[], Chain] | None = None,
        kernels: Callable[..., Kernel] = kernel_for,
    ) -> None:
        if (hierarchical_sizes is None) == (method == "a2a+p2p"):
            raise ConfigError(
                f"method={method!r} with hierarchical_sizes={hierarchical_sizes}: method='a2a+p2p' needs the numbers of ranks that "
                "exchange heads and pieces, such as (2, 2); other methods have none"
            )
        inner, outer = hierarchical_sizes or ((group.size, 1) if method == "a2a" else (1, group.size))
        if inner * outer != group.size:
            raise ConfigError(
                f"hierarchical_sizes={hierarchical_sizes} make {inner * outer} ranks of {group.size}: choose sizes whose product it is"
            )
        self._overlapped, self._kernels = overlapped, kernels
        self._chain = chain
        self._masks = TileMasks()
        self._sets = [range(first, first + inner) for first in range(0, group.size, inner)]
        self._group = group
        self._inner = Peers(group, self._sets[group.rank // inner])
        self._outer = Peers(group, range(group.rank % inner, group.size, inner))
        self._pieces: PieceMethod = "all_gather" if method == "all_gather" else "p2p"
        self._plans = Plans(self._pieces, pieces)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        layout: TokenLayout,
        options: AttentionOptions = PLAIN,
    ) -> Tensor:
        """The output for this rank's tokens. Collective over the group; differentiable once.

        Under autocast it computes in autocast's dtype, as torch's attention does. Where a query sees nothing the output is 0.

        Args:
            q: ``(B, H, s, D)``, this rank's tokens in the order of the layout.
            k: ``(B, heads, s, D)``; H is a multiple of the heads, which are not repeated.
            v: ``(B, heads, s, D)``; its D may be another one.
            mask: of the whole sequence, the same on all ranks.
            layout: which tokens each rank has, the same on all ranks.
            options: of the attention.

        Returns:
            ``(B, H, s, D of v)``, in the dtype of ``q``.

        Raises:
            ConfigError: the ranks do not divide the heads that they exchange; the mask's bias needs a gradient.
            ValueError: the tensors do not fit each other, the mask or the layout.
        """
        device = q.device.type
        q, k = _autocast(completed(q), completed(k))
        self._check(q, k, v, mask, layout)
        if self._inner.size > 1:
            shares = HeadShares.of(q.shape[1], k.shape[1], self._inner.size, kv_heads_apart=self._outer.size > 1)
            exchange = HeadExchange(self._inner, [layout.ranges[rank] for rank in self._inner.members])
            first = FirstHeads(shares, exchange, self._overlapped)
            q, k = PostFirstHeads.apply(q, k, first)
        (v,) = _autocast(completed(v))
        kernel = self._kernels(q, v, _scale(q, options), options.dropout, options.softcap, _seed(options))
        with torch.autocast(device, enabled=False):
            if self._inner.size > 1:
                return HeadAttention.apply(q, k, v, options.sinks, self._by_heads(first, kernel, mask, layout), first)
            part = PartOfHeads(mask, range(q.shape[1]), kernel, self._overlapped, self._masks)
            plan = self._plans.of(mask, layout, self._group.rank)
            make = partial(EXCHANGES[self._pieces], self._outer, plan)
            # Saved tensors that go elsewhere (an activation checkpoint, an offload to the host) are not kept for the chain.
            chain = self._chain() if self._chain is not None and self._overlapped and saved_tensor_hooks() is None else None
            return _PieceAttention.apply(q, k, v, options.sinks, part, make, chain)

    def most_received(self, mask: Mask, layout: TokenLayout) -> int:
        """Of ``p2p``: the tokens whose keys and values travel to the rank that receives most of them."""
        return self._plans.of(mask, layout, self._group.rank).most_received

    def _by_heads(self, first: FirstHeads, kernel: Kernel, mask: Mask, layout: TokenLayout) -> ByHeads:
        plan = self._plans.of(mask, layout.merged(self._sets), self._outer.rank)
        stages = self._plans.stages(mask, layout, self._inner.members, self._group.rank)
        queries = first.shares.queries[self._inner.rank]
        parts = tuple(PartOfHeads(mask, mine, kernel, self._overlapped, self._masks) for mine in queries)
        return ByHeads(first.shares, first.exchange, stages, self._outer, plan, parts)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: TokenLayout) -> None:
        if mask.bias is not None and mask.bias.requires_grad:
            raise ConfigError(
                "the attention's bias needs a gradient, and context parallelism gives none to masks: detach the bias, or set "
                "context_parallel: 1"
            )
        tokens = layout.count(self._group.rank)
        alike = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1] and q.shape[3] == k.shape[3]
        fits = mask.tokens == layout.tokens and layout.size == self._group.size and {x.shape[2] for x in (q, k, v)} == {tokens}
        # Under autocast models give queries in fp32 and values in bf16, as torch's attention lets them.
        one_dtype = q.dtype == k.dtype == _autocast_dtype(v)
        if not (alike and fits) or q.shape[1] % k.shape[1] or not one_dtype:
            raise ValueError(
                f"queries {tuple(q.shape)} {q.dtype}, keys {tuple(k.shape)} {k.dtype}, values {tuple(v.shape)} {v.dtype}, a mask of "
                f"{mask.tokens} tokens, a layout of {layout.tokens} over {layout.size} ranks of {self._group.size}: give tensors "
                f"(B, heads, {tokens}, D) of one dtype, query heads a multiple of the others, for one sequence"
            )


class UnshardedAttention:
    """Attention of all tokens on this rank, by the same kernels.

    Args:
        group: the ranks, to which nothing is sent.
    """

    def __init__(self, group: Group) -> None:
        self._peers = Peers(group, [group.rank])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        """As :class:`ContextAttention`. Not collective."""
        q, k, v = _autocast(*map(completed, (q, k, v)))
        kernel = kernel_for(q, v, _scale(q, options), options.dropout, options.softcap, _seed(options))
        plan = make_plan(mask, TokenLayout.contiguous(mask.tokens, 1), 0, 1, "p2p")
        part = PartOfHeads(mask, range(q.shape[1]), kernel, False, TileMasks())
        with torch.autocast(q.device.type, enabled=False):
            return _PieceAttention.apply(q, k, v, options.sinks, part, partial(EXCHANGES["p2p"], self._peers, plan), None)


def _seed(options: AttentionOptions) -> int:
    """The seed of what dropout drops, a number of torch's generator."""
    return int(torch.randint(1 << 62, ()).item()) if options.dropout else 0


def _scale(q: Tensor, options: AttentionOptions) -> float:
    return 1 / math.sqrt(q.shape[-1]) if options.scale is None else options.scale


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in autocast's dtype, if it is on."""
    return tuple(x.to(_autocast_dtype(x)) for x in tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    is_on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_on else x.dtype
