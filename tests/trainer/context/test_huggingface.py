"""Models of transformers, unchanged, under context parallelism: the numbers of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_overlap import ContextParallel
from tests.helpers.sequences import compare, train

TOKENS = 32
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **MIXED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**{**SIZES, "attn_implementation": "eager"}, **MIXED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    ),
}


class Module(LightningModule):
    """An ordinary module around a model of transformers.

    Args:
        name: of :data:`MODELS`.
        recompute: whether blocks are checkpointed.
    """

    def __init__(self, name: str, recompute: bool = False) -> None:
        super().__init__()
        self.model = MODELS[name]()
        if recompute:
            self.model.gradient_checkpointing_enable()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)
        # Every rank has all tokens in there.
        ids = self.model.generate(batch["input_ids"][:, :7], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert ids.shape[1] == 10

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples_of(kind: str) -> list[dict[str, Tensor]]:
    """Samples of one kind: ``plain``, ``packed`` or ``padded``, on the left or the right, by more than half."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for ids in torch.randint(1, 64, (40, TOKENS), generator=generator):
        sample = {"input_ids": ids, "labels": ids.clone()}
        border = int(torch.randint(1, TOKENS - 1, (), generator=generator))
        if kind == "packed":
            sample["position_ids"] = torch.cat([torch.arange(border), torch.arange(TOKENS - border)])
        if kind.startswith("padded"):
            counts = torch.arange(TOKENS) < 4 + border // 3
            counts = counts if kind == "padded right" else counts.flip(0)
            sample = {"input_ids": ids * counts, "labels": ids.where(counts, -100), "attention_mask": counts.long()}
        made.append(sample)
    return made


CASES = [
    ("llama", "plain", 2),
    ("llama", "packed", 4),
    ("llama", "padded left", 2),
    ("mistral", "padded right", 4),
    ("gemma3", "packed", 2),
    ("gemma2", "plain", 2),
    ("gpt2", "padded right", 2),
    ("falcon", "plain", 2),
]


@pytest.mark.parametrize(("name", "kind", "size"), CASES)
def test_close_to_one_process(world: Any, name: str, kind: str, size: int) -> None:
    model, data = {"name": name, "recompute": name == "mistral"}, {"kind": kind}
    expected = train(None, Module, model, data, samples=samples_of)
    for found in world(size).run(train_with, {"context_parallel": ContextParallel(size=size)}, model, data):
        compare(found, expected)


def train_with(strategy: dict[str, Any], model: dict[str, Any], data: dict[str, Any]) -> Any:
    return train(strategy, Module, model, data, samples=samples_of)
