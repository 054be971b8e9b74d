"""Hugging Face models as they are: the same numbers as under DDP."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_overlap import OverlapStrategy, PipelineParallel
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
    assert "overlap_grad_reduce auto on" in ours[0]["plan"]
    for rank in range(2):
        # The same sums in another order; bf16 keeps 8 bits of each activation.
        tolerance = 1e-5 if "precision" not in trainer else 2e-3
        torch.testing.assert_close(ours[rank]["losses"], ddp[rank]["losses"], rtol=tolerance, atol=tolerance)


class Descent(Hugging):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train_pipeline(kind: str, pipeline: dict[str, Any] | None) -> torch.Tensor:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if pipeline is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(
        accelerator="cpu", devices=1 if pipeline is None else 2, strategy=strategy, max_steps=4, use_distributed_sampler=False, **quiet
    )
    module = Descent(kind)
    run.fit(module)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "pipeline", [{"layers_per_stage": (2, 1)}, {"virtual_stages": 2, "layout": "E|t|tt|L", "schedule": "interleaved_zb"}]
)
def test_close_to_one_process_with_a_pipeline(world, kind, pipeline):
    expected, _ = world(2).run(train_pipeline, kind, None)
    for weights in world(2).run(train_pipeline, kind, {"size": 2, "microbatches": 3, **pipeline}):
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def train_hugging(kwargs: dict[str, Any]) -> dict[str, Any]:
    return train(**kwargs)
