"""A mixture of experts for people who write their own models: a router sends each token to some of many feed-forward networks.

    tokens -> router -> which experts, with which weights -> experts -> weighted sum (+ shared experts) -> tokens
                     -> balancing loss

It trains anywhere: in one process, under DDP, under any strategy. Under ``OverlapStrategy`` the experts of a layer are sharded over
ranks (``expert_parallel``) and the model's code stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError

Activation = Callable[[Tensor], Tensor]
DropPolicy = Literal["probs", "position"]
COUNTS = "tokens_per_expert"
"""Attribute of a router that is written in backward, once for each forward, whatever an activation checkpoint computes again."""


class Experts(nn.Module):
    """The feed-forward networks of a layer, whose weights are stacked.

    A network is ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if it is not gated. Parameters and attributes are those of
    Hugging Face's modules of experts, so that code for these takes this module too.

    Args:
        num_experts: their number.
        hidden_size: features of a token.
        intermediate_size: features between the two layers of an expert.
        gated: whether an expert has a gate.
        activation: a function of a tensor to one of its shape.

    Attributes:
        gate_up_proj: ``(experts, 2 * intermediate, hidden)``, the gate's rows first; of gated experts.
        up_proj: ``(experts, intermediate, hidden)``; of other experts.
        down_proj: ``(experts, hidden, intermediate)``.
    """

    parallel_role = "experts"
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, gated: bool = True, activation: Activation = F.silu
    ) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.act_fn = num_experts, gated, activation
        if gated:
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        else:
            self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as ``nn.Linear`` does."""
        for weight in self.parameters():
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The product of gate and up, ``(rows, 2 * intermediate)`` -> ``(rows, intermediate)``."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Computes each token's experts and adds up their outputs.

        Args:
            hidden: the tokens, ``(tokens, hidden)``, floating.
            indices: by token, its experts, ``(tokens, k)``, int64. ``num_experts`` stands for no expert.
            weights: by token, the weights of their outputs, ``(tokens, k)``, floating.

        Returns:
            ``(tokens, hidden)``, in the dtype of ``hidden``.
        """
        choices = indices.flatten()
        sizes: list[int] = count_choices(choices, self.num_experts).tolist()
        order = choices.argsort(stable=True)[: sum(sizes)]
        rows = hidden[order // indices.shape[-1]]
        if self.has_gate:
            inner = self._apply_gate(_grouped_linear(rows, self.gate_up_proj, sizes))
        else:
            inner = self.act_fn(_grouped_linear(rows, self.up_proj, sizes))
        outputs = _grouped_linear(inner, self.down_proj, sizes) * weights.flatten()[order, None]
        scattered = outputs.new_zeros(len(choices), outputs.shape[-1]).index_copy(0, order, outputs)
        return scattered.view(*indices.shape, -1).sum(1).to(hidden.dtype)


def apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Calls the gate of a module of experts, also of Hugging Face's: ``(rows, 2 * intermediate)`` -> ``(rows, intermediate)``."""
    return experts._apply_gate(gate_up)


def _grouped_linear(rows: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """A product for each expert: ``rows`` ``(rows, in)``, sorted by expert, ``weight`` ``(experts, out, in)`` -> ``(rows, out)``."""
    products = [F.linear(part, each) for part, each in zip(rows.split(list(sizes)), weight.unbind(), strict=True)]
    return torch.cat(products)


def count_choices(choices: Tensor, num_experts: int) -> Tensor:
    """The number of tokens that have chosen each expert, without a wait of the host for the device.

    Args:
        choices: numbers of experts, any shape, int64. ``num_experts`` stands for no expert.
        num_experts: their number.

    Returns:
        ``(experts,)``, int64.
    """
    flat = choices.flatten()
    return flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


class _CountInBackward(Function):
    """Counts the tokens of each expert when the router gets its gradient.

    So each token counts once: not again where an activation checkpoint computes the forward again, and not in a forward without a
    backward, of a validation, say.

    Forward: ``weights`` ``(tokens, k)``, ``indices`` ``(tokens, k)`` -> ``weights``. Backward: the gradient, unchanged.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, indices: Tensor, router: nn.Module, num_experts: int) -> Tensor:
        ctx.router, ctx.counts = router, count_choices(indices, num_experts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.router.tokens_per_expert = token_counts(ctx.router, len(ctx.counts), ctx.counts.device) + ctx.counts
        return grad, None, None, None


def count_in_backward(router: nn.Module, weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Returns ``weights``, whose backward adds the tokens of each expert to ``router.tokens_per_expert``.

    Args:
        router: the module that has chosen.
        weights: the weights of the experts' outputs, ``(tokens, k)``.
        indices: the experts, ``(tokens, k)``, int64.
        num_experts: their number.
    """
    counted: Tensor = _CountInBackward.apply(weights, indices, router, num_experts)
    return counted


def token_counts(router: nn.Module, num_experts: int, device: torch.device) -> Tensor:
    """The tokens of each expert since the last update of the bias, ``(experts,)``, int64."""
    counts: Tensor | None = getattr(router, "tokens_per_expert", None)
    return torch.zeros(num_experts, dtype=torch.int64, device=device) if counts is None else counts


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Raises the bias of experts with fewer tokens than the mean by ``rate``, and lowers that of experts with more.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (auxiliary-loss-free load balancing).

    Args:
        bias: ``(experts,)``, fp32; changed in place.
        counts: the tokens of each expert, ``(experts,)``, of all ranks.
        rate: the step.
    """
    numbers = counts.to(torch.float64)
    bias += rate * (numbers.mean() - numbers).sign().to(bias.dtype)


class TopKRouter(nn.Module):
    """Chooses ``top_k`` experts for each token. Scores are fp32 in any precision.

    Args:
        hidden_size: features of a token.
        num_experts: their number.
        top_k: experts of a token.
        score: ``softmax``: over all experts (Switch Transformer, arXiv 2101.03961). ``sigmoid``: of each expert by itself
            (DeepSeek-V3, arXiv 2412.19437).
        normalize: whether the weights of a token's experts add up to ``scale``.
        scale: factor of the weights.
        update_bias_rate: step of the bias that balances the experts, see :func:`update_bias`; 0: there is no bias.

    Attributes:
        e_score_correction_bias: ``(experts,)``, fp32 in any precision, in checkpoints. It is added to the scores where experts are
            chosen, and not to the weights of their outputs. None if ``update_bias_rate`` is 0.
        tokens_per_expert: ``(experts,)``, int64: the tokens that this rank has trained on since the bias was updated; None: none.
    """

    parallel_role = "router"
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        update_bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k={top_k} must be at least 1, and at most num_experts={num_experts}")
        if score not in ("softmax", "sigmoid"):
            raise ConfigError(f"score={score!r} must be softmax or sigmoid")
        if update_bias_rate < 0:
            raise ConfigError(f"update_bias_rate={update_bias_rate} must not be negative")
        self.num_experts, self.top_k, self.score = num_experts, top_k, score
        self.normalize, self.scale, self.update_bias_rate = normalize, scale, update_bias_rate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if update_bias_rate else None)
        self.tokens_per_expert: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight as ``nn.Linear`` does, and sets the bias to 0."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Moves the bias with the module, but keeps its dtype: a step of the bias is lost in 16 bits."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def scores(self, logits: Tensor) -> Tensor:
        """The scores of logits, both ``(tokens, experts)``, fp32."""
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses experts.

        Args:
            hidden: the tokens, ``(tokens, hidden)``, floating.

        Returns:
            The logits ``(tokens, experts)``, fp32; the weights of the chosen experts' outputs, ``(tokens, k)``, fp32; the chosen
            experts, ``(tokens, k)``, int64. (fp64 for tokens in fp64.)
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
        scores = self.scores(logits)
        chosen = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        indices = torch.topk(chosen, self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        if self.e_score_correction_bias is not None and self.training and weights.requires_grad:
            weights = count_in_backward(self, weights, indices, self.num_experts)
        return logits, weights * self.scale, indices


def update_router_biases(model: nn.Module, all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
    """Updates the biases of all routers by the tokens since the last update. Call it after each optimizer step, on all ranks.

    ``OverlapStrategy`` does it itself, and a second call changes nothing. With another strategy of Lightning::

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            update_router_biases(self, lambda counts: self.trainer.strategy.reduce(counts, reduce_op="sum"))

    Args:
        model: a model with :class:`MoELayer`.
        all_reduce: sums a tensor over all ranks.
    """
    routers = [m for m in model.modules() if isinstance(m, TopKRouter) and m.update_bias_rate]
    biases = [router.e_score_correction_bias for router in routers if router.e_score_correction_bias is not None]
    if not routers:
        return
    counts = [token_counts(router, len(bias), bias.device) for router, bias in zip(routers, biases, strict=True)]
    sums = all_reduce(torch.cat(counts)).split([len(bias) for bias in biases])
    for router, bias, total in zip(routers, biases, sums, strict=True):
        update_bias(bias, total, router.update_bias_rate)
        router.tokens_per_expert = None


def capacity_of(tokens: int, num_experts: int, factor: float) -> int:
    """The most tokens that an expert takes.

    Source: GShard, arXiv 2006.16668, section 2.2.

    Args:
        tokens: of the rank, each counted once for each of its experts.
        num_experts: their number.
        factor: 1: an equal share of the tokens.
    """
    return math.ceil(tokens / num_experts * factor)


def within_capacity(indices: Tensor, weights: Tensor, num_experts: int, capacity: int, policy: DropPolicy) -> Tensor:
    """Which choices an expert takes, if it takes at most ``capacity`` of them.

    Args:
        indices: the experts, ``(tokens, k)``, int64.
        weights: of their outputs, ``(tokens, k)``.
        num_experts: their number.
        capacity: the most tokens of an expert.
        policy: an expert takes those of highest weight (``probs``), or the first ones (``position``).

    Returns:
        ``(tokens, k)``, bool.
    """
    choices = indices.flatten()
    first = torch.arange(len(choices), device=choices.device)
    if policy == "probs":
        first = weights.detach().flatten().argsort(descending=True, stable=True)
    by_expert = first[choices[first].argsort(stable=True)]  # sorted by expert; those of one expert in the order in which it takes them
    counts = count_choices(choices, num_experts)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(choices)
    place[by_expert] = torch.arange(len(choices), device=choices.device) - starts[choices[by_expert]]
    return (place < capacity).view_as(indices)


class MoELayer(nn.Module):
    """A mixture of experts in place of a transformer's mlp. It returns its output and its balancing loss.

    Add the losses of all layers to the loss of the step::

        layer = MoELayer(TopKRouter(384, num_experts=8, top_k=2), Experts(8, 384, 1536))
        x, balancing_loss = layer(x)
        loss = F.cross_entropy(...) + balancing_loss

    The loss is returned, and not attached to the graph, so that accumulation, microbatches and a gradient scaler scale it as they
    scale the rest, a pipeline carries it from stage to stage, and it can be logged. It is that of the batch of a rank, as under DDP.
    Ranks that share a batch (``context_parallel``, ``tensor_parallel``) get the loss of all its tokens. A padding token counts as any
    other.

    Args:
        router: chooses the experts of each token.
        experts: the experts, or another module with such a forward and ``num_experts``.
        shared_experts: a module that all tokens pass, ``(tokens, hidden)`` -> ``(tokens, hidden)``, whose output is added; None: there
            is none.
        aux_loss_coef: weight of the balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6): the number of experts
            times the sum over the experts of their share of choices times their mean score. It is 1 if all experts are used equally.
        global_batch_balance: the share of choices is that of the batches of all data ranks under ``OverlapStrategy`` (arXiv
            2501.11873), and not of a rank's batch.
        z_loss_coef: weight of the mean square of the log of the sum of the logits' exponentials, which keeps logits small (ST-MoE,
            arXiv 2202.08906, equation 5).
        capacity_factor: an expert takes at most this many times an equal share of a rank's tokens; the others pass it by. None: it
            takes all tokens.
        drop_policy: which tokens an expert takes, see :func:`within_capacity`.

    Raises:
        ConfigError: an argument is out of its range, or router and experts do not fit.
    """

    def __init__(
        self,
        router: TopKRouter,
        experts: nn.Module,
        shared_experts: nn.Module | None = None,
        *,
        aux_loss_coef: float = 0.01,
        global_batch_balance: bool = False,
        z_loss_coef: float = 0.0,
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "probs",
    ) -> None:
        super().__init__()
        if experts.num_experts != router.num_experts:
            raise ConfigError(f"the router chooses among {router.num_experts} experts, but there are {experts.num_experts}")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={capacity_factor} must be more than 0, or None")
        if drop_policy not in ("probs", "position"):
            raise ConfigError(f"drop_policy={drop_policy!r} must be probs or position")
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.aux_loss_coef, self.z_loss_coef, self.global_batch_balance = aux_loss_coef, z_loss_coef, global_batch_balance
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy

    @property
    def has_loss(self) -> bool:
        """Whether its balancing loss has a weight."""
        return bool(self.aux_loss_coef or self.z_loss_coef)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the layer.

        Args:
            x: the tokens, ``(..., hidden)``, floating.

        Returns:
            The output, ``(..., hidden)``, in the dtype of ``x``, and the balancing loss, a scalar, fp32.
        """
        hidden = x.reshape(-1, x.shape[-1])
        logits, weights, indices = self.router(hidden)
        balancing_loss = self._post_loss(logits, indices)
        if self.capacity_factor is not None:
            capacity = capacity_of(indices.numel(), self.router.num_experts, self.capacity_factor)
            kept = within_capacity(indices, weights, self.router.num_experts, capacity, self.drop_policy)
            weights, indices = weights * kept, indices.where(kept, self.router.num_experts)
        output = self.experts(hidden, indices, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)
        return output.view_as(x), balancing_loss()

    def _post_loss(self, logits: Tensor, indices: Tensor) -> Callable[[], Tensor]:
        """Posts the sums over ranks that the balancing loss needs. The result waits for them and returns the loss."""
        if not self.has_loss:
            return lambda: logits.new_zeros(())
        scores = self.router.scores(logits)
        if self.router.score == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        counts = count_choices(indices, self.router.num_experts).to(logits.dtype)
        tokens = logits.new_full((1,), len(logits))
        z = logits.logsumexp(-1).square().sum()
        token_sums = self.post_token_sums(torch.cat([scores.sum(0), z[None], counts, tokens]))
        batch_counts = self.post_batch_counts(counts) if self.global_batch_balance else None

        def loss() -> Tensor:
            score_sums, z_sum, choices, count = token_sums().split([len(counts), 1, len(counts), 1])
            choices = choices if batch_counts is None else batch_counts()
            balance = len(counts) * (choices / choices.sum() * score_sums / count).sum()
            return self.aux_loss_coef * balance + self.z_loss_coef * (z_sum / count).squeeze()

        return loss

    def post_token_sums(self, sums: Tensor) -> Callable[[], Tensor]:
        """Posts the sum over the ranks that have other tokens of the same samples: here there are none. A strategy replaces it.

        Args:
            sums: of this rank's tokens, 1-d, with a graph.

        Returns:
            A function that waits for the sum and returns it, with a graph.
        """
        return lambda: sums

    def post_batch_counts(self, counts: Tensor) -> Callable[[], Tensor]:
        """Posts the sum over all ranks of a batch and over those of other batches: here there are none. A strategy replaces it.

        Args:
            counts: of this rank's tokens by expert, ``(experts,)``, without a graph.

        Returns:
            A function that waits for the sum and returns it.
        """
        return lambda: counts
