"""What context parallelism decides, and what it refuses."""

from typing import Any

import pytest

from lightning_overlap import ConfigError, ContextParallel
from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.modes.context.config import ContextFacts
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
    ("heads", "kv_heads", "size", "method"),
    [
        (8, 8, 2, "p2p"),  # 12 against 16
        (8, 2, 2, "p2p"),
        (8, 8, 4, "a2a"),  # 36 against 24
        (8, 1, 4, "p2p"),  # 4.5 against 18
        (6, 6, 4, "p2p"),  # 6 heads do not divide
    ],
)
def test_auto_sends_the_fewest_bytes(heads: int, kv_heads: int, size: int, method: str) -> None:
    model = ContextFacts("the blocks are layers", heads, kv_heads)
    assert choices(model=model, size=size)["context"].method.value == method


def test_overlap_off_keeps_the_layout() -> None:
    plan = choices(size=2, overlap="off")["context"]
    assert not plan.overlap.value
    assert plan.method.value == "p2p"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "ring"}, "method must be auto, p2p, all_gather, a2a or a2a\\+p2p"),
        ({"method": "a2a+p2p"}, "belong together"),
        ({"hierarchical_sizes": [2, 2]}, "belong together"),
        ({"method": "a2a+p2p", "hierarchical_sizes": [2, 4]}, "whose product is context_parallel.size=4"),
        ({"method": "a2a+p2p", "hierarchical_sizes": [4]}, "must be two sizes"),
        ({"order": "zigzag"}, "order must be auto, balanced or contiguous"),
        ({"boundary": "batch"}, "boundary must be auto, loss or blocks"),
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
