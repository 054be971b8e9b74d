"""Runs the experts of a layer by gathering tokens: every rank receives all tokens, and sends back sums of its experts' outputs.

A token travels once to each rank, whatever its number of experts: fewer bytes than rows of their own where a token has more experts
than there are ranks. (The allgather dispatcher of Megatron-Core.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_overlap.modes.expert.dispatch import COUNTS_KEY, Dispatch
from lightning_overlap.modes.expert.exchange import AllToAll, Passage, Post, Wait
from lightning_overlap.modes.expert.grouped import ExpertsForward, LocalExperts

INDICES_KEY, FIRST_KEY = COUNTS_KEY + 1, COUNTS_KEY + 2
"""Keys of the exchange of indices, and the first one of the parts."""


class GatherDispatch(Dispatch):
    """Sends each token once to every rank. A part is some tokens of each rank."""

    def __call__(
        self, hidden: Tensor, indices: Tensor, weights: Tensor, experts: LocalExperts, shared: Callable[[], object] | None = None
    ) -> Tensor:
        counts = self._to_all(torch.tensor([[len(hidden)]], device=hidden.device), COUNTS_KEY, "expert.counts")
        tokens: list[int] = counts.flatten().tolist()
        by_rank = self._to_all(indices, INDICES_KEY, "expert.indices", tokens).split(tokens)
        parts = [_Part(self, number, tokens, by_rank) for number in range(self.layout.parts)]
        arrivals = [part.post(hidden.to(experts.dtype), weights) for part in parts]
        if shared is not None:
            shared()
        forward = experts.start(delay_wgrad=self.delay_wgrad)
        leaving = [part.compute(forward, *arrival) for part, arrival in zip(parts, arrivals, strict=True)]
        return torch.cat([part.sum(token, hidden.dtype) for part, token in zip(parts, leaving, strict=True)])

    def _to_all(self, x: Tensor, key: int, label: str, sizes: list[int] | None = None) -> Tensor:
        size = self.group.size
        return self.group.all_to_all(x.repeat(size, 1), [len(x)] * size, sizes or [len(x)] * size, key=key, label=label).wait()


class _Part:
    """Some tokens of each rank.

    Args:
        dispatch: of the layer.
        number: of the part.
        tokens: by rank, its number of tokens.
        indices: by rank, the experts of its tokens.
    """

    def __init__(self, dispatch: GatherDispatch, number: int, tokens: list[int], indices: tuple[Tensor, ...]) -> None:
        group, layout = dispatch.group, dispatch.layout
        ranges = [layout.rows_in(number, count) for count in tokens]
        self.ranks = group.size
        self.rows = slice(ranges[group.rank].start, ranges[group.rank].stop)
        sent, received = [len(ranges[group.rank])] * group.size, [len(each) for each in ranges]
        keys = itertools.count(FIRST_KEY + 6 * number)

        def passage(name: str, send: list[int], receive: list[int]) -> Passage:
            return Passage(AllToAll(group, send, receive, next(keys), next(keys), f"expert.{name}", number), dispatch.overlap)

        self.hidden, self.weights = passage("dispatch", sent, received), passage("weights", sent, received)
        self.outputs = passage("combine", received, sent)
        mine = layout.experts_of(group.rank)
        chosen = torch.cat([x[each.start : each.stop] for x, each in zip(indices, ranges, strict=True)])
        self.choices = chosen.shape[1]
        flat = chosen.flatten()
        pairs = ((flat >= mine.start) & (flat < mine.stop)).nonzero().squeeze(1)
        self.pairs = pairs[flat[pairs].argsort(stable=True)]
        self.experts = range(len(mine))
        self.sizes: list[int] = torch.bincount(flat[pairs] - mine.start, minlength=len(mine)).tolist()

    def post(self, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Posts the part's tokens of this rank, and their weights, to all ranks."""
        copies = [x[self.rows].repeat(self.ranks, 1) for x in (hidden, weights)]
        return Post.apply(copies[0], self.hidden), Post.apply(copies[1], self.weights)

    def compute(self, forward: ExpertsForward, hidden: Tensor, weights: Tensor) -> Tensor:
        """Computes this rank's experts of all ranks' tokens, and posts the sums of their outputs, in the dtype of the products.

        Sums are in the common dtype of outputs and weights, which under autocast is fp32, and are rounded once.
        """
        arrived: Tensor = Wait.apply(hidden, self.hidden)
        factors = Wait.apply(weights, self.weights).flatten()[self.pairs].unsqueeze(1)
        tokens = self.pairs // self.choices
        outputs = forward(arrived.index_select(0, tokens), self.experts, self.sizes) * factors
        sums = outputs.new_zeros(len(arrived), outputs.shape[1])
        for choice in range(self.choices):  # a token is there once for each, so the order of a sum is fixed on CUDA, too
            rows = (self.pairs % self.choices == choice).nonzero().squeeze(1)
            sums = sums.index_add(0, tokens[rows], outputs.index_select(0, rows))
        token: Tensor = Post.apply(sums.to(arrived.dtype), self.outputs)
        return token

    def sum(self, token: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums in ``dtype`` what has come back for this rank's tokens, by rank."""
        returned: Tensor = Wait.apply(token, self.outputs)
        return returned.view(self.ranks, -1, returned.shape[1]).sum(0, dtype=dtype)
