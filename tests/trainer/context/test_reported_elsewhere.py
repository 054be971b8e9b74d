"""Failures of context parallelism that users of other packages have reported: they must not happen here.

A test's id names the reports. (PT: pytorch, TF: transformers, MLM: Megatron-LM, MB: Megatron-Bridge, TE: TransformerEngine.)
Those of the attention alone are in ``tests/modes/context/test_reported_elsewhere.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_overlap import ConfigError, ContextParallel
from tests.helpers.hugging import MODELS, Module, samples_of
from tests.helpers.models import Transformer
from tests.helpers.sequences import compare, train


class DocumentsApart(Module):
    """Calls the model with each document by itself, and divides the sum of losses by the number of labels."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        total, count = torch.zeros(()), 0
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            for document in ids.tensor_split((positions == 0).nonzero().flatten()[1:].tolist()):
                if len(document) > 1:
                    labels = len(document) - 1
                    total = total + labels * self.model(input_ids=document[None], labels=document[None]).loss
                    count += labels
        return total / count


PACKED = {"kind": "packed"}
METHODS: dict[str, dict[str, Any]] = {
    "p2p": {"method": "p2p"},
    "all_gather": {"method": "all_gather"},
    "a2a": {"method": "a2a"},
    "a2a+p2p": {"method": "a2a+p2p", "hierarchical_sizes": [2, 2]},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_axolotl_3608_and_mlm_5243(world: Any, name: str) -> None:
    """Five packed documents are five documents, whose positions restart: GPT-2's are learned, so a wrong one has another number."""
    expected = train(None, DocumentsApart, {"name": name}, PACKED, samples=samples_of, max_steps=3)
    for methods in world(4).run(train_by_methods, {"name": name}, list(METHODS.values()) if name == "llama" else [METHODS["p2p"]]):
        for found in methods:
            compare(found, expected)


def train_by_methods(model: dict[str, Any], methods: list[dict[str, Any]]) -> list[Any]:
    return [
        train({"context_parallel": ContextParallel(size=4, **method)}, Module, model, PACKED, samples=samples_of, max_steps=3)
        for method in methods
    ]


CONTIGUOUS = {"order": "contiguous"}
"""Each rank has one part of the sequence, so the last ones have no label that counts if the late ones do not."""
WINDOW = {"name": "mistral"}, {"kind": "plain", "tokens": 64}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TF 46775, loss and gradients times the ranks": (
        2,
        {},
        {"name": "llama", "items": 100},
        {"kind": "padded right"},
        {"gradient_clip_val": 0.1},
    ),
    "TF 46775, accumulated": (
        2,
        {},
        {"name": "llama", "items": 150},
        {"kind": "padded left"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    "MLM 906, verl 6609, MLM 4590, ranks without labels": (
        4,
        CONTIGUOUS,
        {"name": "llama"},
        {"kind": "late ignored"},
        {"accumulate_grad_batches": 2},
    ),
    "prime-rl 2828, TE 3527, window of 5 among 64 tokens": (4, {}, *WINDOW, {}),
    "prime-rl 2828, TE 3527, windows and full attention": (2, {}, {"name": "gemma3"}, {"kind": "padded left", "tokens": 64}, {}),
    "TE 2541, sinks": (2, {"method": "p2p"}, {"name": "gpt_oss"}, {"kind": "plain"}, {}),
}


@pytest.mark.parametrize("report", CASES)
def test_close_to_one_process(world: Any, report: str) -> None:
    size, context, model, data, trainer = CASES[report]
    expected = train(None, Module, model, data, samples=samples_of, **trainer)
    for found in world(size).run(train_with, ContextParallel(size=size, **context), model, data, trainer):
        compare(found, expected)


def train_with(context: ContextParallel, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Any:
    return train({"context_parallel": context}, Module, model, data, samples=samples_of, **trainer)


def test_windows_and_documents_matter() -> None:
    """Without them the models of these tests have other losses."""
    batch = {name: torch.stack([sample[name] for sample in samples_of("packed", 64)[:2]]) for name in ("input_ids", "position_ids")}
    for name in ("mistral", "gemma3"):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        narrow, _ = model(batch["input_ids"]).logits, setattr(model.config, "sliding_window", 64)
        assert not torch.allclose(model(batch["input_ids"]).logits, narrow, rtol=1e-3)
    for name in ("llama", "gpt2"):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        assert not torch.allclose(model(**batch, use_cache=False).logits, model(batch["input_ids"]).logits, rtol=1e-3)


# -- what a checkpoint's callback sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["TF 48167, loss of an evaluation times the ranks", "axolotl 3026, NaN of a rank without labels"])
def test_best_checkpoint(world: Any, tmp_path: Path, report: str) -> None:
    kind = "late ignored" if "NaN" in report else "padded right"
    expected = train_and_rank(None, kind, tmp_path / "one")
    for found in world(2).run(train_and_rank, ContextParallel(size=2, order="contiguous"), kind, tmp_path / "two"):
        torch.testing.assert_close(found["score"], expected["score"], rtol=1e-5, atol=0)
        assert found["best"] == expected["best"]
        compare(found, expected)


def train_and_rank(context: ContextParallel | None, kind: str, folder: Path) -> Any:
    """Also the best validation loss, and the name of its checkpoint."""
    best = ModelCheckpoint(folder, monitor="val_loss", filename="{step}", save_top_k=1)
    strategy = None if context is None else {"context_parallel": context}
    trainer = {"enable_checkpointing": True, "callbacks": [best]}
    result = train(strategy, Module, {"name": "llama"}, {"kind": kind}, samples=samples_of, **trainer)
    return {**result, "score": float(best.best_model_score), "best": Path(best.best_model_path).name}


# -- own models ----------------------------------------------------------------------------------------------------------------


class BothWays(Transformer):
    """Attention sees all tokens."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention.causal = False


@pytest.mark.parametrize(
    "report", ["PT 141429, attention both ways in the default order", "PT 147793, causal attention of torch on a CPU"]
)
def test_attention_of_torch(world: Any, report: str) -> None:
    kind = BothWays if "both ways" in report else Transformer
    expected = train(None, kind, {}, {})
    for found in world(2).run(train_own, kind):
        compare(found, expected)
        # MB's pitfall 4: a rank that attends to its own tokens only looks fast.
        assert found["bytes"]["context.pieces"] > 0
        assert found["bytes"]["context.piece_grads"] > 0


class Traffic(Callback):
    """Adds up the bytes that this rank sends, by the first part of their labels."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.groups = [group for mode in trainer.strategy.modes for group in mode.groups]  # type: ignore[attr-defined]
        for group in self.groups:
            group.log = []

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for group in self.groups:
            for transfer in group.log:
                label = transfer.label.split("[")[0]
                self.bytes[label] = self.bytes.get(label, 0) + transfer.nbytes


def train_own(kind: type[Transformer]) -> Any:
    traffic = Traffic()
    return {**train({"context_parallel": 2}, kind, {}, {}, callbacks=[traffic]), "bytes": traffic.bytes}


def test_mb_pitfall_4_sizes_of_groups_are_missing() -> None:
    with pytest.raises(ConfigError, match="hierarchical_sizes"):
        ContextParallel(size=4, method="a2a+p2p")
