"""What context parallelism decides, and what it refuses."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_overlap import ConfigError, ContextParallel, PipelineParallel
from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.modes.context.config import ContextFacts
from lightning_overlap.modes.context.mode import look
from lightning_overlap.plan import resolve


def choices(world: int = 4, model: ContextFacts | None = None, overlap: Any = "auto", tensor: Any = None, **settings: Any) -> Any:
    facts = Facts(world_size=world, of_modes=() if model is None else (model,))
    modes = {"context_parallel": ContextParallel(**settings)} | ({} if tensor is None else {"tensor_parallel": tensor})
    return resolve(OverlapConfig(overlap=overlap, **modes), facts).choices


def test_gradients_are_averaged_over_context_ranks_also_without_data_parallelism() -> None:
    plan = choices(world=2, size=2)
    assert plan["data"].size.value == 1
    assert plan["data"].size.why == "2 ranks / context 2; gradients are averaged over 2 ranks (data 1 x context 2)"
    assert plan["data"].overlap_grad_reduce.value


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "method", "why"),
    [
        (8, 8, 2, "by mask", "p2p for a causal mask, about 75% of the other's"),  # 12 against 16
        (8, 8, 4, "by mask", "a2a for a causal mask, about 67% of the other's"),  # 36 against 24
        (8, 1, 4, "by mask", "p2p for a causal mask, about 25% of the other's"),  # 4.5 against 18
        (6, 6, 4, "p2p", "6 heads do not divide over 4 ranks, as a2a needs"),
    ],
)
def test_auto_sends_the_fewest_bytes(heads: int, kv_heads: int, size: int, method: str, why: str) -> None:
    choice = choices(model=ContextFacts("the blocks are layers", heads, kv_heads), size=size)["context"]
    assert choice.method.value == method
    assert choice.method.why.endswith(why)
    assert set(choice.methods.values()) == {method}


def test_a_method_for_each_kind_of_attention() -> None:
    plan = choices(size=2, method={"sliding_attention": "all_gather"})["context"]
    assert plan.methods == {"full_attention": "by mask", "sliding_attention": "all_gather"}
    assert plan.method.value == "full_attention: auto, sliding_attention: all_gather"
    plan = choices(size=4, method={"full_attention": "a2a+p2p", "sliding_attention": "p2p"}, hierarchical_sizes=[2, 2])["context"]
    assert plan.methods == {"full_attention": "a2a+p2p", "sliding_attention": "p2p"}
    one = choices(size=2, method={"full_attention": "a2a", "sliding_attention": "a2a"})["context"]
    assert one.method.value == "a2a"
    hash(ContextParallel(size=2, method={"full_attention": "a2a"}))


def test_a_configuration_file_may_have_a_method_for_each_kind() -> None:
    parser = ArgumentParser()
    parser.add_argument("--context", type=ContextParallel)
    config = parser.parse_string("context: {size: 2, method: {full_attention: p2p, sliding_attention: all_gather}}")
    made = parser.instantiate_classes(config).context
    assert made == ContextParallel(size=2, method={"full_attention": "p2p", "sliding_attention": "all_gather"})


def test_sharded_batches() -> None:
    model = ContextFacts("the blocks are layers", embeddings=("model.tokens", "model.positions"))
    plan = choices(model=model, size=2, boundary="batch")["context"]
    assert (plan.boundary.value, plan.order.value) == ("batch", "balanced")
    assert plan.boundary.why.startswith("model.tokens, model.positions, blocks, final norm and head")
    with pytest.raises(ConfigError, match=r"boundary: batch cannot run here: the model has no nn\.Embedding outside of the blocks"):
        choices(model=ContextFacts("the blocks are layers"), size=2, boundary="batch")
    modes: Any = {"context_parallel": ContextParallel(size=2, boundary="batch"), "pipeline_parallel": PipelineParallel(size=2)}
    with pytest.raises(ConfigError, match="boundary: batch cannot run here: in a pipeline"):
        resolve(OverlapConfig(**modes), Facts(world_size=4))


def test_overlap_off_keeps_the_layout() -> None:
    plan = choices(size=2, overlap="off")["context"]
    assert not plan.overlap.value
    assert plan.method.value == "by mask"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "ring"}, "method must be auto, p2p, all_gather, a2a or a2a\\+p2p"),
        ({"method": "a2a+p2p"}, "belong together"),
        ({"hierarchical_sizes": [2, 2]}, "belong together"),
        ({"method": "a2a+p2p", "hierarchical_sizes": [2, 4]}, "whose product is context_parallel.size=4"),
        ({"method": "a2a+p2p", "hierarchical_sizes": [4]}, "must be two sizes"),
        ({"order": "zigzag"}, "order must be auto, balanced or contiguous"),
        ({"boundary": "tokens"}, "boundary must be auto, loss, blocks or batch"),
        ({"method": {"full": "p2p"}}, "the kind of attention 'full': known are full_attention and sliding_attention"),
        ({"method": {"full_attention": "ring"}}, r"method\[full_attention\] must be auto, p2p"),
        ({"method": {"full_attention": "a2a+p2p"}}, "belong together"),
        ({"pieces": 0}, "pieces must be an integer of at least 1"),
        ({"overlap": 1}, "overlap must be true, false or auto"),
    ],
)
def test_bad_values(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ContextParallel(size=4, **settings)


def test_what_mixes_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.conv mixes tokens and is no attention"):
        choices(model=ContextFacts("the blocks are layers", mixers=("layers.0.conv",)), size=2)


def test_compiled_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="the module is compiled"):
        resolve(OverlapConfig(context_parallel=ContextParallel(size=2)), Facts(world_size=2, compiled=True))


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mlp", "layers"])
def test_compiled_parts_are_named(part: str) -> None:
    """Also where a module calls compile(), as those of transformers do, or is replaced by what torch.compile makes of it."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(OrderedDict(mlp=nn.Linear(4, 4))) for _ in range(2))
    model.get_submodule(part).compile(backend="eager")
    found = look(model, ContextParallel(size=2), {})
    with pytest.raises(ConfigError, match=rf"size=2 cannot run here: {part} is compiled, .* leave torch\.compile out"):
        resolve(OverlapConfig(context_parallel=ContextParallel(size=2)), Facts(world_size=2, compiled=True, of_modes=(found,)))
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    found = look(model, ContextParallel(size=2), {"layers": "blocks"})
    assert isinstance(found, ContextFacts)
    assert "layers.0" in found.compiled


@pytest.mark.parametrize(
    "setting",
    [{"method": "a2a"}, {"order": "contiguous"}, {"boundary": "blocks"}, {"overlap": True}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_of_one_rank_is_not_passed_over(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"context_parallel\.{next(iter(setting))}: \w+ needs context_parallel.size of at least 2"):
        resolve(OverlapConfig(context_parallel=ContextParallel(size=1, **setting)), Facts(world_size=2))
    assert "context" not in choices(size=1)


def test_a_configuration_can_be_hashed() -> None:
    assert hash(ContextParallel(size=4, method="a2a+p2p", hierarchical_sizes=[2, 2]))
