"""Context parallelism through Trainer: the numbers of one process, alone and with other modes."""

from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap import ContextParallel, PipelineParallel, TensorParallel
from tests.helpers.models import Transformer
from tests.helpers.sequences import compare, train


class Net(Transformer):
    """Blocks are recomputed in backward, or not; labels of some tokens do not count, or all do.

    Args:
        recompute: whether with reentrant checkpoints; None: not at all.
        ignored: labels from this position on do not count.
        kwargs: of :class:`Transformer`.
    """

    def __init__(self, recompute: bool | None = None, ignored: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recompute, self.ignored = recompute, ignored

    def before(self, ids: Tensor) -> Tensor:
        """The hidden states before the blocks."""
        return self.embedding(ids)

    def loss(self, ids: Tensor) -> Tensor:
        x = self.before(ids[:, :-1])
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        labels = ids[:, 1:].clone()
        if self.ignored is not None:
            labels[:, self.ignored :] = -100
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "odd length": ({}, {"tokens": 13}, {}),
    "fewer tokens than chunks": ({}, {"tokens": 3}, {}),
    "tied": ({"tied": True}, {}, {}),
    "labels of some ranks do not count": ({"ignored": 3}, {}, {}),
    "accumulation and clipping": ({}, {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "recomputed": ({"recompute": False}, {}, {}),
    "recomputed, reentrant": ({"recompute": True}, {}, {}),
}


@pytest.mark.parametrize("boundary", ["loss", "blocks"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_close_to_one_process(world: Any, case: str, size: int, boundary: str) -> None:
    model, data, trainer = CASES[case]
    expected = train(None, Net, model, data, **trainer)
    strategy = {"context_parallel": ContextParallel(size=size, boundary=boundary)}  # type: ignore[arg-type]
    found = world(size).run(train_with, strategy, model, data, trainer)
    for rank in range(size):
        compare(found[rank], expected)
    assert f"context {size}" in found[0]["plan"]


def train_with(strategy: dict[str, Any], model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Any:
    return train(strategy, Net, model, data, **trainer)


@pytest.mark.parametrize(
    "config",
    [
        ContextParallel(size=4, method="p2p", pieces=3),
        ContextParallel(size=4, method="all_gather"),
        ContextParallel(size=4, method="a2a"),
        ContextParallel(size=4, method="a2a+p2p", hierarchical_sizes=[2, 2]),
        ContextParallel(size=4, order="contiguous"),
        ContextParallel(size=4, overlap=False),
    ],
    ids=lambda config: f"{config.method}, {config.order}, {config.overlap}",
)
def test_methods(world: Any, config: ContextParallel) -> None:
    expected = train(None, Net, {}, {"tokens": 13})
    for found in world(4).run(train_with, {"context_parallel": config}, {}, {"tokens": 13}, {}):
        compare(found, expected)


TENSOR = TensorParallel(size=2, vocab_parallel=True)
PIPELINE = PipelineParallel(size=2, microbatches=2)
MIXTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "context x data": (4, {}),
    "context x tensor": (4, {"tensor_parallel": TENSOR}),
    "context x tensor, replicated tokens": (
        4,
        {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True, sequence_parallel=False)},
    ),
    "context x pipeline": (4, {"pipeline_parallel": PIPELINE}),
    "context x tensor x data": (8, {"tensor_parallel": TENSOR}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_with_other_modes(world: Any, mixture: str, tied: bool) -> None:
    size, strategy = MIXTURES[mixture]
    model, trainer = {"tied": tied}, {"gradient_clip_val": 0.5}
    expected = {**train(None, Net, model, {}, **trainer), "losses": []}
    for found in world(size).run(train_with, {"context_parallel": 2, **strategy}, model, {}, trainer):
        compare({**found, "losses": []}, expected)


def test_any_length_in_a_pipeline(world: Any) -> None:
    """Ranks of one stage have unequal numbers of tokens, and send as many as their peers in the next stage expect."""
    expected = {**train(None, Net, {}, {"tokens": 13}), "losses": []}
    for found in world(4).run(train_with, {"context_parallel": 2, "pipeline_parallel": PIPELINE}, {}, {"tokens": 13}, {}):
        compare({**found, "losses": []}, expected)


def test_bf16(world: Any) -> None:
    trainer = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    expected = train(None, Net, {}, {}, **trainer)
    for found in world(2).run(train_with, {"context_parallel": 2}, {}, {}, trainer):
        compare(found, expected, tolerance=1e-2)  # bf16 keeps 8 bits of each activation


def test_overlapped_has_the_bits_of_plain(world: Any) -> None:
    overlapped, plain = (
        world(2).run(train_with, {"context_parallel": 2, "overlap": overlap}, {}, {}, {})[0] for overlap in ("auto", "off")
    )
    assert overlapped["losses"] == plain["losses"]
    assert all(weight.equal(plain["weights"][name]) for name, weight in overlapped["weights"].items())


def test_resume_in_another_layout(world: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "last.ckpt")
    world(4).run(train_and_save, {"context_parallel": 2}, path)
    expected = train(None, Net, {}, {}, resume=path, max_steps=6)
    for found in world(2).run(resume, {"context_parallel": 2}, path):
        compare(found, expected)


def train_and_save(strategy: dict[str, Any], path: str) -> Any:
    return train(strategy, Net, {}, {}, save=path, max_steps=3)


def resume(strategy: dict[str, Any], path: str) -> Any:
    return train(strategy, Net, {}, {}, resume=path, max_steps=6)
