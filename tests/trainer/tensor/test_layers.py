"""Layers that are more than a linear one under tensor parallelism: adapters, parametrizations, torch's own encoder."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel, TensorParallel
from tests.helpers.sequences import QUIET
from tests.trainer.tensor.test_numbers import Net


class LoraLayer(nn.Module):
    """Has the names and the forward of peft's."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, base.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_variant: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return self.base_layer(x) + 2.0 * adapted


class Dora:
    pass


PARAMETRIZED: dict[str, Any] = {
    "weight_norm": weight_norm,
    "new weight_norm": parametrizations.weight_norm,
    "spectral_norm": spectral_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def made(kind: str) -> Net:
    module = Net(tokens=8)
    for block in module.blocks:
        if kind in PARAMETRIZED:
            PARAMETRIZED[kind](block.mlp.up)
        else:
            for owner, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "up"), (block.mlp, "down")):
                setattr(owner, name, LoraLayer(getattr(owner, name), dropout=0.3 if kind == "dropout" else 0.0))
            if kind == "DoRA":
                block.mlp.up.lora_variant["default"] = Dora()
    return module


def train(kind: str, sequence: bool) -> Any:
    warnings.simplefilter("ignore")
    cut = dist.is_initialized()
    seed_everything(5, verbose=False)
    module = made(kind)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if cut:
        chosen = OverlapStrategy(tensor_parallel=TensorParallel(size=2, sequence_parallel=sequence), **env)
    length: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 0, "use_distributed_sampler": False, "gradient_clip_val": 0.5}
    try:
        Trainer(accelerator="cpu", devices=2 if cut else 1, strategy=chosen, **QUIET, **length).fit(module)  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("sequence", [True, False])
def test_adapters_follow_the_cut_of_their_layer(world: Any, sequence: bool) -> None:
    expected = train("LoRA", sequence)
    for found in world(2).run(train, "LoRA", sequence):
        assert not isinstance(found, str), found
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sequence", [True, False])
def test_adapters_with_dropout_stay_alike(world: Any, sequence: bool) -> None:
    first, second = world(2).run(train, "dropout", sequence)
    for name, weight in first.items():
        assert weight.equal(second[name]), name


@pytest.mark.parametrize("kind", ["DoRA", *PARAMETRIZED])
def test_what_cannot_be_cut_is_named(world: Any, kind: str) -> None:
    words = "blocks.0.mlp.up is peft's LoraLayer with Dora" if kind == "DoRA" else "blocks.0.mlp.up computes its weight or bias from"
    first, second = world(2).run(train, kind, True)
    assert words in first
    assert first == second


class Encoder(LightningModule):
    parallel_plan = {"linear1": "column", "linear2": "row"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 20)

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.encoder(self.into(ids), src_key_padding_mask=ids == 0)
        return F.cross_entropy(self.out(hidden).flatten(0, 1), ids.flatten(), ignore_index=0)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def loader(self) -> DataLoader:
        ids = torch.randint(1, 20, (8, 6), generator=torch.Generator().manual_seed(1))
        ids[:, 4:] = 0
        ids[::2, 3] = 0
        return DataLoader(ids, batch_size=4)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader


def validated(strategy: dict[str, Any] | None) -> float:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    chosen: Any = SingleDeviceStrategy(torch.device("cpu")) if strategy is None else OverlapStrategy(**strategy, **env)
    module = Encoder()
    run = Trainer(
        accelerator="cpu",
        devices=1 if strategy is None else 2,
        strategy=chosen,
        max_steps=2,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **QUIET,  # type: ignore[arg-type]
    )
    run.fit(module)
    assert module.encoder.use_nested_tensor
    return float(run.callback_metrics["val_loss"])


@pytest.mark.parametrize(
    "strategy", [{"tensor_parallel": 2}, {"pipeline_parallel": PipelineParallel(size=2, microbatches=1)}], ids=["tensor", "pipeline"]
)
def test_torchs_encoder_with_padding(world: Any, strategy: dict[str, Any]) -> None:
    expected = validated(None)
    for found in world(2).run(validated, strategy):
        assert found == pytest.approx(expected, rel=1e-5)
