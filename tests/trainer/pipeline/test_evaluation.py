"""Validation, replicated and mirrored, and what watches it."""

import copy
import os
import pickle
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.strategy.evaluation import explaining, failing_together
from tests.helpers.pipelined import QUIET, Net, loader, told


class Watched(Net):
    """Collects what its validation gives, and tells it at the end; and looks at gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[torch.Tensor] = []
        self.norms: list[dict[str, float]] = []

    def validation_step(self, batch, index):
        self.collected.append(self.loss(batch).detach())

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.collected).mean())
        self.collected.clear()

    def on_before_optimizer_step(self, optimizer):
        self.norms.append({name: float(p.grad.norm()) for name, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def watched(pipeline: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if pipeline is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = dist.get_world_size(), OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=2, min_delta=0.2)
    length = {"max_epochs": 9, "limit_train_batches": 3, "limit_val_batches": 2, "use_distributed_sampler": False}
    given = {**QUIET, "enable_checkpointing": True, "callbacks": [saving, stopping], **length}
    module = Watched()
    run = Trainer(**given, accelerator="cpu", devices=devices, strategy=strategy)
    run.fit(module, loader(8), loader(8))
    best = os.path.basename(saving.best_model_path), float(saving.best_model_score)
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    return {**told(run, module), "norms": module.norms, "best": best, "rates": rates, "stopped": stopping.stopped_epoch}


def test_what_watches_a_validation_sees_what_it_does_without_a_pipeline(world, tmp_path):
    """EarlyStopping, ModelCheckpoint, ReduceLROnPlateau, by outputs that each rank has collected; and a hook that reads gradients."""
    expected = watched(None, str(tmp_path / "plain"))
    assert 0 < expected["stopped"] < 8
    assert expected["rates"][0] < 0.1
    ranks = world(2).run(watched, {"size": 2, "virtual_stages": 2, "microbatches": 4}, str(tmp_path / "piped"))
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        assert rank["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)
        assert rank["best"] == (expected["best"][0], pytest.approx(expected["best"][1], rel=1e-5))
        assert (rank["rates"], rank["stopped"], rank["step"]) == (expected["rates"], expected["stopped"], expected["step"])
    for step, norms in enumerate(expected["norms"]):
        here = [rank["norms"][step] for rank in ranks]
        assert not here[0].keys() & here[1].keys()
        assert here[0] | here[1] == pytest.approx(norms, rel=1e-4, abs=1e-6)


class OneForward(Net):
    """A validation that calls the model once, logs, has a metric's batch value, and returns numbers."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**model)
        self.returned: list[float] = []
        self.held: list[int] = []

    def validation_step(self, batch, index):
        loss = self.loss(batch)
        self.held.append(sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.parameters()}.values()))
        self.log("val_loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.val_seen(loss)
        self.log("val_seen", self.val_seen)
        return {"twice": 2 * loss}

    def on_validation_batch_end(self, outputs, batch, index):
        self.returned.append(float(outputs["twice"]))

    def on_validation_epoch_end(self):
        self.log("val_again", self.val_seen.compute())


class Collects(OneForward):
    def validation_step(self, batch, index):
        self.returned.append(self.loss(batch).detach())

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.returned).mean())

    on_validation_batch_end = LightningModule.on_validation_batch_end


class TwiceInValidation(OneForward):
    def validation_step(self, batch, index):
        return {"twice": self.loss(batch) + self.loss(batch)}


def validated(kind, pipeline):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    module = kind()
    given = {"devices": dist.get_world_size(), "strategy": strategy, "use_distributed_sampler": False}
    run = Trainer(**QUIET, accelerator="cpu", max_epochs=2, limit_train_batches=2, limit_val_batches=2, **given)
    try:
        run.fit(module, loader(8), loader(8))
    except (ConfigError, TransferError) as error:
        return {"said": f"{type(error).__name__}: {error}"}
    weights = sum(p.nbytes for p in module.parameters())
    return {**told(run, module), "returned": module.returned, "held": max(module.held, default=0) / weights}


@pytest.mark.parametrize(
    ("ranks", "pipeline"),
    [
        (2, {"size": 2, "virtual_stages": 2}),
        (4, {"size": 4, "schedule": "zb_v", "virtual_stages": 2}),
        (4, {"size": 2}),
        (2, {"size": 2, "layout": "E|t*12L"}),
        (2, {"size": 2, "layout": "Et*12|L"}),
    ],
)
def test_mirrored_and_replicated_validation_tell_the_same(world, ranks, pipeline):
    pipeline = {"microbatches": 2, **pipeline}
    replicated = world(ranks).run(validated, OneForward, pipeline)
    mirrored = world(ranks).run(validated, OneForward, {**pipeline, "evaluation": "last_stage"})
    for one, other in zip(replicated, mirrored, strict=True):
        assert {"val_loss", "val_seen", "val_again"} <= one["metrics"].keys()
        assert one["metrics"] == other["metrics"]
        assert one["returned"] == other["returned"]
        assert torch.equal(one["weights"], other["weights"])
    assert len(mirrored[0]["returned"]) == 4 + 2  # and the sanity check


def test_mirrored_validation_holds_its_own_weights_only(world):
    for rank in world(4).run(validated, OneForward, {"size": 4, "microbatches": 2, "evaluation": "last_stage"}):
        assert rank["held"] < 1 / 4 * 1.2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [Collects, TwiceInValidation])
def test_what_mirrored_validation_cannot_do_names_the_other_way(world, kind, size):
    said = [rank["said"] for rank in world(size).run(validated, kind, {"size": size, "microbatches": 2, "evaluation": "last_stage"})]
    assert said == [said[0]] * size
    assert said[0].startswith("ConfigError")
    assert "evaluation='replicate'" in said[0]


def test_a_module_is_copied_while_its_hooks_are_replaced():
    module = Collects()
    with failing_together(module, mock.Mock()), explaining(module, mock.Mock()):
        twin = copy.deepcopy(module)
        assert pickle.loads(pickle.dumps(module)).on_validation_epoch_end.__func__ is Collects.on_validation_epoch_end
    assert twin.on_validation_epoch_end.__self__ is twin
