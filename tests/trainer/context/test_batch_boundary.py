"""Batches that are sharded (``boundary: batch``): embeddings of a rank's tokens, and the numbers of one process."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap import ConfigError, ContextParallel, TensorParallel
from tests.helpers import hugging
from tests.helpers.sequences import compare, train
from tests.trainer.context.test_numbers import CASES, Net


class Counting(nn.Embedding):
    """Knows how many tokens it was last called with."""

    tokens = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.tokens = ids.shape[-1]
        return super().forward(ids)


class Local(Net):
    """A model whose embeddings must have had some of the tokens.

    Args:
        positions: embeddings of positions are added.
        most: the most tokens that embeddings may have had last; None: any number.
        kwargs: of :class:`Net`.
    """

    def __init__(self, positions: bool = False, most: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = Counting(self.vocabulary, 32)
        if kwargs.get("tied"):
            self.head.weight = self.embedding.weight
        self.positions, self.most = Counting(16, 32) if positions else None, most

    def before(self, ids: Tensor) -> Tensor:
        x = super().before(ids)
        return x if self.positions is None else F.dropout(x + self.positions(torch.arange(ids.shape[1])), 0.0)

    def on_train_end(self) -> None:
        for embedding in (self.embedding, self.positions):
            assert embedding is None or self.most is None or embedding.tokens <= self.most


class Features(Net):
    """Tokens have features instead of ids."""

    parallel_plan: ClassVar[dict[str, str]] = {"blocks": "blocks", "embedding": "token_wise"}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(self.vocabulary, 32)  # type: ignore[assignment]

    def before(self, ids: Tensor) -> Tensor:
        return self.embedding(F.one_hot(ids, self.vocabulary).float())


class Mixed(Net):
    """Hidden states of all tokens are mixed before the blocks."""

    def before(self, ids: Tensor) -> Tensor:
        return super().before(ids).flip(1)


OWN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "positions, odd length": ({"positions": True}, {"tokens": 13}, {}, 4),
    "tied": ({"tied": True}, {}, {}, 2),
    "accumulation and clipping": CASES["accumulation and clipping"] + (2,),
    "labels of some ranks do not count, recomputed": ({"ignored": 3, "recompute": False, "positions": True}, {}, {}, 4),
}


@pytest.mark.parametrize("name", OWN)
def test_own_models(world: Any, name: str) -> None:
    model, data, trainer, size = OWN[name]
    expected = train(None, Local, model, data, **trainer)
    most = -(-data.get("tokens", 16) // size) + 1
    for rank in world(size).run(train_own, ContextParallel(size=size, boundary="batch"), {**model, "most": most}, data, trainer):
        compare(rank, expected)
        assert "token ids and labels are unsharded" in rank["plan"]


def train_own(config: ContextParallel, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], **modes: Any) -> Any:
    return train({"context_parallel": config, **modes}, Local, model, data, **trainer)


@pytest.mark.parametrize("size", [4, 8])
def test_with_a_sharded_vocabulary(world: Any, size: int) -> None:
    expected = {**train(None, Local, {"tied": True}, {}), "losses": []}
    for rank in world(size).run(train_with_tensor, {"tied": True, "most": 9}):
        compare({**rank, "losses": []}, expected)  # a rank's losses are those of its samples


def train_with_tensor(model: dict[str, Any]) -> Any:
    config, tensor = ContextParallel(size=2, boundary="batch"), TensorParallel(size=2, vocab_parallel=True)
    return train_own(config, model, {}, {}, tensor_parallel=tensor)


HUGGING_FACE = {
    "learned positions": ("gpt2", "padded right", 2),
    "documents": ("llama", "packed", 4),
    "windows, scaled embeddings": ("gemma3", "packed", 2),
    "frequencies of the longest position": ("dynamic", "plain", 2),
    "frequencies of long sequences": ("longrope", "plain", 2),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(world: Any, name: str) -> None:
    model, kind, size = HUGGING_FACE[name]
    expected = train(None, hugging.Module, {"name": model}, {"kind": kind}, samples=hugging.samples_of)
    for rank in world(size).run(train_hugging_face, size, model, kind):
        compare(rank, expected)


def train_hugging_face(size: int, name: str, kind: str) -> Any:
    strategy = {"context_parallel": ContextParallel(size=size, boundary="batch")}
    return train(strategy, hugging.Module, {"name": name}, {"kind": kind}, samples=hugging.samples_of)


def test_features_and_refusals(world: Any) -> None:
    expected = train(None, Features, {}, {})
    for rank, *messages in world(2).run(train_features_and_others):
        compare(rank, expected)
        mixed, reentrant = messages
        assert "the hidden states that the first block is called with have all tokens" in mixed
        assert "set use_reentrant=False" in reentrant


def train_features_and_others() -> list[Any]:
    strategy = {"context_parallel": ContextParallel(size=2, boundary="batch")}
    results = [train(strategy, Features, {}, {})]
    for make, model in ((Mixed, {}), (Net, {"recompute": True})):
        with pytest.raises(ConfigError) as error:
            train({**strategy, "verify_first_step": False}, make, model, {})
        results.append(str(error.value))
    return results
