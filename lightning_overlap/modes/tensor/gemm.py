"""Matrix products of tensor parallelism, in pieces that run beside their transfers.

Activations are ``(..., tokens, features)``. Tokens are sharded, one part for each rank (sequence parallelism), or every rank has all.

    gathered   this rank's part is multiplied while the other ranks' parts are in transfer, then each piece when it is received
    reduced    the other ranks' parts are multiplied first, and each piece is sent when it is ready; this rank's part is last

A part travels in ``splits`` pieces. Exposed are the product of the last gathered piece, which :func:`growing` makes the smallest
one, and the transfer of the first reduced piece: reduced pieces are equal, because the last of growing ones would be sent late. On
two ranks both orders are those of a ring exchange. On more ranks, each sends to each directly: on a full-duplex link that takes as
long, without steps in between. (The idea: S. Wang et al., Overlap Communication with Dependent Computation via Decomposition,
ASPLOS 2023.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_overlap.modes.tensor.config import METHODS
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.state.pieces import shares

MOST_SPLITS = 4
PIECE_BYTES = 256 << 10
"""The smallest mean size of a piece where ``splits`` is not set: each piece costs the host a tenth of a millisecond."""
_KEYS = 1 << 12


def growing(n: int, pieces: int, size: int) -> tuple[int, ...]:
    """``pieces + 1`` offsets that split ``n``, each piece larger than the one before: 1 : 2 : 4 : 8 on two ranks.

    The other ranks' parts are (size - 1) / size of a product. If the complete product takes as long as the transfer, a piece that is
    size / (size - 1) times as large as the one before is computed while that one is in transfer.
    """
    ratio = size / (size - 1) if size > 1 else 1.0
    offsets = [0.0, *itertools.accumulate(ratio**i for i in range(pieces))]
    return tuple(int(n * (offset / offsets[-1])) for offset in offsets)


@dataclass
class Exchange:
    """How the ranks of a tensor group exchange activations.

    Attributes:
        group: the ranks.
        sharded: each rank has its part of the tokens; otherwise every rank has all tokens.
        overlapped: False: each transfer is waited for where it is posted (the plain twin).
        splits: pieces of a part; None: by its size.
        keep_gathered: backward uses the input that forward has gathered; otherwise it is gathered again.
        methods: by product, the method that hides its transfer, if it is not the first one of :data:`METHODS`.
    """

    group: Group
    sharded: bool
    overlapped: bool = True
    splits: int | None = None
    keep_gathered: bool = False
    methods: Mapping[str, str] = field(default_factory=dict)
    _keys: Iterator[int] = field(default_factory=itertools.count)

    def key(self) -> int:
        """The next key of a transfer, see :meth:`Group.all_gather`. Ranks post in the same order, so their keys agree."""
        return next(self._keys) % _KEYS

    def method(self, product: str) -> str:
        """The method that hides the transfer of a product; ``ring`` for a name that is no product. Without overlap: ``plain``."""
        if not self.overlapped:
            return "plain"
        return self.methods.get(product) or next(iter(METHODS.get(product, ["ring"])))

    def pieces(self, nbytes: int, method: str) -> int:
        """The number of pieces of a part of that many bytes."""
        if method in ("bulk", "plain"):
            return 1
        return self.splits or max(1, min(MOST_SPLITS, nbytes // PIECE_BYTES))

    def bounds(self, tokens: int) -> tuple[int, ...]:
        """Offsets of the parts of that many tokens: one part for each rank, or a single one if tokens are not sharded."""
        return shares(tokens, self.group.size) if self.sharded else (0, tokens)

    @property
    def part_index(self) -> int:
        """The index of this rank's part."""
        return self.group.rank if self.sharded else 0


def part(x: Tensor, bounds: Sequence[int], index: int) -> Tensor:
    """The rows ``(n, features)`` of one part of the tokens of ``x``: a view if its memory allows one."""
    return x.narrow(-2, bounds[index], bounds[index + 1] - bounds[index]).reshape(-1, x.shape[-1])


class Gathered:
    """The tokens of all ranks: posts their gather, in pieces, and gives each piece when it is received.

    Args:
        x: this rank's tokens ``(..., local tokens, features)``.
        tokens: the number of all tokens.
        exchange: the ranks.
        label: names the transfers.
        product: the product that reads the tokens, see :meth:`Exchange.method`.

    Attributes:
        shape: of all tokens, ``(..., tokens, features)``.
        local: this rank's tokens as rows ``(n, features)``.
    """

    def __init__(self, x: Tensor, tokens: int, exchange: Exchange, label: str, product: str = "") -> None:
        self.shape = (*x.shape[:-2], tokens, x.shape[-1])
        self.local = x.reshape(-1, x.shape[-1])
        self._exchange = exchange
        self._pieces: list[tuple[Tensor, list[int], list[int]]] = []
        """By piece: the buffer of all ranks' rows, each rank's offset in it, and the first row of the piece in each rank's part."""
        self._pending: list[Pending] = []
        if not exchange.sharded:
            return
        group, width = exchange.group, x.shape[-1]
        sequences = x.shape[:-2].numel()
        rows = [sequences * (b - a) for a, b in itertools.pairwise(exchange.bounds(tokens))]
        method = exchange.method(product)
        pieces = exchange.pieces(self.local.nbytes, method)
        offsets = [[n - offset for offset in reversed(growing(n, pieces, group.size))] for n in rows]
        for i in range(pieces):
            bounds = [0, *itertools.accumulate(width * (offset[i + 1] - offset[i]) for offset in offsets)]
            buffer = x.new_empty(bounds[-1])
            low, high = offsets[group.rank][i : i + 2]
            buffer[bounds[group.rank] : bounds[group.rank + 1]] = self.local[low:high].flatten()
            self._pieces.append((buffer, bounds, [offset[i] for offset in offsets]))
            self._pending.append(group.all_gather(buffer, bounds, key=exchange.key(), label=label))
        if method == "plain":
            for pending in self._pending:
                pending.wait()

    def received(self) -> Iterator[tuple[int, int, Tensor]]:
        """Waits for each piece in turn. Yields the other ranks' rows: rank, first row in that rank's part, rows ``(n, features)``."""
        width = self.local.shape[-1]
        for pending, (buffer, bounds, first_rows) in zip(self._pending, self._pieces, strict=True):
            pending.wait()
            for rank, first_row in enumerate(first_rows):
                if rank != self._exchange.group.rank and bounds[rank] < bounds[rank + 1]:
                    yield rank, first_row, buffer[bounds[rank] : bounds[rank + 1]].view(-1, width)

    def rows(self, index: int) -> Tensor:
        """Waits for all rows ``(n, features)`` of a part."""
        if index == self._exchange.part_index:
            return self.local
        pieces = [rows for rank, _, rows in self.received() if rank == index]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self.local[:0]

    def wait(self) -> Tensor:
        """Waits for all tokens ``(..., tokens, features)``."""
        bounds = self._exchange.bounds(self.shape[-2])
        leading = self.shape[:-2]
        parts = [self.rows(r).view(*leading, b - a, self.shape[-1]) for r, (a, b) in enumerate(itertools.pairwise(bounds))]
        return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def gathered_product(x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
    """``x @ weight.T + bias`` of all tokens; each piece is multiplied when it is received.

    Args:
        x: ``(..., tokens, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.
        exchange: the ranks.

    Returns:
        ``(..., tokens, out)``.
    """
    out = local_product(x, weight, bias, exchange)
    add_remote_product(out, x, weight, bias, exchange)
    return out


def local_product(x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
    """The result of :func:`gathered_product`, in which only this rank's tokens are set."""
    out = x.local.new_empty(*x.shape[:-1], weight.shape[0])
    target = _tokens(out, exchange, exchange.part_index)
    if target.is_contiguous():
        _product(x.local, weight.t(), bias, target.view(-1, out.shape[-1]))
    else:
        target.copy_(_product(x.local, weight.t(), bias).view(target.shape))
    return out


def add_remote_product(out: Tensor, x: Gathered, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> None:
    """Sets the other ranks' tokens in the result ``out`` of :func:`local_product`."""
    scattered: dict[int, list[Tensor]] = {}
    for index, first_row, rows in x.received():
        target = _tokens(out, exchange, index)
        if target.is_contiguous():
            _product(rows, weight.t(), bias, target.view(-1, out.shape[-1])[first_row : first_row + len(rows)])
        else:  # with several sequences, the rows of one part are not adjacent
            scattered.setdefault(index, []).append(_product(rows, weight.t(), bias))
    for index, pieces in scattered.items():
        target = _tokens(out, exchange, index)
        target.copy_(torch.cat(pieces).view(target.shape))


def _tokens(out: Tensor, exchange: Exchange, index: int) -> Tensor:
    """The tokens of one part, a view ``(..., part's tokens, features)``."""
    low, high = exchange.bounds(out.shape[-2])[index : index + 2]
    return out.narrow(-2, low, high - low)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)


class Reduced:
    """A sum over the ranks of products: computes this rank's summand in pieces, and posts the sum of each when it is ready.

    Args:
        factors: the summand is the sum of ``x @ w`` over these: ``x`` ``(..., tokens, in)``, ``w`` ``(in, out)``. May be empty.
        exchange: the ranks. If tokens are sharded, each rank gets the sum of its part; otherwise all ranks get the sum of all.
        label: names the transfers.
        product: the product's name, see :meth:`Exchange.method`.
        more: ``(..., tokens, out)``, added to the summand.
    """

    def __init__(
        self, factors: Sequence[tuple[Tensor, Tensor]], exchange: Exchange, label: str, product: str, more: Tensor | None = None
    ) -> None:
        if not factors:
            assert more is not None, "there is something to sum"
            factors = [(more.new_zeros(*more.shape[:-1], 1), more.new_zeros(1, more.shape[-1]))]
        x, w = factors[0]
        group, tokens, width = exchange.group, x.shape[-2], w.shape[-1]
        bounds = exchange.bounds(tokens)
        count = len(bounds) - 1
        parts = [[part(x, bounds, p) for x, _ in factors] for p in range(count)]
        added = None if more is None else [part(more, bounds, p) for p in range(count)]
        weights = [w for _, w in factors]
        local = exchange.part_index
        rows = [len(inputs[0]) for inputs in parts]
        method = exchange.method(product)
        pieces = exchange.pieces(rows[local] * width * x.element_size(), method)
        row_offsets = [shares(n, pieces) for n in rows]
        self.shape = (*x.shape[:-2], bounds[local + 1] - bounds[local], width)

        def compute(index: int, i: int) -> None:
            low, high = row_offsets[index][i], row_offsets[index][i + 1]
            if low == high:
                return
            out = buffers[i][offsets[i][index] : offsets[i][index + 1]].view(-1, width)
            torch.mm(parts[index][0][low:high], weights[0], out=out)
            for rows, weight in zip(parts[index][1:], weights[1:], strict=True):
                out.addmm_(rows[low:high], weight)
            if added is not None:
                out.add_(added[index][low:high])

        offsets = [[0, *itertools.accumulate(width * (part[i + 1] - part[i]) for part in row_offsets)] for i in range(pieces)]
        buffers = [x.new_empty(bounds[-1]) for bounds in offsets]
        # A reduce-scatter that reads this rank's part only in its wait leaves that part's product for later: see Group.reduce_scatter.
        late = exchange.sharded and group.keyed and method == "pipeline"
        self._pending: list[Pending] = []
        for i in range(pieces):
            for index in [(local + step) % count for step in range(1, count)]:
                compute(index, i)
            if not late:
                compute(local, i)
            if exchange.sharded:
                posted = group.reduce_scatter(buffers[i], offsets[i], key=exchange.key(), label=label)
            else:
                posted = group.all_reduce(buffers[i], label=label)
            self._pending.append(posted)
            if method == "plain":
                posted.wait()
        for i in range(pieces if late else 0):
            compute(local, i)

    def wait(self) -> Tensor:
        """Waits for the sum: ``(..., local tokens, out)``, or of all tokens if they are not sharded."""
        sums = [pending.wait() for pending in self._pending]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(self.shape)


def local_weight_gradient(grad: Tensor, x: Gathered, exchange: Exchange) -> Tensor:
    """``grad.T @ x`` over this rank's tokens.

    Args:
        grad: of a product's output, ``(..., tokens, out)``.
        x: its input, ``(..., tokens, in)``.
        exchange: the ranks.

    Returns:
        ``(out, in)``.
    """
    return part(grad, exchange.bounds(grad.shape[-2]), exchange.part_index).t() @ x.local


def add_remote_weight_gradient(total: Tensor, grad: Tensor, x: Gathered, exchange: Exchange) -> None:
    """Adds ``grad.T @ x`` over the other ranks' tokens to ``total``; see :func:`local_weight_gradient`."""
    bounds = exchange.bounds(grad.shape[-2])
    for index in range(len(bounds) - 1):
        if index != exchange.part_index:
            total.addmm_(part(grad, bounds, index).t(), x.rows(index))
