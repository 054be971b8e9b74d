"""Attention by heads: ranks exchange tokens for heads, so that each computes whole sequences of some heads, group by group.

(S. A. Jacobs et al., DeepSpeed Ulysses, 2023; by groups of heads as R. Ghadia et al., UPipe, 2026.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.exchange import Peers, PointToPoint, PostedAhead, posted
from lightning_overlap.modes.context.kernel import accumulator, grad_of_sinks
from lightning_overlap.modes.context.part import Gradients, Outputs, PartOfHeads
from lightning_overlap.modes.context.pieces import Plan, Stages
from lightning_overlap.ranks.group import Pending

HEAD_GROUPS = 8
"""Groups of a rank's heads at most: one group's exchange travels while another one is computed."""
FIRST_HEAD_KEY = 1 << 11
"""Keys of exchanges of heads start here, above those of pieces."""


@dataclass(frozen=True)
class HeadShares:
    """The heads that each rank computes, in groups. A key/value head goes to every rank that has a query head of it.

    Args:
        heads: number of query heads.
        kv_heads: number of key/value heads.
        queries: by rank and group, numbers of query heads.
        keys: by rank and group, numbers of the key/value heads that these use.
    """

    heads: int
    kv_heads: int
    queries: tuple[tuple[range, ...], ...]
    keys: tuple[tuple[range, ...], ...]

    @classmethod
    def of(cls, heads: int, kv_heads: int, ranks: int, *, kv_heads_apart: bool) -> HeadShares:
        """Even shares.

        Args:
            heads: number of query heads.
            kv_heads: number of key/value heads, which divides it.
            ranks: over which the heads are spread.
            kv_heads_apart: no key/value head is in two groups of a rank, since each group's keys and values travel on.

        Raises:
            ConfigError: the ranks do not divide the query heads.
        """
        if heads % ranks:
            raise ConfigError(
                f"{heads} query heads cannot be shared evenly by {ranks} ranks that exchange heads: choose a number that divides "
                f'{heads}, or method="p2p", which exchanges no heads'
            )
        share, each = heads // ranks, heads // kv_heads

        def used(part: range) -> range:
            return range(part.start // each, (part.stop - 1) // each + 1)

        groups = min(share, HEAD_GROUPS)
        if kv_heads_apart and share % each:
            groups = 1
        elif kv_heads_apart:
            groups = min(share // each, HEAD_GROUPS)
        unit = each if kv_heads_apart and groups > 1 else 1
        edges = [share // unit * i // groups * unit for i in range(groups + 1)]
        queries = tuple(
            tuple(range(rank * share + a, rank * share + b) for a, b in itertools.pairwise(edges)) for rank in range(ranks)
        )
        return cls(heads, kv_heads, queries, tuple(tuple(map(used, groups)) for groups in queries))

    @property
    def groups(self) -> int:
        """Number of groups, on each rank."""
        return len(self.queries[0])

    def first(self, rank: int, group: int) -> range:
        """The key/value heads that no earlier group of a rank uses."""
        mine = self.keys[rank]
        return mine[0] if group == 0 else range(max(mine[group].start, mine[group - 1].stop), mine[group].stop)

    def last(self, rank: int, group: int) -> range:
        """The key/value heads that no later group of a rank uses."""
        mine = self.keys[rank]
        return mine[-1] if group == self.groups - 1 else range(mine[group].start, min(mine[group].stop, mine[group + 1].start))

    def index(self, rank: int, group: int) -> list[int] | None:
        """The key/value head of each query head of a group, counted from the group's first one.

        None: each is used by as many query heads as the others, one after another, which is what kernels expect.
        """
        queries, keys = self.queries[rank][group], self.keys[rank][group]
        index = [head // (self.heads // self.kv_heads) - keys.start for head in queries]
        times = len(queries) // len(keys)
        return None if index == [i // times for i in range(len(queries))] else index


class HeadExchange:
    """Moves tensors between *tokens* (a rank's tokens of all heads) and *heads* (all the peers' tokens of a rank's heads).

    Args:
        peers: the ranks.
        ranges: by rank, its ranges of positions. All ranks' tokens are in ascending order.
    """

    def __init__(self, peers: Peers, ranges: Sequence[Sequence[range]]) -> None:
        self.peers = peers
        self._others = [rank for rank in range(peers.size) if rank != peers.rank]
        self.counts = [sum(map(len, mine)) for mine in ranges]
        starts, start = {}, 0
        for part in sorted((part for mine in ranges for part in mine), key=lambda part: part.start):
            starts[part] = start
            start += len(part)
        self._rows = [[range(starts[part], starts[part] + len(part)) for part in mine] for mine in ranges]
        self.tokens = start

    def to_heads(self, tensors: Sequence[tuple[Tensor, Sequence[range]]], *, key: int, label: str) -> Pending:
        """Posts tensors of this rank's tokens ``(B, heads, s, D)``, each with the heads that go to each rank."""
        messages = [torch.cat([x[:, _slice(heads[rank])].reshape(-1) for x, heads in tensors]) for rank in self._others]
        mine, count = self.peers.rank, self.counts[self.peers.rank]
        each = sum(x.shape[0] * len(heads[mine]) * x.shape[3] for x, heads in tensors)
        assert all(x.shape[2] == count for x, _ in tensors)
        return self._exchange(messages, [each * self.counts[rank] for rank in self._others], key, label)

    def keep_heads(self, tensors: Sequence[tuple[Tensor, Sequence[range]]], into: Sequence[Tensor]) -> None:
        """Writes the tokens of this rank into the tensors of :meth:`place_heads`."""
        for (source, heads), x in zip(tensors, into, strict=True):
            self._write(x, self.peers.rank, source[:, _slice(heads[self.peers.rank])])

    def place_heads(self, received: Tensor, into: Sequence[Tensor]) -> None:
        """Writes what :meth:`to_heads` has brought into tensors ``(B, this rank's heads, tokens, D)``."""
        for rank in self._others:
            for x in into:
                part, received = _first(received, (*x.shape[:2], self.counts[rank], x.shape[3]))
                self._write(x, rank, part)

    def to_tokens(
        self, tensors: Sequence[Tensor], receives: Sequence[tuple[Tensor, Sequence[range]]], *, key: int, label: str
    ) -> Pending:
        """Posts tensors ``(B, this rank's heads, tokens, D)``; ``receives`` is what :meth:`place_tokens` will be given."""
        messages = [torch.cat([_tokens(x, self._rows[rank]).reshape(-1) for x in tensors]) for rank in self._others]
        sizes = [sum(x.shape[0] * len(heads[rank]) * x.shape[2] * x.shape[3] for x, heads in receives) for rank in self._others]
        return self._exchange(messages, sizes, key, label)

    def keep_tokens(self, tensors: Sequence[Tensor], into: Sequence[tuple[Tensor, range]]) -> None:
        """Adds the tokens of this rank to tensors that :meth:`place_tokens` is given, each with this rank's heads."""
        for x, (target, heads) in zip(tensors, into, strict=True):
            target[:, _slice(heads)] += _tokens(x, self._rows[self.peers.rank])

    def place_tokens(self, received: Tensor, into: Sequence[tuple[Tensor, Sequence[range]]]) -> None:
        """Adds what :meth:`to_tokens` has brought to tensors of this rank's tokens, each with the heads that come from each rank."""
        for rank in self._others:
            for x, heads in into:
                part, received = _first(received, (x.shape[0], len(heads[rank]), *x.shape[2:]))
                x[:, _slice(heads[rank])] += part

    def _exchange(self, messages: list[Tensor], sizes: list[int], key: int, label: str) -> Pending:
        """Posts a message to each other rank; sizes are those of the messages that come."""
        messages.insert(self.peers.rank, messages[0].new_empty(0))
        sizes.insert(self.peers.rank, 0)
        return self.peers.exchange(messages, sizes, key=key, label=label)

    def _write(self, x: Tensor, rank: int, tokens: Tensor) -> None:
        rows = self._rows[rank]
        for target, source in zip(rows, tokens.split([len(each) for each in rows], 2), strict=True):
            x[:, :, _slice(target)] = source


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _tokens(x: Tensor, rows: Sequence[range]) -> Tensor:
    return torch.cat([x[:, :, _slice(part)] for part in rows], 2) if rows else x[:, :, :0]


def _first(message: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A tensor of a message, and the rest of it."""
    size = torch.Size(shape)
    return message[: size.numel()].view(size), message[size.numel() :]


@dataclass(frozen=True)
class ByHeads:
    """What an attention by heads is.

    Args:
        shares: which heads each rank computes.
        exchange: moves heads and tokens.
        stages: what is computed of the peers' tokens.
        outer: the ranks that compute the same heads of other tokens; this rank alone where each computes whole sequences.
        plan: of the pieces that travel among these.
        parts: by group of heads.
    """

    shares: HeadShares
    exchange: HeadExchange
    stages: Stages
    outer: Peers
    plan: Plan
    parts: tuple[PartOfHeads, ...]

    @property
    def rank(self) -> int:
        return self.exchange.peers.rank

    def by_rank(self, group: int, heads: Callable[[int, int], range]) -> list[range]:
        """Which heads of a group belong to each rank."""
        return [heads(rank, group) for rank in range(self.exchange.peers.size)]

    def queries(self, rank: int, group: int) -> range:
        """Query heads of a group."""
        return self.shares.queries[rank][group]

    def mine(self, x: Tensor, heads: range, *, keys: bool = False) -> Tensor:
        """Some heads of a tensor that has those of this rank."""
        first = (self.shares.keys if keys else self.shares.queries)[self.rank][0].start
        return x[:, heads.start - first : heads.stop - first]

    def keys_of(self, k: Tensor, group: int) -> Tensor:
        """Keys or values of a group, as kernels expect them."""
        k, index = self.mine(k, self.shares.keys[self.rank][group], keys=True), self.shares.index(self.rank, group)
        return k if index is None else k[:, index]

    def add_to_keys(self, of_k: Tensor, group: int, gradient: Tensor) -> None:
        """Adds the gradient of :meth:`keys_of`."""
        into, index = self.mine(of_k, self.shares.keys[self.rank][group], keys=True), self.shares.index(self.rank, group)
        if index is None:
            into += gradient
        else:
            into.index_add_(1, torch.tensor(index, device=into.device), gradient)

    def keep_gradients(self, group: int, made: Gradients, of_queries: Tensor, of_keys: Tensor, of_values: Tensor) -> None:
        """Takes the gradients of a group: those of its queries are complete but for what is added later, those of keys are added."""
        self.mine(of_queries, self.shares.queries[self.rank][group]).copy_(made.of_q)
        for into, gradient in ((of_keys, made.of_k), (of_values, made.of_v)):
            self.add_to_keys(into, group, gradient)
            gradient.zero_()

    def of_sinks(self, sinks: Tensor | None, grads: Tensor, outputs: Tensor, lse: Tensor) -> Tensor | None:
        """The gradient of the sinks, of which this rank has that of its heads."""
        if sinks is None:
            return None
        mine, gradient = _slice(self.all_heads()), torch.zeros_like(sinks)
        gradient[mine] = grad_of_sinks(sinks[mine], grads, outputs, lse)
        return gradient

    def all_heads(self, *, keys: bool = False) -> range:
        """The heads of all groups of this rank."""
        shares = (self.shares.keys if keys else self.shares.queries)[self.rank]
        return range(shares[0].start, shares[-1].stop)

    def pieces(self, keys: Tensor, values: Tensor, group: int) -> PointToPoint:
        """Moves the keys and values of a group, which are those of this rank's heads, among the outer ranks."""
        return PointToPoint(self.outer, self.plan, self.keys_of(keys, group), self.keys_of(values, group))

    def new(self, like: Tensor, *, keys: bool = False, features: int | None = None) -> Tensor:
        """Room for the tokens of this rank's heads."""
        return like.new_empty(like.shape[0], len(self.all_heads(keys=keys)), self.exchange.tokens, features or like.shape[3])


@dataclass
class FirstHeads:
    """The queries and keys of an attention's first group of heads, which leave before its values are made.

    In backward, the gradients of the last group's values leave first, and those of its queries and keys travel under the backward of
    what has made the values.

    Args:
        shares: which heads each rank computes.
        exchange: moves them.
        overlapped: False: each transfer is waited for where it is posted.

    Attributes:
        pending: the transfer of queries and keys, or of their gradients.
        gradients: of queries and keys, each with the heads that come from each rank; complete but for what is pending.
    """

    shares: HeadShares
    exchange: HeadExchange
    overlapped: bool
    pending: Pending | None = None
    gradients: Sequence[tuple[Tensor, Sequence[range]]] = ()

    def post(self, q: Tensor, k: Tensor) -> None:
        """Posts queries and keys."""
        ranks = range(self.exchange.peers.size)
        tensors = [(q, [self.shares.queries[rank][0] for rank in ranks]), (k, [self.shares.first(rank, 0) for rank in ranks])]
        pending = self.exchange.to_heads(tensors, key=FIRST_HEAD_KEY + 2 * self.shares.groups, label="context.first_heads")
        self.pending = posted(pending, self.overlapped)

    def post_gradients(self, sent: Sequence[Tensor], into: Sequence[tuple[Tensor, Sequence[range]]]) -> None:
        """Posts the gradients of queries and keys; see :meth:`HeadExchange.to_tokens`."""
        key = FIRST_HEAD_KEY + 2 * self.shares.groups
        pending = self.exchange.to_tokens(sent, into, key=key, label="context.last_head_grads")
        self.pending, self.gradients = posted(pending, self.overlapped), into

    def wait(self) -> Tensor:
        """What was posted."""
        assert self.pending is not None, "a post comes first"
        pending, self.pending = self.pending, None
        return pending.wait()

    def wait_for_gradients(self) -> None:
        """Completes the gradients of queries and keys."""
        self.exchange.place_tokens(self.wait(), self.gradients)


class PostFirstHeads(Function):
    """Posts the queries and keys of an attention's first group, which goes on with the same queries and keys.

    Forward: ``q`` ``(B, H, s, D)``, ``k`` ``(B, heads, s, D)`` -> the same. Backward: waits for their gradients, which
    :class:`HeadAttention` has posted. It runs after the backward of what was computed between the two.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, first: FirstHeads) -> tuple[Tensor, Tensor]:
        first.post(q, k)
        ctx.first, ctx.dtype = first, q.dtype
        return q.view_as(q), k.view_as(k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        ctx.first.wait_for_gradients()
        of_q, of_k = (x.to(ctx.dtype) for x, _ in ctx.first.gradients)
        ctx.first.gradients = ()
        return of_q, of_k, None


class HeadAttention(Function):
    """Attention by heads. The exchange of a group of heads travels while another group is computed.

    The first exchange and the last one travel under a part of their own group: in forward, queries of this rank meet its own keys
    before the others' tokens come, and the others' keys after the others' outputs have left; in backward, the other way round. Those
    of queries and keys travel under what makes the values, too; see :class:`FirstHeads`.

    Forward: ``q`` ``(B, H, s, D)``, ``k``, ``v`` ``(B, heads, s, D)``, ``sinks`` ``(H)`` or None -> ``(B, H, s, D)`` in the dtype of
    ``q``. ``q`` and ``k`` are those of :class:`PostFirstHeads`. Backward: gradients of the inputs' shapes and dtypes, but zeros in
    place of those of ``q`` and ``k``, which :class:`FirstHeads` has. What is kept for it are the tensors of this rank's heads.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, by_heads: ByHeads, first: FirstHeads) -> Tensor:
        shares, exchange, stages, overlapped = by_heads.shares, by_heads.exchange, by_heads.stages, by_heads.parts[0].overlapped
        by_rank, mine, rank = by_heads.by_rank, by_heads.mine, by_heads.rank

        def inputs(group: int) -> list[tuple[Tensor, list[range]]]:
            keys = by_rank(group, shares.first)
            return [(q, by_rank(group, by_heads.queries)), (k, keys), (v, keys)]

        def post(group: int) -> Pending:
            tensors = inputs(group) if group else inputs(group)[2:]
            return exchange.to_heads(tensors, key=FIRST_HEAD_KEY + group, label=f"context.heads[{group}]")

        arrivals = iter(PostedAhead(post, shares.groups, 1, overlapped))
        queries, keys, values = by_heads.new(q), by_heads.new(k, keys=True), by_heads.new(v, keys=True)
        outputs = by_heads.new(q, features=v.shape[3])
        lse = outputs.new_empty(outputs.shape[:3], dtype=accumulator(q.dtype))
        result = q.new_zeros(*q.shape[:3], v.shape[3])
        leaving = []
        for group, part in enumerate(by_heads.parts):
            heads, new = shares.queries[rank][group], shares.first(rank, group)
            into = [mine(queries, heads), mine(keys, new, keys=True), mine(values, new, keys=True)]
            exchange.keep_heads(inputs(group), into)
            of_group = None if sinks is None else sinks[heads.start : heads.stop]
            made = Outputs(part, mine(queries, heads), v.shape[3], of_group)
            made.add(stages.own, by_heads.keys_of(keys, group), by_heads.keys_of(values, group))
            if group == 0:
                exchange.place_heads(first.wait(), into[:2])
            exchange.place_heads(next(arrivals), into if group else into[2:])
            pieces = by_heads.pieces(keys, values, group)
            pieces.post_first(overlapped=overlapped)
            made.add(stages.queries, pieces.k, pieces.v)
            made.add_rounds(pieces)
            output = mine(outputs, heads).copy_(made.result()[0])
            returned = [(result, by_rank(group, by_heads.queries))]
            key, label = FIRST_HEAD_KEY + shares.groups + group, f"context.head_outputs[{group}]"
            leaving.append((posted(exchange.to_tokens([output], returned, key=key, label=label), overlapped), returned))
            made.add(stages.keys, pieces.k, pieces.v)
            for kept, whole in zip((output, mine(lse, heads)), made.result(), strict=True):
                kept.copy_(whole)
        exchange.keep_tokens([outputs], [(result, by_heads.all_heads())])
        for pending, returned in leaving:
            exchange.place_tokens(pending.wait(), returned)
        ctx.save_for_backward(queries, keys, values, sinks, outputs, lse)
        ctx.by_heads, ctx.first, ctx.shapes = by_heads, first, (q.shape, k.shape, v.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        queries, keys, values, sinks, outputs, lse = ctx.saved_tensors
        by_heads: ByHeads = ctx.by_heads
        shares, exchange, stages, overlapped = by_heads.shares, by_heads.exchange, by_heads.stages, by_heads.parts[0].overlapped
        by_rank, mine, rank = by_heads.by_rank, by_heads.mine, by_heads.rank

        def post(group: int) -> Pending:
            tensors = [(grad, by_rank(group, by_heads.queries))]
            return exchange.to_heads(tensors, key=FIRST_HEAD_KEY + group, label=f"context.head_output_grads[{group}]")

        arrivals = iter(PostedAhead(post, shares.groups, 1, overlapped))
        dtype = accumulator(queries.dtype)
        grads, of_queries = torch.empty_like(outputs), torch.empty_like(queries)
        of_keys, of_values = (torch.zeros_like(x, dtype=dtype) for x in (keys, values))
        results = [grad.new_zeros(shape, dtype=dtype) for shape in ctx.shapes]
        exchange.keep_heads([(grad, [by_heads.all_heads()] * exchange.peers.size)], [grads])
        leaving = []
        for group, part in enumerate(by_heads.parts):
            heads, done = shares.queries[rank][group], shares.last(rank, group)
            pieces = by_heads.pieces(keys, values, group)
            pieces.post_first(overlapped=overlapped)
            grad_of_heads, q, output, lse_of_heads = (mine(x, heads) for x in (grads, queries, outputs, lse))
            made = Gradients(part, grad_of_heads, q, output, lse_of_heads, pieces.k, pieces.v)
            made.add(stages.keys)
            exchange.place_heads(next(arrivals), [grad_of_heads])
            made.add(stages.queries)
            made.add_rounds(pieces)
            by_heads.keep_gradients(group, made, of_queries, of_keys, of_values)
            sent = [mine(of_queries, heads), *(mine(x, done, keys=True).to(queries.dtype) for x in (of_keys, of_values))]
            heads_by_rank = [by_rank(group, by_heads.queries), *[by_rank(group, shares.last)] * 2]
            into = list(zip(results, heads_by_rank, strict=True))
            is_last = group == shares.groups - 1
            now = slice(2, None) if is_last else slice(None)
            key, label = FIRST_HEAD_KEY + shares.groups + group, f"context.head_grads[{group}]"
            leaving.append((posted(exchange.to_tokens(sent[now], into[now], key=key, label=label), overlapped), into[now]))
            if is_last:
                ctx.first.post_gradients(sent[:2], into[:2])
            made.add(stages.own)
            by_heads.keep_gradients(group, made, of_queries, of_keys, of_values)
        all_heads, all_keys = by_heads.all_heads(), by_heads.all_heads(keys=True)
        kept = zip(results, (all_heads, all_keys, all_keys), strict=True)
        exchange.keep_tokens([of_queries, of_keys, of_values], list(kept))
        for pending, into in leaving:
            exchange.place_tokens(pending.wait(), into)
        if not any(ctx.needs_input_grad[:2]):
            ctx.first.wait_for_gradients()  # nobody else does
        instead = [x.new_zeros(1, dtype=queries.dtype).expand(x.shape) for x in results[:2]]
        return *instead, results[2].to(queries.dtype), by_heads.of_sinks(sinks, grads, outputs, lse), None, None
