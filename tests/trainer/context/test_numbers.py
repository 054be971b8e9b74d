"""Context parallelism through Trainer: the numbers of one process, alone and with other modes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap import ContextParallel, PipelineParallel, TensorParallel
from tests.helpers.models import Attention, Block, Transformer
from tests.helpers.pairwise import pairwise
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


@pytest.mark.parametrize(("case", "size", "boundary"), pairwise(CASES, (2, 4), ("loss", "blocks")))
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


class RotaryAttention(Attention):
    """Queries and keys are turned by three positions a token, as in Qwen2-VL; a mask tells which pairs are of one document."""

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        angles = (positions * torch.tensor([1.0, 0.3, 0.1]).view(3, 1, 1)).sum(0).view(len(x), 1, -1, 1)
        turned = [torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1) for a, b in halves(q, k)]
        return self.proj(F.scaled_dot_product_attention(*turned, v, mask).transpose(1, 2).flatten(2))


def halves(*tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [x.tensor_split(2, -1) for x in tensors]


class PackedBlock(Block):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.attention = RotaryAttention(32, 4)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), positions, mask)
        return x + self.mlp(self.norms[1](x))


class Packed(Transformer):
    """Some tokens start a document. The mask of pairs ``(B, 1, S, S)`` and positions ``(3, B, S)`` are arguments of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(4))

    def loss(self, ids: Tensor) -> Tensor:
        x, labels = self.embedding(ids[:, :-1]), ids[:, 1:]
        documents = (ids[:, :-1] % 5 == 0).cumsum(1)
        alike = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        within = alike.tril().sum(-1) - 1
        positions = torch.stack([within, documents, within // 2])
        for block in self.blocks:
            x = block(x, positions, mask=alike.tril().unsqueeze(1))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.where(within > 0, -100).flatten())


@pytest.mark.parametrize(("size", "method"), [(2, "p2p"), (4, "a2a")])
def test_packed_documents_of_an_own_model(world: Any, size: int, method: Any) -> None:
    expected = train(None, Packed, {}, {})
    for found in world(size).run(train_own, Packed, ContextParallel(size=size, method=method), [{}]):
        compare(found[0], expected)


def train_own(make: type[Transformer], context: ContextParallel, models: list[dict[str, Any]]) -> list[Any]:
    return [train({"context_parallel": context}, make, model, {}) for model in models]


class Dropping(Net):
    """Drops pairs in attention, and features after it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for block in self.blocks:
            block.attention = DroppingAttention(32, 4)


class DroppingAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        dropout = 0.2 if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2).flatten(2)
        return F.dropout(self.proj(x), dropout)


def test_dropout_is_reproducible_and_the_same_where_blocks_are_recomputed(world: Any) -> None:
    models = [{}, {}, {"recompute": False}, {"recompute": True}]
    for first, *others, reentrant in world(2).run(train_own, Dropping, ContextParallel(size=2), models):
        compare(reentrant, first)  # its loss is of gathered tokens, in another order of sums
        for other in others:
            assert other["losses"] == first["losses"]
            assert all(weight.equal(first["weights"][name]) for name, weight in other["weights"].items())
        assert first["losses"] != train(None, Net, {}, {})["losses"]


class Masked(Net):
    """Draws masks in the first block, after the blocks and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, list[float]] = {}
        self.blocks[0].norms[0].register_forward_hook(lambda _, __, output: self.draw_in_block(output))

    def draw_in_block(self, output: Tensor) -> None:
        if not self.training:
            return
        self.drawn["in a block"] = F.dropout(torch.ones_like(output), 0.5)[0, 0, :24].tolist()
        self.drawn["of samples"] = F.dropout(torch.ones(24, 1, 1), 0.5).flatten().tolist()

    def training_step(self, ids: Tensor, index: int) -> Any:
        x = self.before(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        self.drawn["after the blocks"] = F.dropout(x, 0.5).local[0, 0, :24].eq(0).tolist()  # type: ignore[attr-defined]
        self.drawn["at last"] = torch.rand(4).tolist()
        return super().training_step(ids, index)


def masks_of(strategy: dict[str, Any]) -> dict[str, list[float]]:
    modules: list[Masked] = []

    def make() -> Masked:
        modules.append(Masked())
        return modules[0]

    settings = {"context_parallel": 2, "verify_first_step": False, **strategy}
    train(settings, make, {}, {"tokens": 13}, max_steps=1, val_check_interval=1)
    return modules[0].drawn


def numbered(values: list[Any]) -> list[int]:
    """By value, the index of the first one that is equal."""
    return [values.index(value) for value in values]


MASKS: dict[str, tuple[int, dict[str, Any], list[int], list[int]]] = {
    "context": (2, {}, [0, 1], [0, 1]),
    "context x sequence": (4, {"tensor_parallel": TensorParallel(size=2)}, [0, 1, 2, 3], [0, 0, 2, 2]),
    "context x tensor": (4, {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)}, [0, 0, 2, 2], [0, 0, 2, 2]),
}
"""By layout, its ranks, its strategy, and which ranks draw the same masks in a block and after the blocks."""


@pytest.mark.parametrize("layout", MASKS)
def test_ranks_drop_features_of_their_own_tokens(world: Any, layout: str) -> None:
    """And all other numbers are common to them, though they have drawn masks of other sizes."""
    size, strategy, in_block, after = MASKS[layout]
    drawn = world(size).run(masks_of, strategy)
    expected = {"in a block": in_block, "of samples": [0] * size, "after the blocks": after, "at last": [0] * size}
    for kind, ranks in expected.items():
        assert numbered([each[kind] for each in drawn]) == ranks, kind


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
