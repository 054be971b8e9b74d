"""Masks of real models against transformers' own, and models whose attention is taken over against themselves."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context import huggingface, seam
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import AttentionOptions
from lightning_overlap.modes.context.refusals import find_mixers
from lightning_overlap.transformers_seams import set_attention
from tests.helpers.hugging import EAGER, EXPERTS, GPT2, MIXED, MODELS, SIZES

TOKENS = 24
NAMES = ("llama", "mistral", "gemma3", "qwen2", "gpt2", "falcon", "chunked")


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
    model = getattr(model, "model", model)
    blocks = model.transformer.h if hasattr(model, "transformer") else model.layers
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
@pytest.mark.parametrize("name", [name for name in NAMES if name != "falcon"])
def test_masks_are_those_of_transformers(name: str, batch: str, compared: list[Mask]):
    model = model_of(name)
    model.set_attn_implementation("compared")
    model(input_ids=IDS, **BATCHES[batch])
    assert compared
    assert all(mask.rule is None and mask.bias is None for mask in compared), "described"


def whole_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
    """What one rank with all tokens computes."""
    positions = torch.arange(mask.tokens)
    visible = mask.visible(positions, positions, len(q), range(q.shape[1]))
    assert options.softcap is None
    return F.scaled_dot_product_attention(q, k, v, visible, options.dropout, scale=options.scale, enable_gqa=True)


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
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_taken_over_computes_the_same(name: str, batch: str):
    model = model_of(name)
    counted = BATCHES[batch].get("attention_mask", torch.ones_like(IDS)).bool()
    expected = model(input_ids=IDS, **BATCHES[batch]).logits
    _, undo = taken_over(model)
    torch.testing.assert_close(model(input_ids=IDS, **BATCHES[batch]).logits[counted], expected[counted])
    undo()
    assert torch.equal(model(input_ids=IDS, **BATCHES[batch]).logits, expected)


# -- masks that are no description ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tokens"), [("images", TOKENS), ("prefix", TOKENS), ("a single pair", 300)])
def test_other_masks_are_rules(kind: str, tokens: int, compared: list[Mask]):
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = "compared"
    images = torch.full((2, TOKENS), -1)
    images[0, 3:8], images[1, 20:] = 0, 1
    options: dict[str, Any] = {
        "images": {"block_sequence_ids": images},
        "prefix": {"or_mask_function": lambda sample, head, query, key: key < 5},
        "a single pair": {"or_mask_function": lambda sample, head, query, key: (query == 7) & (key == 15) & (sample == 1)},
    }[kind]
    attention_mask = RIGHT if kind == "prefix" else None
    if kind == "images":
        with pytest.warns(UserWarning, match="a mask of 24 tokens is neither causal, windowed nor of documents"):
            create_causal_mask(config, torch.zeros(2, tokens, 32), attention_mask, None, **options)
    else:
        create_causal_mask(config, torch.zeros(2, tokens, 32), attention_mask, None, **options)
    assert compared[0].rule is not None
    some, others = torch.tensor([1, 7, 19]), torch.arange(9, 20)
    positions = torch.arange(tokens)
    whole = compared[0].visible(positions, positions, 2)
    assert torch.equal(compared[0].visible(some, others, 2), whole[..., some, :][..., others])


def test_a_mask_of_both_directions(compared: list[Mask]):
    config = transformers.ModernBertConfig(**{**SIZES, "pad_token_id": 0}, local_attention=8, layer_types=MIXED["layer_types"])
    model = transformers.ModernBertModel(config).eval()
    model.set_attn_implementation("compared")
    model(input_ids=IDS, attention_mask=RIGHT)
    assert {mask.causal for mask in compared} == {False}
    assert {mask.window for mask in compared} == {None, config.sliding_window + 1}


class LargestTensor(TorchFunctionMode):
    """Knows the most elements of a tensor that a function gave inside."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_matrix_of_all_pairs_is_made_of_many_packed_tokens():
    tokens = 32768
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**{**SIZES, "hidden_size": 8}, **MIXED))
    masks = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        masks.append(mask)
        return q

    switch = huggingface.Switch(model, list(model.layers))
    seam.install(blocks_of(model), attend, lambda: LocalTokens(tokens, torch.arange(tokens)))
    positions = packed(5000, 12345, 1, tokens - 17346)[None]
    with LargestTensor() as largest, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), position_ids=positions, use_cache=False)
    switch.undo()
    assert masks[1].window is None
    assert masks[0].window == MIXED["sliding_window"]
    assert masks[0].documents is not None
    assert masks[0].documents.unique().numel() == 4
    assert tokens < largest.elements < tokens * 128


# -- what else a model does ----------------------------------------------------------------------------------------------------------


def test_masks_that_the_user_makes():
    model = model_of("llama")
    whole = torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.7
    whole |= torch.eye(TOKENS, dtype=torch.bool)
    expected = model(input_ids=IDS, attention_mask=whole).logits
    masks = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        masks.append(mask)
        return whole_attention(q, k, v, mask, options)

    taken_over(model, attend)
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=whole).logits, expected)
    assert masks[0].bias is whole
    assert masks[0] is masks[1]


def test_keys_and_values_are_not_repeated_for_grouped_heads():
    shapes = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        shapes.append((q.shape[1], k.shape[1], v.shape[1]))
        return q

    taken_over(model := model_of("qwen2"), attend)
    model(input_ids=IDS, attention_mask=RIGHT)
    assert shapes == [(4, 2, 2)] * 2


def test_soft_cap_and_sinks_are_passed_on():
    options = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, rest: AttentionOptions) -> Tensor:
        options.append((mask.window, rest.softcap, rest.sinks))
        return q

    taken_over(gemma := transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**EAGER, attn_logit_softcapping=30.0)), attend)
    gemma(input_ids=IDS)
    taken_over(gpt := transformers.GptOssForCausalLM(transformers.GptOssConfig(**EAGER, **MIXED, **EXPERTS)), attend)
    gpt(input_ids=IDS)
    assert [softcap for _, softcap, _ in options] == [30.0, 30.0, None, None]
    assert [window for window, *_ in options[2:]] == [7, None]
    assert all(sinks is block.self_attn.sinks for (*_, sinks), block in zip(options[2:], gpt.model.layers, strict=True))


def test_a_checkpointed_model_reaches_the_seam_again_in_backward():
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        calls.append(q.requires_grad)
        return whole_attention(q, k, v, mask, options)

    model = model_of("llama").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    taken_over(model, attend)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_vision_tower_is_not_touched():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=63, attn_implementation="sdpa"
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = IDS.clone().clamp(max=62)
    ids[:, 2:6] = 63
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**batch).logits
    blocks = {f"{n}": block for n, block in enumerate(model.model.language_model.layers)}
    switch = huggingface.Switch(model, list(blocks.values()))
    seam.install(blocks, whole_attention, lambda: LocalTokens(TOKENS, torch.arange(TOKENS)))
    names = config.vision_config._attn_implementation, config.text_config._attn_implementation
    assert names == ("sdpa", huggingface.NAME)
    torch.testing.assert_close(model(**batch).logits, expected)
    switch.undo()
    assert config.text_config._attn_implementation == "sdpa"
    set_attention(config, huggingface.NAME)  # of a stack whose config has those of other stacks in it
    assert (config._attn_implementation, config.vision_config._attn_implementation) == (huggingface.NAME, "sdpa")


def test_copies_and_files_do_not_name_ours(tmp_path: Path):
    model = model_of("llama")
    expected = model(input_ids=IDS).logits
    taken_over(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config._attn_implementation == "sdpa"
        assert torch.equal(twin(input_ids=IDS).logits, expected)
    model.save_pretrained(tmp_path)
    assert huggingface.NAME not in (tmp_path / "config.json").read_text()


# -- generate and caches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_runs_with_all_tokens(cache: dict[str, Any]):
    model = model_of("mistral")
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, **cache)
    switch, _ = taken_over(model, None)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, **cache), expected)
    assert not switch.is_unsharded
    assert model.config._attn_implementation == huggingface.NAME


def test_a_forward_that_is_given_a_cache_runs_with_all_tokens():
    model = model_of("gpt2")
    expected = model(input_ids=IDS).logits
    taken_over(model, None)
    cache = transformers.DynamicCache()
    first = model(input_ids=IDS[:, :20], past_key_values=cache).logits
    rest = model(input_ids=IDS[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)


def test_a_cache_of_one_ranks_tokens_is_refused():
    model = model_of("llama")
    taken_over(model)
    cache = model(input_ids=IDS).past_key_values
    with pytest.raises(ConfigError, match="it holds the keys of this rank's tokens only"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


# -- refusals ------------------------------------------------------------------------------------------------------------------------


def test_attention_weights_are_refused():
    model = model_of("llama")
    taken_over(model)
    with pytest.raises(ConfigError, match="attention weights are a matrix of all pairs of tokens"):
        model(input_ids=IDS, output_attentions=True)
    model = model_of("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ConfigError, match="the config of LlamaConfig has output_attentions"):
        taken_over(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "settings", "mixers"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, ["Lfm2ShortConv", "convolution", "of type conv"]),
        (
            "Qwen3Next",
            {"layer_types": ["linear_attention", "full_attention"]},
            ["GatedDeltaNet", "convolution", "of type linear_attention"],
        ),
        ("Mamba", {"state_size": 4}, ["MambaMixer", "convolution"]),
        ("Rwkv", {}, ["RwkvSelfAttention", "a shift of tokens"]),
        ("RecurrentGemma", {"block_types": ["recurrent", "attention"]}, ["RecurrentGemmaRecurrentBlock", "convolution"]),
        ("DeepseekV32", {}, ["DeepseekV32Indexer"]),
        ("Qwen3", {}, []),
        ("Phi3", {}, []),
        ("Olmo2", {}, []),
        ("GptOss", MIXED, []),
        ("Qwen3Moe", {}, []),
        ("DeepseekV3", {}, []),
        ("ModernBert", {}, []),
    ],
)
def test_what_mixes_tokens_in_models_of_transformers(name: str, settings: dict[str, Any], mixers: list[str]):
    config = getattr(transformers, f"{name}Config")(**{**EAGER, **settings})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    told = find_mixers("layers", blocks)
    assert bool(told) == bool(mixers)
    assert all(any(mixer in text for text in told) for mixer in mixers), told


def test_prefix_tokens_are_refused():
    model = model_of("llama")
    taken_over(model)
    with pytest.raises(ConfigError, match="called with 24 tokens and a mask or a cache of 28"):
        model(input_ids=IDS, attention_mask=torch.ones(2, TOKENS + 4))


def test_documents_of_flash_attention():
    """It takes them from position ids also where there is a cache, or from their borders."""
    model = model_of("llama")
    model.config._attn_implementation = "flash_attention_2"  # as where it is installed
    masks = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        masks.append(mask)
        return q

    taken_over(model, attend)
    model(input_ids=IDS[:1], position_ids=PACKED[:1])
    assert masks[0].documents is not None
    with pytest.raises(ConfigError, match="borders of documents"):
        model(input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 5, TOKENS]))


def test_another_stack_with_the_same_config_is_refused():
    config = transformers.BartConfig(
        **{**GPT2, "d_model": 32}, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    model = transformers.BartModel(config)
    blocks = list(model.encoder.layers)
    switch = huggingface.Switch(model, blocks)
    seam.install({"0": blocks[0]}, whole_attention, lambda: LocalTokens(TOKENS, torch.arange(TOKENS)))
    with pytest.raises(ConfigError, match="an attention outside the blocks has the same config"):
        model(input_ids=IDS)
    switch.undo()
