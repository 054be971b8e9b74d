"""Hugging Face models as they are under tensor parallelism: the numbers of one process."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, OverlapStrategy, TensorParallel

VOCABULARY = 33
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
STILL = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
STILL_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE),
    "qwen2": transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**LLAMA_LIKE),
    "gemma": transformers.GemmaConfig(**LLAMA_LIKE),
    "gemma2": transformers.Gemma2Config(**LLAMA_LIKE),
    "gpt2": transformers.GPT2Config(**GPT2, **STILL),
    "llama without groups": transformers.LlamaConfig(**{**LLAMA_LIKE, "num_key_value_heads": 4}),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=64),
    "olmo2": transformers.Olmo2Config(**LLAMA_LIKE),
    "phi3": transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0),
    "mixtral": transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02),
    "gpt_oss": transformers.GptOssConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "gptj": transformers.GPTJConfig(**GPT2, **STILL, rotary_dim=4, n_inner=64),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0),
    "bert": transformers.BertConfig(**SIZES, **STILL_BERT, intermediate_size=64, is_decoder=True),
}


class Hugging(LightningModule):
    def __init__(self, kind: str, recompute: bool) -> None:
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.losses: list[float] = []
        self.written: list[Any] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        was = self.model.config.use_cache
        self.written.append(
            self.model.generate(batch[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=was).tolist()
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def loader(self) -> DataLoader:
        data = torch.randint(0, VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(3))
        return DataLoader(data, batch_size=4)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader


def train(kind: str, tensor: dict[str, Any] | None, recompute: bool = False, export: str | None = None) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if tensor is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(tensor_parallel=TensorParallel(vocab_parallel=True, **tensor), **env)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(
        accelerator="cpu",
        devices=1 if tensor is None else tensor["size"],
        strategy=strategy,
        max_steps=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **quiet,
    )
    module = Hugging(kind, recompute)
    run.fit(module)
    if export is not None and run.is_global_zero:
        module.model.save_pretrained(export)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return module.losses, weights, module.written, "" if tensor is None else " ".join(strategy.plan.explain().split())


@pytest.mark.parametrize("kind", ["llama without groups", "gpt2", "gpt_neox"])
def test_four_ranks(world: Any, kind: str) -> None:
    losses, weights, written, _ = train(kind, None)
    for found in world(4).run(train, kind, {"size": 4}):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5)
        assert found[2] == written


def refused(kind: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(kind, {"size": 4})
    return str(caught.value)


def test_more_ranks_than_key_value_heads_are_refused(world: Any) -> None:
    for said in world(4).run(refused, "llama"):
        assert "num_key_value_heads=2 is not divisible by 4" in said


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama without groups"])
def test_the_numbers_of_one_process(world: Any, kind: str) -> None:
    losses, weights, written, _ = train(kind, None)
    settings: list[tuple[dict[str, Any], bool]] = [({"size": 2}, False), ({"size": 2, "sequence_parallel": False}, True)]
    for tensor, recompute in settings:
        for found in world(2).run(train, kind, tensor, recompute):
            torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)
            for name, weight in weights.items():
                torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert found[2] == written, "greedy generation, with a cache of this rank's heads"


def test_recomputed_with_cut_tokens(world: Any) -> None:
    losses, *_ = train("llama", None)
    for found in world(2).run(train, "llama", {"size": 2}, True):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)


def test_export(world: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    _, weights, *_ = world(2).run(train, "qwen3", {"size": 2}, False, folder)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[f"model.{name}"])


class Images(LightningModule):
    """A vision transformer in eval mode, as ``from_pretrained`` gives it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        self.model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()  # type: ignore[arg-type]
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(pixel_values=batch, labels=(batch[:, 0, 0, 0] > 0).long()).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3)), batch_size=4)  # type: ignore[arg-type]


def train_on_images(cut: bool) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy: Any = OverlapStrategy(tensor_parallel=2, **env) if cut else SingleDeviceStrategy(torch.device("cpu"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = Images()
    length: dict[str, Any] = {"max_steps": 3, "use_distributed_sampler": False}
    Trainer(accelerator="cpu", devices=2 if cut else 1, strategy=strategy, **quiet, **length).fit(module)  # type: ignore[arg-type]
    return module.losses, [p.detach().clone() for p in module.parameters()]


def test_a_vision_transformer(world: Any) -> None:
    losses, weights = train_on_images(False)
    for found in world(2).run(train_on_images, True):
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)
        for weight, expected in zip(found[1], weights, strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
