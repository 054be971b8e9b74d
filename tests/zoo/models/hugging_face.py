"""Hugging Face's models, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from tests.zoo.case import VOCABULARY, Model, Task, next_tokens

IGNORED = -100
TOKEN_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    **TOKEN_IDS,
}
LLAMA = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "initializer_range": 0.1, **TOKEN_IDS}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 32}
MOE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
IMAGE = {
    **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")},
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 4,
}


def plain() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in next_tokens()]


def padded() -> list[dict[str, Tensor]]:
    """Nine tokens and three of padding, of which some are on the left. As many tokens count in each sample."""
    samples = []
    for number, ids in enumerate(next_tokens()):
        left = number % 4
        input_ids = F.pad(ids, (left, 3 - left))
        mask = F.pad(torch.ones_like(ids), (left, 3 - left))
        labels = input_ids.masked_fill(mask == 0, IGNORED)
        labels[left] = IGNORED
        samples.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return samples


def packed() -> list[dict[str, Tensor]]:
    """Two texts in each sample, whose positions begin anew."""
    samples = []
    for number, ids in enumerate(next_tokens()):
        first = 3 + number % 4
        places = torch.cat([torch.arange(first), torch.arange(len(ids) - first)])
        samples.append({"input_ids": ids, "position_ids": places, "labels": ids.masked_fill(places == 0, IGNORED)})
    return samples


def uneven() -> list[dict[str, Tensor]]:
    """More tokens count in some samples than in others."""
    return [
        {"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) < n % 7, IGNORED)} for n, ids in enumerate(next_tokens())
    ]


def images() -> list[dict[str, Tensor]]:
    waves = [torch.sin(ids.float().repeat(22)[:192]).view(3, 8, 8) for ids in next_tokens()]
    return [{"pixel_values": wave, "labels": ids[0] % 4} for wave, ids in zip(waves, next_tokens(), strict=True)]


def sounds() -> list[dict[str, Tensor]]:
    return [{"input_values": torch.sin(ids.float().repeat(15)[:128]), "labels": ids[0] % 4} for ids in next_tokens()]


def translations() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids.flip(0)} for ids in next_tokens()]


class Hugging(Task):
    """A model that computes its loss itself."""

    def __init__(self, model: Callable[[], Any], lr: float = 0.1) -> None:
        super().__init__()
        self.model, self.lr = model(), lr
        self.model.train()

    def loss(self, batch: Any) -> Tensor:
        return self.model(**batch).loss


class Encoder(Hugging):
    """A model that gives hidden states only."""

    def loss(self, batch: Any) -> Tensor:
        states = self.model(input_ids=batch["input_ids"]).last_hidden_state
        target = torch.sin(batch["labels"][..., None].float() * torch.arange(1, states.shape[-1] + 1))
        return F.mse_loss(states, target)


def _of(kind: str, config: Any, settings: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


CAUSAL_DATA: dict[str, Callable[[], list[Any]]] = {"plain": plain, "padded": padded, "packed": packed}


def model(
    kind: str,
    config: str,
    settings: dict[str, Any],
    data: dict[str, Callable[[], list[Any]]] | None = None,
    task: type[Hugging] = Hugging,
    lr: float = 0.1,
    **more: Any,
) -> Model:
    return Model(partial(task, partial(_of, kind, config, settings), lr), data or {"plain": plain}, **more)


def causal(
    name: str, settings: dict[str, Any], *, text: bool = False, data: tuple[str, ...] = ("plain",), lr: float = 0.1, **more: Any
) -> Model:
    """``name`` as in ``LlamaForCausalLM``."""
    config = f"{name}{'Text' if text else ''}Config"
    return model(f"{name}ForCausalLM", config, settings, {kind: CAUSAL_DATA[kind] for kind in data}, **more)


ALL = ("plain", "padded", "packed")
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
MIXTRAL = {**LLAMA, **MOE, "num_local_experts": 4}
QWEN2_MOE = {**LLAMA, **MOE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
QWEN3_MOE = {**LLAMA, **MOE, "num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True}
OLMOE = {**LLAMA, **MOE, "num_experts": 4}
GPT_OSS = {**LLAMA, **MOE, "num_local_experts": 4, "sliding_window": 4}
LLAMA4 = {
    **LLAMA,
    "intermediate_size_mlp": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
}
BALANCED = {"output_router_logits": True}
ATTENTION = {"self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column", "self_attn.o_proj": "row"}
MOE_PLAN = {**ATTENTION, "layers.*.mlp": "token_wise", "embed_tokens": "vocab_embedding", "lm_head": "vocab_head"}
BERT_PLAN = {
    "attention.self.query": "column",
    "attention.self.key": "column",
    "attention.self.value": "column",
    "attention.output.dense": "row",
    "intermediate.dense": "column",
    "layer.*.output.dense": "row",
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 4,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    **TOKEN_IDS,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    **{
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("layers", 4), ("attention_heads", 4), ("ffn_dim", 32))
    },
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **TOKEN_IDS,
}
WAV2VEC2 = {
    **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"), 0.0),
    "num_labels": 4,
    "classifier_proj_size": 16,
    **TOKEN_IDS,
}

MODELS: dict[str, Model] = {
    "llama": causal("Llama", LLAMA, data=ALL),
    "llama, uneven": model("LlamaForCausalLM", "LlamaConfig", LLAMA, {"uneven": uneven}),
    "llama tied": causal("Llama", {**LLAMA, "tie_word_embeddings": True}, data=ALL),
    "qwen2": causal("Qwen2", LLAMA, data=("plain", "padded")),
    "qwen3": causal("Qwen3", {**LLAMA, "tie_word_embeddings": True}, data=("plain", "packed")),
    "mistral": causal("Mistral", {**LLAMA, "sliding_window": 4}, data=ALL),
    "gemma": causal("Gemma", LLAMA),
    "gemma2": causal("Gemma2", {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 4}, data=("plain", "padded")),
    "gemma3": causal("Gemma3", {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 4}, text=True, data=ALL),
    "phi": causal("Phi", {**SIZES, "intermediate_size": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": causal("Phi3", {**LLAMA, "sliding_window": None}, data=("plain", "padded")),
    "olmo2": causal("Olmo2", LLAMA, data=("plain", "packed")),
    "gpt2": model("GPT2LMHeadModel", "GPT2Config", {**GPT2, **STILL}, {"plain": plain, "padded": padded}),
    "gpt_neox": causal(
        "GPTNeoX", {**SIZES, "intermediate_size": 32, "attention_dropout": 0.0, "hidden_dropout": 0.0}, data=("plain", "padded")
    ),
    "gptj": causal("GPTJ", {**GPT2, **STILL, "rotary_dim": 2}),
    "opt": causal(
        "OPT", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "attention_dropout": 0.0}, data=("plain", "padded")
    ),
    "bloom": causal(
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 4, "n_head": 4, "initializer_range": 0.1, **TOKEN_IDS},
        data=("plain", "padded"),
    ),
    "falcon": causal("Falcon", {**SIZES, "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "mpt": causal("Mpt", {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 4, "n_heads": 4, "max_seq_len": 32, **TOKEN_IDS}),
    "starcoder2": causal(
        "Starcoder2", {**LLAMA, "residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0, "sliding_window": None}
    ),
    "granite": causal("Granite", LLAMA),
    "smollm3": causal("SmolLM3", LLAMA),
    "cohere": causal("Cohere", LLAMA),
    "glm4": causal("Glm4", {**LLAMA, "partial_rotary_factor": 0.5}),
    "mamba": causal("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, **TOKEN_IDS}),
    "rwkv": causal(
        "Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "attention_hidden_size": 16, **TOKEN_IDS}
    ),
    "bert": model("BertForMaskedLM", "BertConfig", {**SIZES, **BERT}, {"plain": plain, "padded": padded}),
    "bert, plan": model("BertForMaskedLM", "BertConfig", {**SIZES, **BERT}, plan=BERT_PLAN),
    "roberta": model("RobertaForMaskedLM", "RobertaConfig", {**SIZES, **BERT}),
    "vit": model("ViTForImageClassification", "ViTConfig", {**IMAGE, **BERT}, {"plain": images}),
    "dinov2": model("Dinov2ForImageClassification", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, {"plain": images}),
    "wav2vec2": model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV2VEC2, {"plain": sounds}),
    "t5 encoder": model("T5EncoderModel", "T5Config", T5, task=Encoder),
    "t5": model("T5ForConditionalGeneration", "T5Config", T5, {"plain": translations}),
    "bart": model("BartForConditionalGeneration", "BartConfig", BART, {"plain": translations}),
    "mixtral": causal("Mixtral", MIXTRAL, data=("plain", "padded"), has_experts=True),
    "mixtral, balanced": causal("Mixtral", {**MIXTRAL, **BALANCED}, data=("plain", "padded"), has_experts=True),
    "mixtral, plan": causal("Mixtral", MIXTRAL, plan=MOE_PLAN, has_experts=True),
    "mixtral, balanced, plan": causal("Mixtral", {**MIXTRAL, **BALANCED}, plan=MOE_PLAN, has_experts=True),
    "qwen2_moe": causal("Qwen2Moe", QWEN2_MOE, has_experts=True),
    "qwen2_moe, balanced": causal("Qwen2Moe", {**QWEN2_MOE, **BALANCED}, has_experts=True),
    "qwen3_moe": causal("Qwen3Moe", QWEN3_MOE, has_experts=True),
    "qwen3_moe, balanced": causal("Qwen3Moe", {**QWEN3_MOE, **BALANCED}, has_experts=True),
    "olmoe": causal("Olmoe", OLMOE, has_experts=True),
    "olmoe, balanced": causal("Olmoe", {**OLMOE, **BALANCED}, has_experts=True),
    "gpt_oss": causal("GptOss", GPT_OSS, has_experts=True),
    "gpt_oss, balanced": causal("GptOss", {**GPT_OSS, **BALANCED}, has_experts=True),
    "deepseek_v3": causal("DeepseekV3", DEEPSEEK, data=("plain", "padded"), has_experts=True),
    "llama4": causal("Llama4", LLAMA4, text=True, has_experts=True),
}
