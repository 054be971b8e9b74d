"""Tiny models of transformers, and an ordinary module that trains one on samples of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
EAGER = {**SIZES, "attn_implementation": "eager"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_implementation": "sdpa"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 6, "intermediate_size_mlp": 48}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
LONG = {**LONG, "original_max_position_embeddings": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "dynamic": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=DYNAMIC)
    ),
    "longrope": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=LONG)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **MIXED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**EAGER, **MIXED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **NO_DROPOUT)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON, attn_implementation="sdpa")),
    "chunked": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, **CHUNKED, num_local_experts=1)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **EXPERTS, output_router_logits=True, router_aux_loss_coef=0.1)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**EAGER, **MIXED, **EXPERTS)),
}


class Module(LightningModule):
    """An ordinary module around a model of transformers.

    Args:
        name: of :data:`MODELS`.
        recompute: whether blocks are checkpointed.
        adapters: the model is frozen, and its attention trains a :class:`Adapter` of queries and values.
        reads_hidden: the loss has hidden states in it that the model records.
        items: the number of labels by which the model divides its loss; None: their number in the batch.
        generates: whether validation generates tokens, too.
        calls: of the model in a training step, each with some of the samples.
    """

    def __init__(
        self,
        name: str,
        *,
        recompute: bool = False,
        adapters: bool = False,
        reads_hidden: bool = False,
        items: int | None = None,
        generates: bool = False,
        calls: int = 1,
    ) -> None:
        super().__init__()
        self.calls = calls
        self.model = MODELS[name]()
        self.reads_hidden, self.items, self.generates = reads_hidden, items, generates
        if recompute:
            self.model.gradient_checkpointing_enable()
        if adapters:
            self.model.requires_grad_(False)
            for block in self.model.model.layers:
                attention = block.self_attn
                attention.q_proj, attention.v_proj = Adapter(attention.q_proj), Adapter(attention.v_proj)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {"num_items_in_batch": self.items} if self.items is not None else {}
        if "position_ids" in batch:  # with a cache, transformers does not look for documents
            options["use_cache"] = False
        output = self.model(**batch, **options, output_hidden_states=self.reads_hidden)
        if self.reads_hidden:  # the first is that of the embedding
            return output.loss + sum(hidden.square().mean() for hidden in output.hidden_states[1:])
        return output.loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        parts = ({name: x[first :: self.calls] for name, x in batch.items()} for first in range(self.calls))
        return torch.stack([self.loss(part) for part in parts]).mean()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        if self.generates:  # every rank has all tokens in there
            ids = self.model.generate(batch["input_ids"][:, :7], max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert ids.shape[1] == 10

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Adapter(nn.Module):
    """A frozen layer, and the product of two small matrices that is trained beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def samples_of(kind: str, tokens: int = 32) -> list[dict[str, Tensor]]:
    """40 samples of one kind.

    Args:
        kind: ``plain``; ``packed``: five documents a sample, whose positions restart and whose first tokens are no labels; ``padded
            left`` and ``padded right``: by more than half; ``late ignored``: the labels of the second half do not count.
        tokens: of a sample.
    """
    generator = torch.Generator().manual_seed(3)
    samples = []
    for ids in torch.randint(1, VOCABULARY, (40, tokens), generator=generator):
        sample = {"input_ids": ids, "labels": ids.clone()}
        border = int(torch.randint(1, tokens - 1, (), generator=generator))
        if kind == "packed":
            borders = (torch.randperm(tokens - 1, generator=generator)[:4] + 1).sort().values
            lengths = torch.cat([torch.tensor([0]), borders, torch.tensor([tokens])]).diff()
            sample["position_ids"] = torch.cat([torch.arange(int(length)) for length in lengths])
            sample["labels"][sample["position_ids"] == 0] = -100
        if kind.startswith("padded"):
            counts = torch.arange(tokens) < 4 + border // 3
            counts = counts if kind == "padded right" else counts.flip(0)
            sample = {"input_ids": ids * counts, "labels": ids.where(counts, -100), "attention_mask": counts.long()}
        if kind == "late ignored":
            sample["labels"][tokens // 2 :] = -100
        samples.append(sample)
    return samples
