"""Hugging Face models as they are: the same numbers as under DDP."""

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule

from tests.helpers.training import Net, train

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE),
    "mistral": transformers.MistralConfig(**{**LLAMA_LIKE, "tie_word_embeddings": False}),
    "gpt2": transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=3, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


class Hugging(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    train_dataloader = Net.loader


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("trainer", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}])
def test_close_to_ddp(world, kind, trainer):
    trainer = {"module": Hugging, "optimizer": kind, "limit_val_batches": 0, **trainer}
    ours = world(2).run(train_hugging, {"name": "overlap", **trainer})
    ddp = world(2).run(train_hugging, {"name": "ddp", **trainer})
    assert ours[0]["hash"] == ours[1]["hash"], "the same weights on every rank"
    assert ours[0]["keys"] == ddp[0]["keys"]
    assert "in backward" in ours[0]["plan"]
    for rank in range(2):
        # The same sums in another order; bf16 keeps 8 bits of each activation.
        tolerance = 1e-5 if "precision" not in trainer else 2e-3
        torch.testing.assert_close(ours[rank]["losses"], ddp[rank]["losses"], rtol=tolerance, atol=tolerance)


def train_hugging(kwargs: dict[str, Any]) -> dict[str, Any]:
    return train(**kwargs)
