"""Damaged, incomplete, foreign and malicious checkpoints are refused on every rank."""

import os
import pickle
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_overlap import CheckpointError
from tests.helpers.checkpoints import SHARDED, Plain, failing, flip, run


class Trusted:
    """An object of the user's in a checkpoint."""


class KeepsAnObject(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = Trusted()


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_objects_are_refused_unless_trusted(world, tmp_path, kind):
    path = tmp_path / "half.ckpt"
    world(2).run(run, KeepsAnObject, {"strategy_kwargs": {"state_dict_type": kind}, "max_epochs": 1}, path)
    for message in world(2).run(failing, {"resume": str(path)}):
        assert "test_checkpoint_safety.Trusted" in message
        assert "weights_only=False" in message
    assert world(2).run(trusting, str(path))[0] == 6


def trusting(path):
    fit = Trainer.fit
    with mock.patch.object(Trainer, "fit", lambda *args, **kwargs: fit(*args, weights_only=False, **kwargs)):
        return run(Plain, {"resume": path})["step"]


def test_code_is_not_run(world, tmp_path):
    torch.save({"state_dict": {}, "loops": Executes()}, tmp_path / "file.ckpt")
    path = tmp_path / "folder.ckpt"
    world(1).run(run, Plain, {"strategy_kwargs": SHARDED, "max_epochs": 1}, path)
    said = [world(1).run(failing, {"resume": str(tmp_path / "file.ckpt")}, tmp_path)[0]]
    index = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(Executes()))
    said += world(1).run(failing, {"resume": str(path)}, tmp_path)
    (path / ".metadata").write_bytes(index)
    torch.save({"loops": Executes()}, path / "meta.pt")
    said += world(1).run(failing, {"resume": str(path)}, tmp_path)
    assert all("system" in message for message in said), said
    assert not list(tmp_path.rglob("executed"))


def test_incomplete_folders_and_other_models_are_told(world, tmp_path):
    path = tmp_path / "half.ckpt"
    world(1).run(run, Plain, {"strategy_kwargs": SHARDED, "max_epochs": 1}, path)
    assert "in another group are: down.weight" in world(1).run(other_groups, path)[0]
    (path / "__0_0.distcp").unlink()
    assert "FileNotFoundError" in world(1).run(failing, {"resume": str(path)})[0]
    (path / ".metadata").unlink()
    assert "not a complete checkpoint: it has no .metadata" in world(1).run(failing, {"resume": str(path)})[0]


class WithoutDown(Plain):
    def configure_optimizers(self):
        (made,), _ = super().configure_optimizers()
        made.param_groups[0]["params"] = [p for p in made.param_groups[0]["params"] if p is not self.down.weight]
        return made


def other_groups(path):
    with pytest.raises(CheckpointError) as caught:
        run(WithoutDown, {"resume": str(path)})
    return str(caught.value)


def test_damage_is_told_on_every_rank(world, tmp_path):
    path, folder = tmp_path / "file.ckpt", tmp_path / "folder.ckpt"
    world(2).run(run, Plain, {"max_epochs": 1}, path)
    world(2).run(run, Plain, {"strategy_kwargs": SHARDED, "max_epochs": 1}, folder)
    words = {
        ".metadata": b"model.norm",
        "meta.pt": b"param_groups",
        "__0_0.distcp": b"rebuild_tensor",
        "__1_0.distcp": b"rebuild_tensor",
    }
    for file, word in ((path, b"param_groups"), *((folder / name, word) for name, word in words.items())):
        whole = file.read_bytes()
        flip(file, whole.index(word))
        told = world(2).run(failing, {"resume": str(path if file == path else folder)})
        assert told[0] == told[1]
        assert f"{file} is damaged" in told[0]
        file.write_bytes(whole)
    assert world(2).run(run, Plain, {"resume": str(folder)})[0]["step"] == 6


def without_checksums(path):
    torch.serialization.set_crc32_options(False)
    try:
        run(Plain, {"max_epochs": 1}, path)
    finally:
        torch.serialization.set_crc32_options(True)


def test_checkpoints_without_checksums_load(world, tmp_path):
    path, folder = tmp_path / "file.ckpt", tmp_path / "folder.ckpt"
    world(1).run(without_checksums, path)
    world(1).run(run, Plain, {"strategy_kwargs": SHARDED, "max_epochs": 1}, folder)
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index[: index.rindex(b"crc32:")])
    for each in (path, folder):
        assert world(1).run(run, Plain, {"resume": str(each)})[0]["step"] == 6
