"""Roles: where they come from, what is cut, and what is refused."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from lightning_overlap import ConfigError, OverlapConfig
from lightning_overlap.model.roles import parse_role
from lightning_overlap.modes.tensor.plan import find_plan, pieces_of
from lightning_overlap.nn import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead


class Attention(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.n_head, self.head_dim = heads, 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.dropout = nn.LayerNorm(16), Attention(heads), MLP(), nn.Dropout()


class Model(nn.Module):
    def __init__(self, heads: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block(heads) for _ in range(2))
        self.head = nn.Linear(16, 31, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


PLAN = {"attention.qkv": "column", "attention.proj": "row", "blocks.*.mlp.up": "column", "mlp.down": "row", "head": "vocab_head"}


def test_what_is_cut() -> None:
    found = find_plan(Model(), PLAN, 2)
    layers = {layer.name: (layer.role, layer.parts, layer.dim) for layer in found.layers}
    assert layers["blocks.1.attention.qkv"] == ("column", (16, 16, 16), 0), "q, k and v are told by the name"
    assert layers["blocks.0.mlp.up"] == ("column", (64,), 0)
    assert layers["blocks.0.mlp.down"] == ("row", (64,), 1)
    assert layers["head"] == ("vocab_head", (31,), 0)
    assert sorted(region.name for region in found.regions) == [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention", "mlp")]
    assert found.counts == {(f"blocks.{n}.attention", "n_head"): 4 for n in (0, 1)}
    assert found.blocks == "blocks"
    assert found.loose == ()
    assert found.source == "strategy's parallel_plan"


def test_the_module_may_have_the_plan() -> None:
    model = Model()
    model.parallel_plan = PLAN  # type: ignore[assignment]
    assert find_plan(model, {"blocks": "blocks"}, 2).source == "parallel_plan of Model"
    assert find_plan(model, {}, 2).layers == find_plan(model, PLAN, 2).layers


def test_what_is_tied_is_cut_together() -> None:
    assert {layer.name for layer in find_plan(Model(tied=True), PLAN, 2).layers} >= {"head", "tokens"}
    assert "tokens" not in {layer.name for layer in find_plan(Model(), PLAN, 2).layers}


SIZES = {"vocab_size": 33, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
HUGGING: dict[str, tuple[Any, set[str]]] = {
    "llama": (
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        {"model.model.layers.0.self_attn.q_proj", "model.lm_head", "model.model.embed_tokens"},
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=33, n_embd=32, n_layer=2, n_head=4),
        {"model.transformer.h.0.attn.c_attn", "model.lm_head"},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig(**SIZES), {"model.gpt_neox.layers.1.attention.query_key_value"}),
}


@pytest.mark.parametrize("kind", HUGGING)
def test_hugging_face(kind: str) -> None:
    config, expected = HUGGING[kind]
    module = nn.Module()
    with torch.device("meta"):
        module.model = transformers.AutoModelForCausalLM.from_config(config)
    found = find_plan(module, {}, 2)
    assert expected <= {layer.name for layer in found.layers}
    assert {layer.role for layer in found.layers} == {"column", "row", "vocab_embedding", "vocab_head"}
    assert len(found.regions) == 4
    assert found.loose == ()
    if kind == "gpt2":
        fused = next(layer for layer in found.layers if layer.name.endswith("c_attn"))
        assert (fused.parts, fused.dim) == ((32, 32, 32), 1)
        assert ("model.transformer.h.0.attn", "split_size") in found.counts


def refused(plan: dict[str, str], size: int = 2, model: nn.Module | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        find_plan(model or Model(), plan, size)
    return str(error.value)


def test_every_reason_is_told_at_once() -> None:
    said = refused({**PLAN, "mlp.upp": "column", "norm": "column"}, 3)
    assert re.search(r"'mlp.upp' matches no module; near names are: .*mlp", said)
    assert "blocks.0.norm is a LayerNorm, which cannot be 'column'" in said
    assert "n_head=4 is not divisible by 3" in said
    assert "blocks.0.attention.qkv has 16 + 16 + 16 features, which are not divisible by 3" in said
    assert "blocks.0.mlp.down has 64 features, which are not divisible by 3" in said


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"mlp.up": "column"}, "blocks.0.mlp.up is a column layer without a row layer after it"),
        ({"mlp.down": "row"}, "blocks.0.mlp.down is a row layer without column layers before it"),
        ({**PLAN, "head": "column"}, "head is not in the list of blocks, blocks"),
        ({**PLAN, "attention.qkv": "column[5]"}, "has 48 outputs, which are not in the proportions (1, 1, 1, 1, 1)"),
        ({**PLAN, "tokens": "vocab_head"}, "tokens is a Embedding, which cannot be 'vocab_head'"),
    ],
)
def test_plans_that_do_not_fit(plan: dict[str, str], words: str) -> None:
    assert words in refused(plan)


def test_parameters_with_an_entry_a_head() -> None:
    model = Model()
    for block in model.blocks:
        block.attention.sinks = nn.Parameter(torch.zeros(6))
    plan = find_plan(model, {**PLAN, "attention.sinks": "per_head"}, 2)
    assert list(plan.per_head) == ["blocks.0.attention.sinks", "blocks.1.attention.sinks"]
    piece = pieces_of(plan.layers, plan.per_head.values())[model.blocks[0].attention.sinks]
    assert piece.of(torch.arange(6), 1, 2).tolist() == [3, 4, 5]
    assert "blocks.0.attention.sinks has 6 heads, which are not divisible by 4" in refused(
        {**PLAN, "attention.sinks": "per_head"}, 4, model
    )
    roles = {"mlp.up": "column", "mlp.down": "row", "attention.sinks": "per_head"}
    assert "blocks.0.attention.sinks has the role 'per_head', and no layer of its attention has the role 'column'" in refused(
        roles, 2, model
    )
    assert "'attention.sink' matches no parameter; near names are: blocks" in refused({**PLAN, "attention.sink": "per_head"}, 2, model)


def test_half_a_head_is_refused() -> None:
    assert "4 heads of 4 features, which are not divisible by 8" in refused(PLAN, 8)


def test_key_heads_are_looked_at() -> None:
    module = nn.Module()
    with torch.device("meta"):
        module.model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    assert "num_key_value_heads=2 is not divisible by 4" in refused({}, 4, module)


def test_a_style_of_hugging_faces_that_is_not_known() -> None:
    module = nn.Module()
    with torch.device("meta"):
        module.model = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SIZES, pad_token_id=0))
    styles = {"layers.*.self_attn.qkv_proj": "sideways"}
    with mock.patch.object(type(module.model), "tp_plan", new_callable=mock.PropertyMock, return_value=styles):
        assert "Phi3ForCausalLM's plan has the style 'sideways' for layers.*.self_attn.qkv_proj" in refused({}, 2, module)


def test_a_model_without_a_plan_is_named() -> None:
    module = nn.Module()
    with torch.device("meta"):
        sizes = {"vocab_size": 33, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
        module.model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    assert "T5ForConditionalGeneration (t5) has no plan for tensor_parallel" in refused({}, 2, module)


def test_gathered_columns_keep_all_heads() -> None:
    module = nn.Module()
    with torch.device("meta"):
        module.model = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SIZES, pad_token_id=0))
    found = find_plan(module, {}, 2)
    assert {layer.role for layer in found.layers if layer.has_all_features} == {"column", "row"}
    assert found.counts == {}
    mixed = {"self_attn.qkv_proj": "column_gathered", "self_attn.o_proj": "row"}
    assert "layers of two kinds: column_gathered and row_split go together" in refused(mixed, 2, module)


def test_no_plan() -> None:
    assert "needs roles for the layers to shard" in refused({})


def test_what_may_mix_tokens() -> None:
    model = Model()
    model.blocks[0].dropout = nn.Conv1d(4, 4, 1)
    assert find_plan(model, PLAN, 2).loose == ("blocks.0.dropout",)
    assert find_plan(model, {**PLAN, "dropout": "token_wise"}, 2).loose == ()


def test_an_attention_without_a_role_may_mix_tokens() -> None:
    mlp = {"mlp.up": "column", "mlp.down": "row"}
    assert find_plan(Model(), mlp, 2).loose == ("blocks.0.attention", "blocks.1.attention")
    assert find_plan(Model(), {**mlp, "attention": "token_wise"}, 2).loose == ()


def test_what_blocks_share_with_the_rest() -> None:
    model = Model()
    model.alias, model.first = model.blocks, model.blocks[0]
    assert find_plan(model, PLAN, 2).shared_by_blocks == (), "another name is no other use"
    model.norm = model.blocks[1].norm
    found = find_plan(model, PLAN, 2)
    assert found.shared_by_blocks == ("blocks.1.norm.weight", "blocks.1.norm.bias")
    assert found.shared_by_regions == ()
    model.down = model.blocks[0].mlp.down
    found = find_plan(model, PLAN, 2)
    assert "blocks.0.mlp.down.bias" in found.shared_by_blocks
    assert found.shared_by_regions == ()


def test_columns_of_one_region_share_no_weight() -> None:
    model = Model()
    model.blocks[0].mlp.gate = nn.Linear(16, 64)
    model.blocks[0].mlp.gate.weight = model.blocks[0].mlp.up.weight
    assert "shares its weight with blocks.0.mlp" in refused({**PLAN, "mlp.gate": "column"}, 2, model)


def test_layers_in_the_block_itself_keep_tokens_from_being_cut() -> None:
    model = Model()
    for block in model.blocks:
        block.up, block.down = block.mlp.up, block.mlp.down
        del block.mlp
    plan = {"attention.qkv": "column", "attention.proj": "row", "blocks.*.up": "column", "blocks.*.down": "row"}
    found = find_plan(model, plan, 2)
    assert set(found.loose) == {f"blocks.{n}.{name}" for n in (0, 1) for name in ("up", "down")}
    assert "blocks.0.up" in [region.name for region in found.regions]


@pytest.mark.parametrize("role", ["columns", "column[", "row[2]", "column[0]", ""])
def test_no_role(role: str) -> None:
    with pytest.raises(ConfigError, match="parallel_plan has the role " + re.escape(repr(role))):
        OverlapConfig(parallel_plan={"x": role})


def test_roles() -> None:
    assert parse_role("column[3]") == ("column", (1, 1, 1))
    assert parse_role("column[4, 1,1]") == ("column", (4, 1, 1))
    assert parse_role("blocks") == ("blocks", None)


class Made(nn.Module):
    """Of layers that say themselves how they are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(31, 16)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.attention = nn.Module()
            block.attention.mixed = ColumnParallelLinear(16, 24, parts=(4, 1, 1), bias=False)
            block.attention.out = RowParallelLinear(16, 16)
            block.mlp = nn.Module()
            block.mlp.wide = ColumnParallelLinear(16, 64, parts=(1, 1))
            block.mlp.down = RowParallelLinear(32, 16)
        self.head = VocabParallelHead(16, 31)


def test_layers_that_say_it_themselves() -> None:
    found = find_plan(Made(), {}, 2)
    assert found.source == "layers of lightning_overlap.nn"
    assert {layer.name: layer.parts for layer in found.layers if layer.role == "column"} == {
        **{f"blocks.{n}.attention.mixed": (16, 4, 4) for n in (0, 1)},
        **{f"blocks.{n}.mlp.wide": (32, 32) for n in (0, 1)},
    }
    assert {layer.role for layer in found.layers} == {"column", "row", "vocab_embedding", "vocab_head"}
    assert ColumnParallelLinear(4, 8)(torch.ones(1, 4)).shape == (1, 8), "unsharded without a strategy"
