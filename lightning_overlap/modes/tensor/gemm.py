"""Products with a weight that is cut over the ranks, and the transfers that run beside them.

Activations are ``(..., tokens, features)``. Tokens are cut into one part a rank (sequence parallelism), or every rank has them all.

    gathered   what is there is multiplied while the other ranks' parts arrive, each as soon as it is there
    reduced    the other ranks' parts are multiplied first and sent as soon as they are ready, this rank's own part last

A part travels in ``splits`` pieces. What stays exposed is the product of the last one that is gathered, which is the smallest, see
:func:`growing`; and that of the first one that is reduced: those are equal, since the last of growing ones would be sent late. Both
orders are those of a ring exchange on two ranks; on more, each rank sends to each directly, which takes a full-duplex link as long and
needs no step in between. (The idea: S. Wang et al., Overlap Communication with Dependent Computation via Decomposition, ASPLOS 2023.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_overlap.modes.tensor.config import METHODS
from lightning_overlap.ranks.group import Group, Pending

MOST_SPLITS = 4
PIECE_BYTES = 256 << 10
"""A piece is not smaller on average, if the user does not say how many there are: each costs a tenth of a millisecond on the host."""
_KEYS = 1 << 12


def shares(n: int, size: int) -> tuple[int, ...]:
    """``size + 1`` offsets that deal out ``n`` as evenly as can be."""
    return tuple(n * r // size for r in range(size + 1))


def growing(n: int, pieces: int, size: int) -> tuple[int, ...]:
    """``pieces + 1`` offsets that cut ``n``, each piece larger than the one before: 1 : 2 : 4 : 8 on two ranks.

    The others' parts are (size - 1) / size of a product. Where the whole of it takes as long as the transfer, a piece that is
    size / (size - 1) times as large as the one before is computed while that one travels.
    """
    ratio = size / (size - 1) if size > 1 else 1.0
    offsets = [0.0, *itertools.accumulate(ratio**i for i in range(pieces))]
    return tuple(int(n * (offset / offsets[-1])) for offset in offsets)


@dataclass
class Exchange:
    """How the ranks of a tensor group exchange activations.

    Attributes:
        group: the ranks.
        scattered: tokens are cut over them; otherwise every rank has all tokens.
        overlapped: False: each transfer is waited for where it is posted (the plain twin).
        splits: pieces of a part; None: by its size.
        keep_gathered: what was gathered for a forward is kept for its backward, rather than gathered again.
        methods: by product, how its transfer is hidden, where that is not by the first of :data:`METHODS`.
    """

    group: Group
    scattered: bool
    overlapped: bool = True
    splits: int | None = None
    keep_gathered: bool = False
    methods: Mapping[str, str] = field(default_factory=dict)
    _keys: Iterator[int] = field(default_factory=itertools.count)

    def key(self) -> int:
        """Tells a transfer from those that are in flight with it. Ranks post in the same order."""
        return next(self._keys) % _KEYS

    def method(self, product: str) -> str:
        """How the transfer of a product is hidden; of what is none, by pieces. Without overlap all are plain."""
        if not self.overlapped:
            return "plain"
        return self.methods.get(product) or next(iter(METHODS.get(product, ["ring"])))

    def pieces(self, nbytes: int, method: str) -> int:
        """Into how many a part of so many bytes is cut."""
        if method in ("bulk", "plain"):
            return 1
        return self.splits or max(1, min(MOST_SPLITS, nbytes // PIECE_BYTES))

    def parts(self, tokens: int) -> tuple[int, ...]:
        """Offsets of the parts of that many tokens: one for each rank, or one for all."""
        return shares(tokens, self.group.size) if self.scattered else (0, tokens)

    @property
    def own(self) -> int:
        """The part that this rank has."""
        return self.group.rank if self.scattered else 0


def part(x: Tensor, bounds: Sequence[int], number: int) -> Tensor:
    """The rows ``(n, features)`` of one part of the tokens of ``x``: a view, if it can be one."""
    return x.narrow(-2, bounds[number], bounds[number + 1] - bounds[number]).reshape(-1, x.shape[-1])


class Gathered:
    """The tokens of all ranks, arriving.

    Args:
        own: this rank's tokens ``(..., own tokens, features)``.
        tokens: number of all.
        exchange: the ranks.
        label: names the transfers.
        product: that reads them, see :meth:`Exchange.method`.
    """

    def __init__(self, own: Tensor, tokens: int, exchange: Exchange, label: str, product: str = "") -> None:
        self.shape = (*own.shape[:-2], tokens, own.shape[-1])
        self.own = own.reshape(-1, own.shape[-1])
        self._exchange = exchange
        self._pieces: list[tuple[Tensor, list[int], list[list[int]]]] = []
        self._pending: list[Pending] = []
        if not exchange.scattered:
            return
        group, width = exchange.group, own.shape[-1]
        others = own.shape[:-2].numel()
        rows = [others * (b - a) for a, b in itertools.pairwise(exchange.parts(tokens))]
        method = exchange.method(product)
        pieces = exchange.pieces(self.own.nbytes, method)
        cuts = [[n - offset for offset in reversed(growing(n, pieces, group.size))] for n in rows]
        for i in range(pieces):
            bounds = [0, *itertools.accumulate(width * (cut[i + 1] - cut[i]) for cut in cuts)]
            buffer = own.new_empty(bounds[-1])
            buffer[bounds[group.rank] : bounds[group.rank + 1]] = self.own[cuts[group.rank][i] : cuts[group.rank][i + 1]].flatten()
            self._pieces.append((buffer, bounds, [[cut[i], cut[i + 1]] for cut in cuts]))
            self._pending.append(group.all_gather(buffer, bounds, key=exchange.key(), label=label))
        # A gather is held back behind reduces of its own step. Here products wait for both alike: first come, first served.
        group.start_step()
        if method == "plain":
            for pending in self._pending:
                pending.wait()

    def arriving(self) -> Iterator[tuple[int, int, Tensor]]:
        """The others' rows as they come: rank, number of the first row in its part, rows ``(n, features)``."""
        width = self.own.shape[-1]
        for pending, (buffer, bounds, cuts) in zip(self._pending, self._pieces, strict=True):
            pending.wait()
            for rank, (low, _) in enumerate(cuts):
                if rank != self._exchange.group.rank and bounds[rank] < bounds[rank + 1]:
                    yield rank, low, buffer[bounds[rank] : bounds[rank + 1]].view(-1, width)

    def rows(self, number: int) -> Tensor:
        """All rows of a part."""
        if number == self._exchange.own:
            return self.own
        found = [rows for rank, _, rows in self.arriving() if rank == number]
        return found[0] if len(found) == 1 else torch.cat(found) if found else self.own[:0]

    def whole(self) -> Tensor:
        """All tokens ``(..., tokens, features)``."""
        bounds = self._exchange.parts(self.shape[-2])
        leading = self.shape[:-2]
        parts = [self.rows(r).view(*leading, b - a, self.shape[-1]) for r, (a, b) in enumerate(itertools.pairwise(bounds))]
        return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def gathered_product(x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
    """``x @ weight.T + bias`` of all tokens, in pieces as they arrive.

    Args:
        x: ``(..., tokens, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.
        exchange: the ranks.

    Returns:
        ``(..., tokens, out)``.
    """
    out = own_product(x, weight, bias, exchange)
    add_arriving_product(out, x, weight, bias, exchange)
    return out


def own_product(x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
    """As :func:`gathered_product`, of which only this rank's tokens are set."""
    out = x.own.new_empty(*x.shape[:-1], weight.shape[0])
    target = _tokens(out, exchange, exchange.own)
    if target.is_contiguous():
        _product(x.own, weight.t(), bias, target.view(-1, out.shape[-1]))
    else:
        target.copy_(_product(x.own, weight.t(), bias).view(target.shape))
    return out


def add_arriving_product(out: Tensor, x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> None:
    """Sets the rest of what :func:`own_product` has given."""
    apart: dict[int, list[Tensor]] = {}
    for number, low, rows in x.arriving():
        target = _tokens(out, exchange, number)
        if target.is_contiguous():
            _product(rows, weight.t(), bias, target.view(-1, out.shape[-1])[low : low + len(rows)])
        else:  # of several sequences: rows of one part are not together
            apart.setdefault(number, []).append(_product(rows, weight.t(), bias))
    for number, found in apart.items():
        target = _tokens(out, exchange, number)
        target.copy_(torch.cat(found).view(target.shape))


def _tokens(out: Tensor, exchange: Exchange, number: int) -> Tensor:
    """Of one part."""
    low, high = exchange.parts(out.shape[-2])[number : number + 2]
    return out.narrow(-2, low, high - low)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)


class Reduced:
    """A sum over the ranks of products, of which each rank has a summand: in pieces, sent as soon as they are ready.

    Args:
        factors: the summand is the sum of ``x @ w`` over these: ``x`` ``(..., tokens, in)``, ``w`` ``(in, out)``. May be none.
        exchange: the ranks. Where tokens are cut, each rank gets its own; otherwise all get all.
        label: names the transfers.
        product: which it is, see :meth:`Exchange.method`.
        more: something that is added to the summand, ``(..., tokens, out)``.
    """

    def __init__(
        self, factors: Sequence[tuple[Tensor, Tensor]], exchange: Exchange, label: str, product: str, more: Tensor | None = None
    ) -> None:
        if not factors:
            assert more is not None, "there is something to be summed"
            factors = [(more.new_zeros(*more.shape[:-1], 1), more.new_zeros(1, more.shape[-1]))]
        x, w = factors[0]
        group, tokens, width = exchange.group, x.shape[-2], w.shape[-1]
        bounds = exchange.parts(tokens)
        count = len(bounds) - 1
        parts = [[part(x, bounds, p) for x, _ in factors] for p in range(count)]
        added = None if more is None else [part(more, bounds, p) for p in range(count)]
        weights = [w for _, w in factors]
        own = exchange.own
        rows = [len(found[0]) for found in parts]
        method = exchange.method(product)
        pieces = exchange.pieces(rows[own] * width * x.element_size(), method)
        cuts = [shares(n, pieces) for n in rows]
        self.shape = (*x.shape[:-2], bounds[own + 1] - bounds[own], width)

        def compute(number: int, i: int) -> None:
            low, high = cuts[number][i], cuts[number][i + 1]
            if low == high:
                return
            out = buffers[i][offsets[i][number] : offsets[i][number + 1]].view(-1, width)
            torch.mm(parts[number][0][low:high], weights[0], out=out)
            for rows, weight in zip(parts[number][1:], weights[1:], strict=True):
                out.addmm_(rows[low:high], weight)
            if added is not None:
                out.add_(added[number][low:high])

        offsets = [[0, *itertools.accumulate(width * (cut[i + 1] - cut[i]) for cut in cuts)] for i in range(pieces)]
        buffers = [x.new_empty(bounds[-1]) for bounds in offsets]
        # This rank's own part is last where a reduce-scatter takes it when it is waited for: see Group.reduce_scatter.
        late = exchange.scattered and group.keyed and method == "pipeline"
        self._pending: list[Pending] = []
        for i in range(pieces):
            for number in [(own + step) % count for step in range(1, count)]:
                compute(number, i)
            if not late:
                compute(own, i)
            if exchange.scattered:
                posted = group.reduce_scatter(buffers[i], offsets[i], key=exchange.key(), label=label)
            else:
                posted = group.all_reduce(buffers[i], label=label)
            self._pending.append(posted)
            if method == "plain":
                posted.wait()
        for i in range(pieces if late else 0):
            compute(own, i)

    def wait(self) -> Tensor:
        """The sum, ``(..., own tokens, out)``."""
        found = [pending.wait() for pending in self._pending]
        return (found[0] if len(found) == 1 else torch.cat(found)).view(self.shape)


def own_weight_gradient(grad: Tensor, x: Gathered, exchange: Exchange) -> Tensor:
    """``grad.T @ x`` over this rank's tokens.

    Args:
        grad: of a product's output, ``(..., tokens, out)``.
        x: its input, ``(..., tokens, in)``.
        exchange: the ranks.

    Returns:
        ``(out, in)``.
    """
    return part(grad, exchange.parts(grad.shape[-2]), exchange.own).t() @ x.own


def add_weight_gradient(total: Tensor, grad: Tensor, x: Gathered, exchange: Exchange) -> None:
    """Adds what the others' tokens give."""
    bounds = exchange.parts(grad.shape[-2])
    for number in range(len(bounds) - 1):
        if number != exchange.own:
            total.addmm_(part(grad, bounds, number).t(), x.rows(number))
