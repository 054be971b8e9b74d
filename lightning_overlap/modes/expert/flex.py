"""Runs the experts of a layer with DeepEP's kernels, see :mod:`.deep_ep`: tokens travel once to each rank that has an expert of them.

A part is some tokens of each rank. The host waits for each dispatch until it knows the number of rows. So the next part is posted when
the products of this one are queued; its transfer does not wait for these::

    host         D0 . | shared, product 0 | D1 . | C0 | product 1 | D2 . | C1 ...      D, C: dispatch and combine of a part
    transfers    D0                         D1     C0               D2     C1 ...      . : waits for the number of rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.expert.deep_ep import Arrival, Buffer, Buffers
from lightning_overlap.modes.expert.dispatch import COUNTS_KEY, Dispatch
from lightning_overlap.modes.expert.exchange import Passage, Post, Wait
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.ranks.group import Pending


@dataclass(frozen=True, kw_only=True)
class FlexDispatch(Dispatch):
    """Sends a token once to each rank that has an expert of it.

    Attributes:
        buffers: DeepEP's.
    """

    buffers: Buffers

    def __call__(
        self, hidden: Tensor, indices: Tensor, weights: Tensor, experts: LocalExperts, shared: Callable[[], object] | None = None
    ) -> Tensor:
        sent = hidden.to(experts.dtype)
        buffer = self._buffer(sent, indices)
        indices = indices.masked_fill(indices >= self.layout.experts, -1).to(self.buffers.library.index_dtype)
        values = sent.detach(), indices, weights.detach().float()
        parts = [_Part(self, buffer, number, *values) for number in range(self.layout.parts)]
        ready = buffer.event()
        tokens = _Tokens.apply(sent, weights, parts)
        parts[0].send(ready)
        if shared is not None:
            shared()
        forward = experts.start(delay_wgrad=self.delay_wgrad)
        mine = range(len(self.layout.experts_of(self.group.rank)))
        leaving = []
        for part, following, token in zip(parts, [*parts[1:], None], tokens, strict=True):
            rows, factors = _Arrive.apply(token, part)
            outputs = forward(rows, mine, part.sizes) * factors.unsqueeze(1)
            if following is not None:
                following.send(ready)
            leaving.append(Post.apply(outputs.to(rows.dtype), part.way_back))
        sums = [Wait.apply(token, part.way_back)[: part.count] for part, token in zip(parts, leaving, strict=True)]
        return torch.cat(sums).to(hidden.dtype)

    def _buffer(self, sent: Tensor, indices: Tensor) -> Buffer:
        """A buffer for the largest part of any rank. Collective.

        Raises:
            ConfigError: DeepEP cannot sum tokens of this dtype.
        """
        if sent.dtype not in (dtypes := self.buffers.library.dtypes):
            raise ConfigError(
                f"expert_parallel.dispatcher: flex sums tokens in {' or '.join(map(str, dtypes))}, and the experts compute in "
                f"{sent.dtype}. Set precision: bf16-mixed or bf16-true, and do not turn autocast off around them; or set dispatcher: "
                "alltoall"
            )
        layout, size = self.layout, self.group.size
        count = torch.full((size, 1), len(sent), device=sent.device)
        counts = self.group.all_to_all(count, [1] * size, [1] * size, key=COUNTS_KEY, label="expert.counts").wait()
        most = max(len(layout.rows_in(part, tokens)) for part in range(layout.parts) for tokens in counts.flatten().tolist())
        return self.buffers.get(max(most, 1), sent.shape[1], indices.shape[1])


class _Part:
    """Some tokens of this rank, on their way to their experts and back.

    Args:
        dispatch: of the layer.
        buffer: of the transfers.
        number: of the part.
        hidden: all tokens of this rank, ``(T, H)``.
        indices: by token, its experts, ``(T, k)``; -1: none.
        weights: of these, ``(T, k)``, fp32.

    Attributes:
        count: number of the part's tokens.
        sizes: by expert of this rank, number of the rows that come. From :meth:`send` on.
        way_back: of the experts' outputs. From :meth:`send` on.
    """

    sizes: list[int]
    way_back: Passage
    _handle: Any

    def __init__(self, dispatch: FlexDispatch, buffer: Buffer, number: int, hidden: Tensor, indices: Tensor, weights: Tensor) -> None:
        rows = dispatch.layout.rows_in(number, len(hidden))
        self.count = len(rows)
        self._dispatch, self._buffer, self._number = dispatch, buffer, number
        if rows:
            hidden, indices, weights = (x[rows.start : rows.stop].contiguous() for x in (hidden, indices, weights))
        else:  # DeepEP's tests have at least one token: one without experts, which leaves no trace
            hidden, indices, weights = (x.new_full((1, x.shape[1]), y) for x, y in ((hidden, 0), (indices, -1), (weights, 0)))
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = (hidden, indices, weights)
        self._arrival: Arrival | None = None
        self._gradients: tuple[Pending, Tensor] | None = None

    def send(self, ready: Any) -> None:
        """Posts the dispatch. The host waits until it knows :attr:`sizes`.

        Args:
            ready: the event after which the part's tokens are complete.
        """
        assert self._inputs is not None, "sent once"
        inputs, self._inputs = self._inputs, None
        label = f"expert.dispatch[{self._number}]"
        arrival = self._buffer.dispatch(*inputs, experts=self._dispatch.layout.experts, after=ready, label=label)
        self._posted(arrival.rows)
        self._arrival, self._handle, self.sizes = arrival, arrival.handle, arrival.sizes
        self.way_back = Passage(_WayBack(self._buffer, arrival.handle, self._number), self._dispatch.overlap)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Returns the rows of this rank's experts ``(N, H)`` and their weights ``(N)``."""
        assert self._arrival is not None, "sent before"
        arrival, self._arrival = self._arrival, None
        return arrival.rows.wait(), arrival.weights

    def send_gradients(self, of_rows: Tensor, of_weights: Tensor) -> None:
        """Posts the gradients of what :meth:`arrive` has returned."""
        label = f"expert.dispatch_grads[{self._number}]"
        self._gradients = self._buffer.combine(of_rows.contiguous(), self._handle, label, of_weights.contiguous())
        self._posted(self._gradients[0])

    def wait_for_gradients(self) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the part's tokens ``(count, H)`` and of their weights ``(count, k)``."""
        assert self._gradients is not None, "sent before"
        (pending, of_weights), self._gradients = self._gradients, None
        return pending.wait()[: self.count], of_weights[: self.count]

    def _posted(self, pending: Pending) -> None:
        if not self._dispatch.overlap:
            pending.wait()


@dataclass(frozen=True)
class _WayBack:
    """The transfer of outputs to their tokens' ranks, where they are summed. A :class:`~.exchange.Route`.

    Attributes:
        buffer: of the transfer.
        handle: of the dispatch.
        number: of the part.
    """

    buffer: Buffer
    handle: Any
    number: int

    def post(self, rows: Tensor) -> Pending:
        pending, _ = self.buffer.combine(rows, self.handle, f"expert.combine[{self.number}]")
        return pending

    def post_gradient(self, gradient: Tensor) -> Pending:
        return self.buffer.dispatch_again(gradient, self.handle, f"expert.combine_grads[{self.number}]")


class _Tokens(Function):
    """Joins tokens and weights to the parts in the graph.

    Forward: hidden states ``(T, H)`` and weights ``(T, k)`` -> by part, a token (an empty tensor). Backward: waits for the gradients
    of all parts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, parts: Sequence[_Part]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.dtype = parts, weights.dtype
        return tuple(hidden.new_empty(0) for _ in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        of_hidden, of_weights = zip(*(part.wait_for_gradients() for part in ctx.parts), strict=True)
        return torch.cat(of_hidden), torch.cat(of_weights).to(ctx.dtype), None


class _Arrive(Function):
    """Waits for the rows of a part. Forward: token -> rows ``(N, H)``, weights ``(N)``. Backward: posts their gradients."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        ctx.part = part
        return part.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_weights: Tensor) -> Any:
        ctx.part.send_gradients(of_rows, of_weights)
        return of_rows.new_empty(0), None
