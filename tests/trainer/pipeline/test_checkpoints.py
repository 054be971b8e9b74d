"""Checkpoints of a pipeline load into any layout, and hold what every stage has."""

import warnings

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_overlap import OverlapStrategy, PipelineParallel
from tests.helpers.pipelined import QUIET, Net, loader, pipelined, single


def saved_by_all(pipeline, model, trainer, folder):
    return pipelined(pipeline, model, "auto", None, **trainer, save=f"{folder}/x.ckpt")


def resumed(pipeline, model, trainer, path):
    return pipelined(pipeline, model, "auto", path, **trainer)


LAYOUTS = [
    (2, {"size": 2, "virtual_stages": 2, "microbatches": 4}),
    (4, {"size": 4, "microbatches": 4}),
    (4, {"size": 2, "microbatches": 4}),
]


@pytest.mark.parametrize("saved", range(len(LAYOUTS)))
def test_checkpoints_load_into_any_layout(world, tmp_path, saved):
    """Optimizer and schedule included. Plain Lightning reads each file, so they are alike, and each layout reads one of another."""
    (ranks, pipeline), (other, layout) = LAYOUTS[saved], LAYOUTS[saved - 1]
    model = {"tied": True, "optimizer": "sgd"}
    half, whole = {"max_epochs": 1}, {"max_epochs": 2}
    world(ranks).run(saved_by_all, pipeline, model, half, str(tmp_path))
    path = f"{tmp_path}/x.ckpt"
    expected = single(model, **whole)
    file = torch.load(path, weights_only=True)
    assert list(file["state_dict"]) == list(Net(**model).state_dict())
    assert len(file["optimizer_states"][0]["state"]) == len(list(Net(**model).parameters()))
    torch.testing.assert_close(single(model, path, **whole)["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    for rank in world(other).run(resumed, layout, model, whole, path):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


def saved_in_shards(pipeline, model, folder, asynchronous):
    """A folder that is written in the middle of a fit, which goes on."""
    strategy = {"state_dict_type": "sharded", "async_save": asynchronous}
    saving = ModelCheckpoint(folder, "first", save_on_train_epoch_end=True, save_top_k=-1)
    trainer = {"enable_checkpointing": True, "callbacks": [saving], "limit_train_batches": 3}
    return pipelined(pipeline, model, "auto", None, **trainer, strategy_kwargs=strategy)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("saved", range(len(LAYOUTS)))
def test_sharded_checkpoints_load_into_any_layout(world, tmp_path, saved, asynchronous):
    ranks, pipeline = LAYOUTS[saved]
    model = {"tied": True, "optimizer": "sgd"}
    expected = single(model, max_epochs=2)
    for rank in world(ranks).run(saved_in_shards, pipeline, model, str(tmp_path), asynchronous):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    folder = tmp_path / "first.ckpt"
    written = [sum(file.stat().st_size for file in folder.glob(f"__{rank}_*.distcp")) for rank in range(ranks)]
    assert max(written) < 1.5 * min(written)
    # Into each other layout: into the next one if it was written in the background, else into the one after it, and one stage.
    for other, layout in [LAYOUTS[saved - 2]] if asynchronous else [LAYOUTS[saved - 1], (2, {"size": 1})]:
        for rank in world(other).run(resumed, layout, model, {"max_epochs": 2}, str(folder)):
            torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


def test_a_folder_of_plain_data_parallelism_loads_into_a_pipeline(world, tmp_path):
    model = {"tied": True}
    world(2).run(saved_in_shards, {"size": 1}, model, str(tmp_path), False)
    expected = world(2).run(resumed, {"size": 1}, model, {"max_epochs": 2}, str(tmp_path / "first.ckpt"))
    for rank in world(4).run(resumed, LAYOUTS[1][1], model, {"max_epochs": 2}, str(tmp_path / "first.ckpt")):
        torch.testing.assert_close(rank["weights"], expected[0]["weights"], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    pipeline, model = LAYOUTS[0][1], {"dropout": 0.2}
    world(2).run(saved_by_all, pipeline, model, {"max_epochs": 1}, str(tmp_path))
    whole = world(2).run(resumed, pipeline, model, {"max_epochs": 2}, None)
    again = world(2).run(resumed, pipeline, model, {"max_epochs": 2}, f"{tmp_path}/x.ckpt")
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one["weights"], other["weights"])


class Odd(Net):
    """A head with two names, a buffer beside the blocks that the loss is written to, and no ``batch_idx``."""

    def __init__(self) -> None:
        super().__init__(blocks=4, optimizer="sgd")
        self.again = self.head
        self.register_buffer("mean_loss", torch.zeros(()))
        self.drawn: list[float] = []

    def training_step(self, batch):  # type: ignore[override]
        self.drawn.append(float(torch.rand(())))
        loss = self.loss(batch)
        self.mean_loss.lerp_(loss.detach(), 0.1)
        return {"loss": loss, "twice": 2 * loss.detach()}

    def on_train_epoch_end(self) -> None: ...

    def validation_step(self, batch) -> None:  # type: ignore[override]
        self.log("val_mean_loss", self.mean_loss)


def kept_in_a_checkpoint(folder, pipeline):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Odd()
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if pipeline is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = pipeline["size"], OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    saving = ModelCheckpoint(folder, "mine" if pipeline else "plain", monitor="val_mean_loss")
    given = {"max_epochs": 2, "limit_train_batches": 2, "use_distributed_sampler": False}
    run = Trainer(
        **{**QUIET, "enable_checkpointing": True}, **given, accelerator="cpu", devices=devices, strategy=strategy, callbacks=[saving]
    )
    run.fit(module, loader(8), loader(8))
    return float(saving.best_model_score), module.drawn


def test_checkpoints_have_what_the_last_stage_wrote_by_all_its_names(world, tmp_path):
    expected, _ = kept_in_a_checkpoint(tmp_path, None)
    for score, drawn in world(2).run(kept_in_a_checkpoint, tmp_path, {"size": 2, "microbatches": 1}):
        assert score == pytest.approx(expected, rel=1e-5)
        assert len(set(drawn)) == len(drawn) == 4, "each batch draws its own random numbers"
    mine, plain = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("mine", "plain"))
    assert list(mine) == list(plain)
    for name in mine:
        torch.testing.assert_close(mine[name], plain[name], rtol=1e-5, atol=1e-6)
