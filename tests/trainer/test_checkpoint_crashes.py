"""A crash, a full disk or a killed rank leaves the last complete checkpoint, and names that Lightning finds."""

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_overlap.state.dcp as dcp
from lightning_overlap import CheckpointError
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.state.checkpoint import aside, beside
from tests.helpers.checkpoints import LENGTH, SHARDED, Plain, Save, run
from tests.helpers.training import train
from tests.helpers.world import World


def crash(folder, background, kind):
    """Two saves to the same place; the last rank that writes fails in the second."""
    last = dist.get_world_size() - 1 if kind == "sharded" else 0
    path, saved = folder / "last.ckpt", []

    class Twice(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (2, 4):
                trainer.strategy.checkpoints.wait()
                where = "lightning_overlap.state.dcp.FolderWriter.write_data" if kind == "sharded" else "os.fsync"
                breaks = trainer.global_step == 4 and dist.get_rank() == last
                with mock.patch(where, side_effect=OSError("disk full")) if breaks else mock.patch("os.sync"):
                    trainer.save_checkpoint(path)
                    if background:
                        trainer.strategy.checkpoints.wait()
                saved.append(trainer.global_step)

    with pytest.raises(CheckpointError) as caught:
        train(module=Plain, callbacks=[Twice()], strategy_kwargs={"state_dict_type": kind, "async_save": background}, **LENGTH)
    return saved, str(caught.value)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_crash_leaves_the_last_good_one(world, tmp_path, kind, background):
    told = world(2).run(crash, tmp_path, background, kind)
    assert told[0] == told[1], "the same error on every rank"
    assert told[0][0] == [2]
    assert "disk full" in told[0][1]
    path = tmp_path / "last.ckpt"
    if kind == "full":
        assert not beside(path).exists(), "a write that fails takes its file along"
        beside(path).write_bytes(b"half")  # what a killed process leaves
    assert beside(path).exists(), "what the crash left"
    resumed = world(2).run(run, Plain, {"resume": str(path), "strategy_kwargs": {"state_dict_type": kind}}, path)
    assert resumed[0]["step"] == 6
    # The folder's name was free for a moment, and that is where it crashed.
    os.rename(path, aside(path))
    assert world(2).run(run, Plain, {"resume": str(path)})[0]["step"] == 6
    world(2).run(run, Plain, {"strategy_kwargs": {"state_dict_type": kind}}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"], "the next save cleans up"


class StopsInTime(Plain):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("falling", -float(self.global_step))
        return loss


def managed(folder, kwargs, **length):
    """What a user has: a ModelCheckpoint that keeps the best and the last, and removes others."""
    saving = ModelCheckpoint(folder, "{step}", monitor="falling", save_top_k=1, save_last=True, every_n_train_steps=1)
    stopping = EarlyStopping("falling", patience=50, check_on_train_epoch_end=True)
    kwargs = {"enable_checkpointing": True, "callbacks": [saving, stopping], "strategy_kwargs": kwargs}
    train(module=StopsInTime, **kwargs, **{**LENGTH, **length})
    fitted = train(module=StopsInTime, resume=saving.best_model_path, **LENGTH)
    return Path(saving.best_model_path).name, fitted["step"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_model_checkpoint_keeps_one(world, tmp_path, kind, background):
    best, step = world(2).run(managed, tmp_path, {"state_dict_type": kind, "async_save": background})[0]
    assert step == 6
    assert sorted(os.listdir(tmp_path)) == sorted([best, "last.ckpt"])
    assert all((tmp_path / name).is_dir() == (kind == "sharded") for name in (best, "last.ckpt"))


def full_disk(folder, kind):
    """In the background, the third checkpoint and later ones cannot be moved into place, and nobody asks."""
    replace = os.replace

    def full(source, target):
        if "step=3" in str(target):
            raise OSError("disk full")
        replace(source, target)

    with mock.patch("os.replace", full), pytest.raises(CheckpointError) as caught:
        managed(folder, {"state_dict_type": kind, "async_save": True}, limit_train_batches=3, max_epochs=1)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_what_fails_in_the_background_is_told_and_removes_nothing(world, tmp_path, kind):
    told = world(2).run(full_disk, tmp_path, kind)
    assert "disk full" in told[0] == told[1]
    assert (tmp_path / "step=2.ckpt").exists(), "not removed, since the one that was to replace it is not there"
    assert world(2).run(run, Plain, {"resume": str(tmp_path / "step=2.ckpt")})[0]["step"] == 6


def saved_last(folder, kwargs, resume, epochs, link=False):
    saving = ModelCheckpoint(folder, "{step}", save_last="link" if link else True, every_n_train_steps=1)
    length = {**LENGTH, "max_epochs": epochs}
    return train(module=Plain, enable_checkpointing=True, callbacks=[saving], strategy_kwargs=kwargs, resume=resume, **length)["step"]


def test_last_is_found_after_a_crash_between_two_renames(world, tmp_path):
    world(2).run(saved_last, tmp_path, SHARDED, None, 1)
    last = tmp_path / "last.ckpt"
    os.rename(last, aside(last))
    beside(last).mkdir()  # what was to take its place
    step = torch.load(aside(last) / "meta.pt", weights_only=True)["global_step"]
    assert world(2).run(resumed_from, tmp_path) == [step, step]
    assert last.is_dir(), "the next save has taken its place"
    assert not beside(last).exists()
    assert not aside(last).exists()


class FirstStep(Callback):
    first = None

    def on_train_start(self, trainer, *_):
        self.first = trainer.global_step


def resumed_from(folder):
    saving, start = ModelCheckpoint(folder, "{step}", save_last=True, every_n_train_steps=1), FirstStep()
    train(module=Plain, enable_checkpointing=True, callbacks=[saving, start], strategy_kwargs=SHARDED, resume="last", **LENGTH)
    return start.first


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_link_to_what_is_written_in_the_background(world, tmp_path, kind):
    kwargs = {"state_dict_type": kind, "async_save": True}
    folder = tmp_path / "new"
    assert world(2).run(saved_last, folder, kwargs, None, 2, True) == [6, 6]
    assert (folder / "last.ckpt").is_symlink()
    assert world(2).run(run, Plain, {"resume": str(folder / "last.ckpt")})[0]["step"] == 6


def killed_while_saving(folder):
    def write(self, plan, planner):
        os.kill(os.getpid(), signal.SIGKILL)

    killed = mock.patch.object(dcp.FolderWriter, "write_data", write) if dist.get_rank() else mock.patch("os.sync")
    with killed, pytest.raises((CheckpointError, TransferError, RuntimeError)) as caught:
        train(module=Plain, strategy_kwargs=SHARDED, callbacks=[Save(folder / "a.ckpt")], **LENGTH)
    return str(caught.value)


def test_a_rank_that_is_killed_while_it_saves(tmp_path):
    own = World(2)
    assert own.first(killed_while_saving, tmp_path)
    own.close()
    assert not (tmp_path / "a.ckpt").exists()
