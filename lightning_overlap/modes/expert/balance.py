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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.expert_layers import ExpertLayer
from lightning_overlap.model.patches import replace_method
from lightning_overlap.modes.base import IMBALANCE, Setup
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.nn.moe import MoELayer, TopKRouter, count_in_backward, token_counts, update_bias
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.mesh import GroupName
from lightning_overlap.state.absent import is_absent

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
    module: Any
    experts: int
    rate: float


def find_routers(model: nn.Module, layers: Sequence[ExpertLayer], rate: float) -> list[Router]:
    """Finds the routers of layers.

    Args:
        model: the user's.
        layers: of experts.
        rate: step of the biases of routers that have no rate of their own.

    Raises:
        ConfigError: there is a rate, and no router has a bias that it would move.
    """
    own = [Router(name, m, m.num_experts, m.update_bias_rate) for name, m in model.named_modules() if isinstance(m, TopKRouter)]
    others: list[Router] = []
    for layer in layers:
        if layer.router is not None and not isinstance(module := model.get_submodule(layer.router), TopKRouter):
            others.append(Router(layer.router, module, layer.count, rate if isinstance(getattr(module, BIAS, None), Tensor) else 0.0))
    if rate and not any(router.rate for router in others):
        raise ConfigError(
            f"expert_parallel.update_bias_rate={rate}: no router has a buffer {BIAS}, as those of DeepSeek-V3 and GLM-4 MoE have. "
            "Leave update_bias_rate out; of lightning_overlap.nn.TopKRouter it is an argument"
        )
    return [*own, *others]


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
        self._absent = {router.name for router in routers if is_absent(next(router.module.parameters()))}  # on another stage
        # Not read from a weight later: in a backward, a weight that the optimizer has updated must not be read.
        self._devices = [next(router.module.parameters()).device for router in routers]
        self._pending: Pending | None = None
        uncounted = [router for router in routers if not isinstance(router.module, TopKRouter) or not router.rate]
        self._undo = [replace_method(r.module, "forward", partial(self._route, r, r.module.forward)) for r in uncounted]
        for router in routers:
            bias: Any = getattr(router.module, BIAS, None)
            if router.rate and bias.dtype != torch.float32:  # a step of the bias is lost in 16 bits
                setattr(router.module, BIAS, bias.float())

    def post(self) -> None:
        """Posts the sums of the tokens that were counted since the last call. Collective."""
        if not self._routers:
            return
        self.apply()
        counts = [token_counts(r.module, r.experts, device) for r, device in zip(self._routers, self._devices, strict=True)]
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
            if router.name not in self._absent:
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
                values[f"{name}/{kind}s{IMBALANCE}"] = max(numbers) / mean if mean else 1.0
        return values

    def remove(self, *, complete: bool) -> None:
        """Ends the counting.

        Args:
            complete: wait for sums that are posted, and move the biases.
        """
        if complete:
            self.apply()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._forget()

    def _forget(self) -> None:
        for router in self._routers:
            router.module.tokens_per_expert = None

    def _route(self, router: Router, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a router that does not count itself. Also a forward between two steps sees biases that have moved.

        It is not a hook, because shared experts under dispatch may call the forward before the block calls the module.
        """
        self.apply()
        output = forward(*args, **kwargs)
        if not isinstance(output, tuple) or len(output) < 3:
            raise ConfigError(
                f"{router.name} returns {type(output).__name__}, so its tokens cannot be counted: a router returns logits, the "
                "weights of the chosen experts and the experts. Leave expert_parallel.log_expert_load and update_bias_rate out"
            )
        logits, weights, indices, *rest = output
        if not router.module.training or not weights.requires_grad:
            return output
        return logits, count_in_backward(router.module, weights, indices, router.experts), indices, *rest


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


def sum_tokens(layer: MoELayer, group: Group, averaged: int) -> Callable[[], None]:
    """Makes the balancing loss of a layer that of all tokens of ranks which share a batch.

    Args:
        layer: the layer.
        group: ranks that have different tokens of the same samples.
        averaged: number of these ranks over which gradients of parameters are averaged; over the others they are summed.

    Returns:
        A function that restores the layer.
    """

    def post(sums: Tensor) -> Callable[[], Tensor]:
        pending = group.all_reduce(sums.detach().clone(), label="expert.loss")
        return lambda: _Summed.apply(sums, pending, averaged)

    return replace_method(layer, "post_token_sums", post)


def sum_batches(layer: MoELayer, group: Group) -> Callable[[], None]:
    """Makes a layer balance its experts over the batches of all ranks. The same tokens may be counted on several ranks.

    Args:
        layer: the layer.
        group: all ranks that have it.

    Returns:
        A function that restores the layer.
    """

    def post(counts: Tensor) -> Callable[[], Tensor]:
        return group.all_reduce(counts.clone(), label="expert.loss").wait

    return replace_method(layer, "post_batch_counts", post)


class RankBalance:
    """What ranks do together to balance the experts of one model.

    Args:
        setup: of the mode.
        model: the user's, whose tokens the outer modes shard already.
        routers: whose tokens are counted; empty: none are.

    Attributes:
        spans_samples: whether a forward sums over ranks that see other samples.
    """

    def __init__(self, setup: Setup, model: nn.Module, routers: Sequence[Router]) -> None:
        mesh = setup.mesh
        sharded = setup.boundary.is_cut(Nesting.LAYERS)  # else all tensor ranks have the same tokens
        self._layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
        self._averaged = mesh.size("context")
        has_losses = any(layer.has_loss for layer in self._layers)
        in_batches = [layer for layer in self._layers if layer.global_batch_balance]
        self.spans_samples = bool(in_batches) and mesh.size("samples") > 1
        self._sequence: Group | None = None
        self._stage: Group | None = None
        different: GroupName = "sequence" if sharded else "context"
        if has_losses and mesh.size(different) > 1:
            self._sequence = mesh.group(different, setup.timeout, "expert balance", gathers=False)
        if routers or in_batches:
            self._stage = mesh.group("stage", setup.timeout, "expert balance", gathers=False)
        self._undo = [sum_batches(layer, self._stage) for layer in in_batches if self._stage is not None]
        self.counts = Balance(routers, self._stage, 1 if sharded else mesh.size("tensor")) if self._stage is not None else None

    @property
    def groups(self) -> list[Group]:
        """The groups over which it communicates."""
        return [group for group in (self._sequence, self._stage) if group is not None]

    def install(self) -> list[Callable[[], None]]:
        """Makes losses those of all tokens of a batch, as long as ranks have different tokens. Returns functions that end that."""
        if self._sequence is None:
            return []
        return [sum_tokens(layer, self._sequence, self._averaged) for layer in self._layers]

    def release(self, *, complete: bool) -> None:
        """Restores the model.

        Args:
            complete: wait for sums that are posted, and move the biases.
        """
        if self.counts is not None:
            self.counts.remove(complete=complete)
        for undo in self._undo:
            undo()
        self._undo.clear()
