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


VOCABULARY = 64
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "head_dim": 8, "initializer_range": 0.1, "max_position_embeddings": 64}
_MOE = {**_SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **{**_MOE, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4},
    **{"n_shared_experts": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
_DEEPSEEK = {name: value for name, value in _DEEPSEEK.items() if name not in ("num_experts", "head_dim")}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralForCausalLM, {**_SIZES, "num_local_experts": 4}),
    "qwen2": (transformers.Qwen2MoeForCausalLM, {**_MOE, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}),
    "qwen3": (transformers.Qwen3MoeForCausalLM, {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "olmoe": (transformers.OlmoeForCausalLM, {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (transformers.DeepseekV3ForCausalLM, _DEEPSEEK),
    "gpt_oss": (transformers.GptOssForCausalLM, {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
}
"""Small models of transformers that train: class, arguments of its config."""


def tiny(name: str, **changes: Any) -> Any:
    """A small model of :data:`MODELS`, with other settings if asked."""
    kind, settings = MODELS[name]
    return kind(kind.config_class(**{**settings, **changes}))
