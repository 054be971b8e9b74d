"""A sharded checkpoint becomes one file, without ranks."""

import json
import logging
import os
import sys
import warnings
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lightning_overlap import CheckpointError
from lightning_overlap.cli import main
from lightning_overlap.decision import ConfigError
from lightning_overlap.state.consolidate import consolidate
from tests.helpers.checkpoints import SHARDED, Plain, run


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Of two ranks, after one epoch of AdamW."""
    path = tmp_path_factory.mktemp("saved") / "half.ckpt"
    world(2).run(run, Plain, {"strategy_kwargs": SHARDED}, path)
    return path


def test_it_is_the_checkpoint_that_a_full_save_writes(world, folder, tmp_path, monkeypatch):
    whole, file = tmp_path / "whole.ckpt", tmp_path / "one.ckpt"
    world(2).run(run, Plain, {}, whole)
    monkeypatch.setattr(sys, "argv", ["lightning-overlap", "consolidate", str(folder), str(file)])
    main()
    ours, theirs = (torch.load(path, weights_only=True) for path in (file, whole))
    assert {path.name for path in tmp_path.iterdir()} == {"whole.ckpt", "one.ckpt"}
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(dict(ours["state_dict"]), dict(theirs["state_dict"]), rtol=0, atol=0)
    assert ours["optimizer_states"][0]["state"].keys() == theirs["optimizer_states"][0]["state"].keys()
    torch.testing.assert_close(ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"], rtol=0, atol=0)
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    assert file.stat().st_size < 1.1 * whole.stat().st_size  # each tensor is written by itself
    # A fit resumes from it.
    resumed = world(2).run(run, Plain, {"resume": str(file)})
    assert {r["hash"] for r in resumed} == {r["hash"] for r in world(2).run(run, Plain, {"resume": str(whole)})}


def test_weights_for_hugging_face(folder, tmp_path):
    consolidate(folder, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == Plain().state_dict().keys()
    beginning = next(name for name in weights if "." in name).partition(".")[0] + "."
    consolidate(folder, tmp_path / "part", prefix=beginning)
    part = load_file(tmp_path / "part" / "model.safetensors")
    assert {f"{beginning}{name}" for name in part} == {name for name in weights if name.startswith(beginning)}
    for name, value in part.items():
        assert value.equal(weights[f"{beginning}{name}"])


@pytest.mark.parametrize("name", ["one.ckpt", "model.safetensors", "weights"])
def test_it_says_what_it_wrote_and_others_may_read_it(folder, tmp_path, name):
    messages = []
    handler = mock.Mock(level=logging.INFO, handle=lambda record: messages.append(record.getMessage()))
    before = os.umask(0o022)
    try:
        with mock.patch.object(logging.getLogger("lightning_overlap"), "handlers", [handler]), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch warns that it loads without ranks
            consolidate(folder, tmp_path / name)
    finally:
        os.umask(before)
    written = tmp_path / name
    files = list(written.iterdir()) if written.is_dir() else [written]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    assert [path.name for path in tmp_path.iterdir()] == [name]
    step = torch.load(folder / "meta.pt", weights_only=True)["global_step"]
    size = sum(file.stat().st_size for file in files) / 1e6
    assert messages[0].startswith(f"wrote {written}: ")
    assert messages[0].endswith(f" tensors, {size:.1f} MB, of step {step}")
    if name == "one.ckpt":
        assert int(messages[0].split()[2]) > len(Plain().state_dict())  # the optimizer's are counted
    else:
        assert int(messages[0].split()[2]) == len(Plain().state_dict())
    told = f"from_pretrained also needs {written}/config.json: module.config.save_pretrained('{written}') writes it"
    assert messages[1:] == ([told] if written.is_dir() else [])


@pytest.mark.parametrize("name", ["model.safetensors", "weights"])
def test_a_write_that_fails_leaves_what_was_there(folder, tmp_path, name):
    if name.endswith(".safetensors"):
        (tmp_path / name).write_text("before")
    with mock.patch("os.fsync", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        consolidate(folder, tmp_path / name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({name: "before"} if "." in name else {})


def test_what_cannot_be_is_told(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match=r"begins with 'modell\.'; names begin with"):
        consolidate(folder, tmp_path / "model.safetensors", prefix="modell.")
    with pytest.raises(ConfigError, match=r"prefix='model\.' is for weights only: write .*one\.safetensors"):
        consolidate(folder, tmp_path / "one.ckpt", prefix="model.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"full is a folder that is not empty, and would be replaced"):
        consolidate(folder, tmp_path / "full")
    (tmp_path / "file.json").write_text(json.dumps({}))
    monkeypatch.setattr(sys, "argv", ["lightning-overlap", "consolidate", str(tmp_path / "file.json"), str(tmp_path / "one.ckpt")])
    with pytest.raises(SystemExit, match="is not a sharded checkpoint: it is no folder"):
        main()
    with pytest.raises(CheckpointError, match=r"nothing is not a sharded checkpoint: it does not exist"):
        consolidate(tmp_path / "nothing", tmp_path / "one.ckpt")
    torch.save({}, tmp_path / "whole.ckpt")
    with pytest.raises(CheckpointError, match=r"whole\.ckpt is not a sharded checkpoint: it is one file already"):
        consolidate(tmp_path / "whole.ckpt", tmp_path / "one.ckpt")
