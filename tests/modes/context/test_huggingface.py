"""Masks of real models against transformers' own, and models whose attention is taken over against themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_overlap.modes.context import huggingface, seam
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask

TOKENS = 24
SIZES = {
    "vocab_size": 64,
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
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_implementation": "sdpa"}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **MIXED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "chunked": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SIZES,
            layer_types=["chunked_attention", "full_attention"],
            attention_chunk_size=6,
            num_local_experts=1,
            intermediate_size_mlp=48,
        )
    ),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def packed(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


LEFT, RIGHT = (torch.ones(2, TOKENS, dtype=torch.long) for _ in range(2))
LEFT[0, :9], RIGHT[1, -5:] = 0, 0
PACKED = torch.stack([packed(5, 12, 7), packed(1, 9, 14)])
BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"position_ids": PACKED, "use_cache": False},
    "packed with a cache": {"position_ids": PACKED, "use_cache": True},
    "padded left": {"attention_mask": LEFT},
    "padded right": {"attention_mask": RIGHT},
    "nothing padded": {"attention_mask": torch.ones_like(LEFT)},
}
IDS = torch.randint(1, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def blocks_of(model: Any) -> dict[str, nn.Module]:
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return {f"layers.{number}": block for number, block in enumerate(blocks)}


@pytest.fixture
def compared() -> list[Mask]:
    """A mask function under the name ``compared`` that makes ours and transformers' own, and compares all rows."""
    masks: list[Mask] = []

    def compare(**settings: Any) -> Tensor:
        ours = huggingface.mask(**settings)
        whole = sdpa_mask(**{**settings, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        positions = torch.arange(settings["q_length"])
        masks.append(ours)
        assert torch.equal(ours.visible(positions, positions, settings["batch_size"]).expand_as(whole), whole)
        return whole

    AttentionInterface.register("compared", sdpa_attention_forward)
    AttentionMaskInterface.register("compared", compare)
    return masks


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_masks_are_those_of_transformers(name: str, batch: str, compared: list[Mask]):
    model = model_of(name)
    model.set_attn_implementation("compared")
    model(input_ids=IDS, **BATCHES[batch])
    assert compared
    assert all(mask.rule is None and mask.bias is None for mask in compared), "described"


def whole_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: Any) -> Tensor:
    """What one rank with all tokens computes."""
    positions = torch.arange(mask.tokens)
    visible = mask.visible(positions, positions, len(q))
    assert options["softcap"] is None
    return F.scaled_dot_product_attention(q, k, v, visible, options["dropout"], scale=options["scale"], enable_gqa=True)


def taken_over(model: Any, attend: Any = whole_attention) -> tuple[huggingface.Switch, Callable[[], None]]:
    blocks = blocks_of(model)
    switch = huggingface.Switch(model, list(blocks.values()))
    local = LocalTokens(TOKENS, torch.arange(TOKENS))
    remove = seam.install(blocks, attend, lambda: None if switch.is_unsharded else local)

    def undo() -> None:
        remove()
        switch.undo()

    return switch, undo


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_taken_over_computes_the_same(name: str, batch: str):
    model = model_of(name)
    counted = BATCHES[batch].get("attention_mask", torch.ones_like(IDS)).bool()
    expected = model(input_ids=IDS, **BATCHES[batch]).logits
    _, undo = taken_over(model)
    torch.testing.assert_close(model(input_ids=IDS, **BATCHES[batch]).logits[counted], expected[counted])
    undo()
    assert torch.equal(model(input_ids=IDS, **BATCHES[batch]).logits, expected)
