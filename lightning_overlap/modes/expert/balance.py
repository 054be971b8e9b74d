"""Balances the experts: sums over all ranks how many tokens chose each expert, and moves the biases of routers by it.

    forward, backward (of each microbatch)   every rank counts its tokens
    last backward before the optimizer       the counts are summed, under the optimizer's step
    next forward, validation or checkpoint   the biases move by one step

So a bias moves once an optimizer step, by the tokens of the whole batch: not by those of a validation, nor again by those that an
activation checkpoint computes again (torchtitan 1304, 1593, 4148; AutoModel 3247).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.patches import Hook, replace_method
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.nn.moe import MoELayer, TopKRouter, count_in_backward, token_counts, update_bias
from lightning_overlap.ranks.group import Group, Pending

BIAS = "e_score_correction_bias"
"""Name of the buffer that a router adds to the scores where it chooses, in models of transformers and in :class:`TopKRouter`."""


@dataclass(frozen=True, eq=False)
class Router:
    """A router whose tokens are counted.

    Attributes:
        name: of the module.
        module: chooses experts: ``forward`` returns logits, weights ``(tokens, k)`` and experts ``(tokens, k)``.
        experts: their number.
        rate: step of its bias; 0: it stays.
    """

    name: str
    module: nn.Module
    experts: int
    rate: float

    @classmethod
    def of(cls, name: str, module: nn.Module, experts: int, rate: float) -> Router:
        """Makes one. A router of ``lightning_overlap.nn`` has a rate of its own."""
        if isinstance(module, TopKRouter):
            return cls(name, module, experts, module.update_bias_rate)
        return cls(name, module, experts, rate if isinstance(getattr(module, BIAS, None), Tensor) else 0.0)


def refuse_rate(rate: float, routers: Sequence[Router]) -> None:
    """Refuses a rate without a bias that it would move.

    Raises:
        ConfigError: no router of a model of transformers has a bias.
    """
    if rate and not any(router.rate and not isinstance(router.module, TopKRouter) for router in routers):
        raise ConfigError(
            f"expert_parallel.update_bias_rate={rate}: no router has a buffer {BIAS}, as those of DeepSeek-V3 and GLM-4 MoE have. "
            "Leave update_bias_rate out; of lightning_overlap.nn.TopKRouter it is an argument"
        )


class Balance:
    """Counts the tokens of each expert on all ranks of a stage, and moves the routers' biases.

    Args:
        routers: of this rank's stage.
        group: the ranks of the stage.
        copies: ranks that have the same tokens.

    Attributes:
        counts: by router, the tokens of each expert in the last step, ``(experts,)``; empty before the first one.
    """

    def __init__(self, routers: Sequence[Router], group: Group, copies: int) -> None:
        self.counts: dict[str, Tensor] = {}
        self._routers, self._group, self._copies = routers, group, copies
        self._pending: Pending | None = None
        uncounted = [router for router in routers if not isinstance(router.module, TopKRouter) or not router.rate]
        self._hooks = [router.module.register_forward_hook(Hook(_count_choices(router))) for router in uncounted]
        for router in routers:
            bias = getattr(router.module, BIAS, None)
            if router.rate and bias.dtype != torch.float32:  # a step of the bias is lost in 16 bits
                setattr(router.module, BIAS, bias.float())

    def post(self) -> None:
        """Posts the sums of the tokens that were counted since the last call. Collective."""
        self.apply()
        counts = [token_counts(r.module, r.experts, next(r.module.parameters()).device) for r in self._routers]
        self._forget()
        self._pending = self._group.all_reduce(torch.cat(counts), label="expert.balance")

    def apply(self) -> None:
        """Waits for the sums, if they are posted, and moves the biases."""
        if self._pending is None:
            return
        sums = self._pending.wait().split([router.experts for router in self._routers])
        self._pending = None
        for router, total in zip(self._routers, sums, strict=True):
            if router.rate:
                update_bias(getattr(router.module, BIAS), total, router.rate)
            self.counts[router.name] = total // self._copies

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, nothing is counted."""
        before = [getattr(router.module, "tokens_per_expert", None) for router in self._routers]
        try:
            yield
        finally:
            for router, counts in zip(self._routers, before, strict=True):
                router.module.tokens_per_expert = counts

    def loads(self, ranks: int) -> dict[str, float]:
        """The load of the last step: by router the tokens of each expert and of each rank, and their maximum over the mean.

        Args:
            ranks: over which the experts are spread.
        """
        values: dict[str, float] = {}
        for name, counts in self.counts.items():
            layout = Layout(len(counts), ranks, "experts", 1)
            by_rank = torch.stack([counts[each.start : each.stop].sum() for each in map(layout.experts_of, range(ranks))])
            for kind, numbers in (("expert", counts.tolist()), ("rank", by_rank.tolist())):
                mean = sum(numbers) / len(numbers)
                values |= {f"{name}/tokens_of_{kind}_{number}": float(tokens) for number, tokens in enumerate(numbers)}
                values[f"{name}/{kind}s_max_over_mean"] = max(numbers) / mean if mean else 1.0
        return values

    def remove(self, *, complete: bool) -> None:
        """Ends the counting.

        Args:
            complete: wait for sums that are posted, and move the biases.
        """
        if complete:
            self.apply()
        for hook in self._hooks:
            hook.remove()
        self._forget()

    def _forget(self) -> None:
        for router in self._routers:
            router.module.tokens_per_expert = None


def _count_choices(router: Router) -> Callable[..., Any]:
    """Makes a forward hook of a router that does not count itself."""

    def count(module: nn.Module, args: Any, output: Any) -> Any:
        logits, weights, indices, *rest = output
        if not module.training or not weights.requires_grad:
            return None
        return logits, count_in_backward(module, weights, indices, router.experts), indices, *rest

    return count


class _Summed(Function):
    """The sum over ranks that compute the same loss from it.

    Forward: ``x``, 1-d; ``pending``, its sum -> the sum, 1-d. Backward: the gradient times the number of ranks whose gradients of a
    parameter are averaged: each rank's part of the sum has a part of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Pending, factor: int) -> Tensor:
        ctx.factor = factor
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None, None


def sum_losses_over_ranks(layer: MoELayer, tokens: Group, batches: Group, averaged: int) -> list[Callable[[], None]]:
    """Makes the balancing loss of a layer that of all tokens of the ranks which share a batch.

    Args:
        layer: the layer.
        tokens: ranks that have different tokens of the same samples.
        batches: these, and the ranks that have other samples.
        averaged: number of the ranks of ``tokens`` over which gradients of parameters are averaged; over the others they are summed.

    Returns:
        Functions that restore the layer.
    """

    def post_token_sums(sums: Tensor) -> Callable[[], Tensor]:
        pending = tokens.all_reduce(sums.detach().clone(), label="expert.loss")
        return lambda: _Summed.apply(sums, pending, averaged)

    def post_batch_counts(counts: Tensor) -> Callable[[], Tensor]:
        return batches.all_reduce(counts.clone(), label="expert.loss").wait

    undo = [replace_method(layer, "post_batch_counts", post_batch_counts)] if layer.global_batch_balance else []
    return [replace_method(layer, "post_token_sums", post_token_sums), *undo] if tokens.size > 1 else undo
