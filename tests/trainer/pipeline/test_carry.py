"""Tensors that go from block to block beside the hidden states: a pipeline trains what one process trains."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.up(self.norm(x)).tanh()


class Net(LightningModule):
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.out = nn.Linear(WIDTH, 1)

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(self.through(self.into(batch))).square().mean()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    @staticmethod
    def data() -> DataLoader:
        return DataLoader(torch.randn(24, 4, generator=torch.Generator().manual_seed(2)), 8)  # type: ignore[arg-type]


class MakesBias(Block):
    """The first block that gets no bias makes one, which all later blocks get, as T5's do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        bias = self.bias * x.mean() if bias is None else bias
        return super().forward(x) + bias, bias


class SharedBias(Net):
    block = MakesBias

    def through(self, x: torch.Tensor) -> torch.Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class Checkpointed(SharedBias):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        bias = None
        for block in self.blocks:
            x, bias = checkpoint(block, x, bias, use_reentrant=False)
        return x


class Values(Block):
    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> Any:
        values = self.up(self.norm(x)).sigmoid()
        first = values if state is None else state["first"]
        return {"x": x + values * first, "state": {"first": first, "last": values}}


class ValueResidual(Net):
    """A dictionary of states goes on: one that the first block makes, and one that each makes anew."""

    block = Values

    def through(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for block in self.blocks:
            out = block(x, state)
            x, state = out["x"], out["state"]
        return x + state["last"]


class TakesSkip(Block):
    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> Any:
        return super().forward(x if skip is None else x * 0.5 + skip)


class UNet(Net):
    block = TakesSkip

    def through(self, x: torch.Tensor) -> torch.Tensor:
        skips = [x]
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
        for block in self.blocks[2:]:
            x = block(x, skip=skips.pop(0))
        return x


class GivesLoss(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.up.weight.square().mean() * x.square().mean()


class AuxiliaryLoss(Net):
    block = GivesLoss

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x, more = self.into(batch), []
        for block in self.blocks:
            x, loss = block(x)
            more.append(loss)
        return self.out(x).square().mean() + sum(more)


class DeepSupervision(Net):
    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x, collected = self.into(batch), []
        for block in self.blocks:
            x = block(x)
            collected.append(x)
        return torch.stack([self.out(x).square().mean() for x in collected]).mean()


class TakesCondition(Block):
    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> Any:
        return super().forward(x) * condition


class Conditioned(Net):
    """A learned condition, computed before the blocks, that all of them get."""

    block = TakesCondition

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(4, WIDTH)
        self._modules = {name: self._modules[name] for name in ("condition", *dict.fromkeys(self._modules))}

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x, condition = self.into(batch), self.condition(batch).sigmoid()
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x).square().mean()


def pipelined(kind: type[Net], pipeline: dict[str, Any], trainer: dict[str, Any] | None = None, **strategy_arguments: Any) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env: Any = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    size = dist.get_world_size()
    given_pipeline = PipelineParallel(**{"size": size, "microbatches": 4, **pipeline})
    strategy = OverlapStrategy(pipeline_parallel=given_pipeline, **strategy_arguments, **env)
    given: Any = {"max_epochs": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 1, **(trainer or {})}
    run = Trainer(**QUIET, accelerator="cpu", devices=size, strategy=strategy, **given)
    module = kind()
    try:
        run.fit(module, kind.data(), kind.data())
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return weights, {key: float(value) for key, value in run.callback_metrics.items()}


def by_hand(kind: type[Net], microbatches: int = 4) -> tuple[dict[str, torch.Tensor], float, float]:
    """One process that goes through the same microbatches; its weights, last loss, and mean validation loss."""
    seed_everything(1, verbose=False)
    module = kind()
    optimizer: Any = module.configure_optimizers()
    for batch in kind.data():
        optimizer.zero_grad()
        parts = [batch] if microbatches == 1 else batch.tensor_split(microbatches)
        loss = torch.stack([module.loss(part) * (len(part) / len(batch)) for part in parts]).sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        validation = [float(module.loss(batch)) for batch in kind.data()]
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return weights, loss.item(), sum(validation) / len(validation)


KINDS = [SharedBias, Checkpointed, ValueResidual, UNet, AuxiliaryLoss, DeepSupervision, Conditioned]
LAYOUTS = [(2, {}), (2, {"schedule": "zb_v", "virtual_stages": 2}), (4, {"schedule": "zb_h1"})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_what_goes_from_block_to_block_goes_from_stage_to_stage(world, kind, ranks, pipeline):
    weights, loss, validation = by_hand(kind)
    for found, metrics in world(ranks).run(pipelined, kind, pipeline):
        for name, expected in weights.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["val_loss"] == pytest.approx(validation, rel=1e-5)


@pytest.mark.parametrize(
    "pipeline", [{"overlap_p2p": False}, {"evaluation": "last_stage"}, {"layout": "E|t*4L"}, {"layout": "Et*4|L"}]
)
def test_however_it_is_sent(world, pipeline):
    weights, _, validation = by_hand(AuxiliaryLoss)
    for found, metrics in world(2).run(pipelined, AuxiliaryLoss, pipeline):
        for name, expected in weights.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        assert metrics["val_loss"] == pytest.approx(validation, rel=1e-5)
