"""Small models with experts: of transformers, and own ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ARCHITECTURES = (
    *("afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4"),
    *("dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "gpt_oss"),
    *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v3", "hy_v4", "inkling2_text", "inkling_text"),
    *("jamba", "kimi_linear", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text"),
    *("mistral4", "mistral_large4_text", "mixtral", "muse_spark_text", "nemotron_h", "olmoe", "openai_privacy_filter", "phimoe"),
    *("qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open", "zaya"),
)
"""Types of models of transformers with a plan for experts."""


def build(kind: str) -> Any:
    """A model of transformers with few layers, on the meta device."""
    layers = {"num_hidden_layers": 3, **({"first_k_dense_replace": 1} if kind == "deepseek_v3" else {})}
    config = CONFIG_MAPPING[kind](**layers)
    with torch.device("meta"):
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:  # a part of a larger model
            return transformers.AutoModel.from_config(config)


class OwnExperts(nn.Module):
    """Four experts in the form of transformers."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    act_fn = staticmethod(F.silu)

    def __init__(self, experts: int = 4, features: int = 8) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * features, features) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(experts, features, features) * 0.2)
        self.has_bias = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        chosen = F.one_hot(indices, len(self.down_proj)).to(weights) * weights.unsqueeze(-1)
        up = torch.einsum("th,efh->tef", hidden, self.gate_up_proj)
        return torch.einsum("tef,ehf,te->th", self._apply_gate(up), self.down_proj, chosen.sum(1))


class OwnRouter(nn.Module):
    """Chooses two experts for each token."""

    def __init__(self, experts: int = 4, features: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, features))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, self.weight)
        scores, indices = logits.float().softmax(-1).topk(2, dim=-1)
        return logits, scores.to(hidden.dtype), indices


class OwnMoE(nn.Module):
    """A layer of experts with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.ffns, self.everybody = OwnRouter(), OwnExperts(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.route(x.flatten(0, -2))
        y: Tensor = self.ffns(x.flatten(0, -2), indices, weights)
        return y.view_as(x) + self.everybody(x)
