"""Transfers of rows as autograd functions: *post* and *wait* are nodes of their own, in forward and in backward.

The backward of a wait posts the transfer of the gradient, and the backward of a post waits for it. Of the nodes that are ready,
autograd runs the one that was created last. So what is created between a post and its wait runs under the transfer, and its backward
runs under the transfer of the gradient. The nodes of a forward with two parts, and what their backward does (from the bottom up)::

    PostDispatch    posts all dispatches         waits for the gradients of all dispatches
    (products)      this rank's rows of part 0   under these transfers
    Wait D0         waits                        posts the gradient
    (products)      the other rows of part 0
    Post C0         posts the combine            waits for its gradient
    Wait D1 ...
    Post C1
    (products)      this rank's rows of part 1   under the transfers that Combine has posted
    Combine         waits for all combines       posts the gradients of all combines, the last part first

A transfer in waiting is a token in the graph: an empty tensor, which joins a post to its wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.modes.expert.routing import Routing
from lightning_overlap.ranks.group import Group, Pending


class Route(Protocol):
    """A transfer of rows, and the transfer of their gradient."""

    def post(self, rows: Tensor) -> Pending:
        """Posts the transfer of rows ``(sent, H)``, contiguous; its result has the rows that come."""

    def post_gradient(self, gradient: Tensor) -> Pending:
        """Posts the transfer of the gradient of the rows that have come; its result is the gradient of the rows that were sent."""


@dataclass(frozen=True)
class AllToAll:
    """Rows go to the ranks of their experts, or come back. A :class:`Route`.

    Attributes:
        group: the ranks.
        send_sizes: rows for each rank.
        receive_sizes: rows from each rank.
        key: tells it from others in flight; its gradient has ``gradient_key``.
        gradient_key: of the gradient.
        label: names it in traces, with the number of the part: ``expert.dispatch[0]``, and ``expert.dispatch_grads[0]``.
        part: number of the part.
    """

    group: Group
    send_sizes: list[int]
    receive_sizes: list[int]
    key: int
    gradient_key: int
    label: str
    part: int

    def post(self, rows: Tensor) -> Pending:
        return self.group.all_to_all(rows, self.send_sizes, self.receive_sizes, key=self.key, label=f"{self.label}[{self.part}]")

    def post_gradient(self, gradient: Tensor) -> Pending:
        label = f"{self.label}_grads[{self.part}]"
        return self.group.all_to_all(gradient, self.receive_sizes, self.send_sizes, key=self.gradient_key, label=label)


@dataclass
class Passage:
    """One transfer of a forward, and of its gradient.

    It must not keep a tensor that it returns: nodes hold it, and a node in a cycle with its own output is never freed.

    Attributes:
        route: posts the transfers.
        overlapped: False: each transfer is waited for where it is posted.
    """

    route: Route
    overlapped: bool
    _rows: Pending | None = field(default=None, init=False)
    _gradient: Pending | None = field(default=None, init=False)

    def post(self, rows: Tensor) -> None:
        """Posts the transfer of rows."""
        self._rows = self._posted(self.route.post(rows.contiguous()))

    def wait(self) -> Tensor:
        """Returns the rows that have come."""
        assert self._rows is not None, "posted before"
        pending, self._rows = self._rows, None
        return pending.wait()

    def post_gradient(self, gradient: Tensor) -> None:
        """Posts the transfer of the gradient."""
        self._gradient = self._posted(self.route.post_gradient(gradient.contiguous()))

    def wait_for_gradient(self) -> Tensor:
        """Returns the gradient of the rows that were sent."""
        assert self._gradient is not None, "posted before"
        pending, self._gradient = self._gradient, None
        return pending.wait()

    def _posted(self, pending: Pending) -> Pending:
        if not self.overlapped:
            pending.wait()
        return pending


class Post(Function):
    """Posts the transfer of rows. Forward: rows ``(sent, H)`` -> token. Backward: waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        passage.post(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.passage.wait_for_gradient(), None


class Wait(Function):
    """Waits for rows. Forward: token -> rows ``(received, H)``. Backward: posts the transfer of their gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return passage.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.passage.post_gradient(gradient)
        return gradient.new_empty(0), None


class PostDispatch(Function):
    """Posts the dispatch of all parts, the first one first.

    Forward: hidden states ``(T, H)`` -> by part, a token; then by part, the rows that stay on this rank ``(local, H)``. Backward: the
    gradient of a token is the sum of those of its rows, in the order of its choices.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing, passages: Sequence[Passage]) -> tuple[Tensor, ...]:
        ctx.routing, ctx.passages = routing, passages
        tokens = routing.tokens
        for part, passage in zip(routing.parts, passages, strict=True):
            passage.post(hidden.index_select(0, tokens[part.sent]))
        local = [hidden.index_select(0, tokens[part.local]) for part in routing.parts]
        return (*(hidden.new_empty(0) for _ in passages), *local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        routing: Routing = ctx.routing
        local = gradients[len(ctx.passages) :]
        rows = [(passage.wait_for_gradient(), stayed) for passage, stayed in zip(ctx.passages, local, strict=True)]
        return _by_pair([x for pair in rows for x in pair], routing).sum(1), None, None


class Combine(Function):
    """Waits for the rows of all parts to come back, and sums those of each token with their weights.

    Forward: weights ``(T, k)``, by part a token, then by part the rows that stayed ``(local, H)`` -> ``(T, H)`` in the common dtype of
    rows and weights. Backward: posts the gradients of the rows, the last part first. The weights' gradient needs no transfer.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, routing: Routing, passages: Sequence[Passage], *tokens_and_rows: Tensor) -> Tensor:
        local = tokens_and_rows[len(passages) :]
        returned = [passage.wait() for passage in passages]
        rows = _by_pair([x for pair in zip(returned, local, strict=True) for x in pair], routing)
        ctx.routing, ctx.passages, ctx.dtype = routing, passages, rows.dtype
        ctx.save_for_backward(weights, rows if ctx.needs_input_grad[0] else None)
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        with torch.autocast(rows.device.type, enabled=False):  # which would round the weights to 16 bits
            return torch.bmm(weights.to(dtype).unsqueeze(1), rows.to(dtype)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, rows = ctx.saved_tensors
        routing: Routing = ctx.routing
        tokens = routing.tokens
        factors = weights.reshape(-1).to(gradient.dtype).index_select(0, routing.pairs).unsqueeze(1)

        def of_rows(places: slice) -> Tensor:
            return (gradient.index_select(0, tokens[places]) * factors[places]).to(ctx.dtype)

        if any(ctx.needs_input_grad[3:]):  # on all ranks or on none
            for part, passage in reversed(list(zip(routing.parts, ctx.passages, strict=True))):
                passage.post_gradient(of_rows(part.sent))
        local = [of_rows(part.local) for part in routing.parts]
        of_weights = None
        if rows is not None:
            of_weights = torch.bmm(rows.to(gradient.dtype), gradient.unsqueeze(2)).squeeze(2).to(weights.dtype)
        return (of_weights, None, None, *(gradient.new_empty(0, dtype=ctx.dtype) for _ in ctx.passages), *local)


def _by_pair(rows: Sequence[Tensor], routing: Routing) -> Tensor:
    """Rows in the order of sending -> ``(T, k, H)``, with zeros for dropped pairs."""
    joined = torch.cat([*rows, rows[0].new_zeros(1, rows[0].shape[1])])
    return joined.index_select(0, routing.places).view(-1, routing.choices, joined.shape[1])
