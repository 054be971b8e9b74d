"""Pieces of tensors, and files that try to run code."""

import math
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from lightning_overlap.checkpoint import AtomicCheckpointIO, Directory, save_directory
from lightning_overlap.decision import ConfigError
from lightning_overlap.piece import Piece, boxes

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@given(SHAPES, st.data())
def test_boxes_tile_a_run_in_its_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    found = boxes(shape, start, end)
    read = [whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten() for offsets, sizes in found]
    assert torch.cat([torch.arange(0), *read]).tolist() == list(range(start, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def tensors():
    flat = torch.arange(24.0)
    return {"model": {"a.b": flat.view(4, 6), "n": 3}, "optimizer_0": {"state": {"a.b": {"m": Piece(flat, torch.Size([4, 6]), 0)}}}}


def test_a_directory_gives_back_what_was_saved_to_pieces_of_any_cut(tmp_path):
    save_directory(tensors(), {"epoch": 2}, tmp_path / "x.ckpt", None)
    directory = Directory(tmp_path / "x.ckpt")
    assert directory.meta == {"epoch": 2}
    assert directory.plain == {"model.n": 3}
    assert directory.below("model").keys() == {"a.b", "n"}
    pieces = [Piece(torch.zeros(11), torch.Size([4, 6]), 0), Piece(torch.zeros(13), torch.Size([4, 6]), 11)]
    for piece in pieces:
        directory.load({"optimizer_0.state.a.b.m": piece})
    assert torch.cat([piece.flat for piece in pieces]).equal(torch.arange(24.0))
    with pytest.raises(ConfigError, match=r"model.a.b \(3, 6\) \(\(4, 6\)\)"):
        directory.load({"model.a.b": torch.zeros(3, 6)})


@pytest.mark.parametrize("when", ["first", "again"])
def test_a_crash_in_mid_write_leaves_the_last_good_one(tmp_path, monkeypatch, when):
    path = tmp_path / "x.ckpt"
    if when == "again":
        save_directory(tensors(), {"epoch": 1}, path, None)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_overlap.checkpoint.FileSystemWriter.finish", fails)
        with pytest.raises(CheckpointException, match="disk full"):
            save_directory(tensors(), {"epoch": 2}, path, None)
    assert path.exists() == (when == "again")
    if when == "again":
        assert Directory(path).meta == {"epoch": 1}
    save_directory(tensors(), {"epoch": 3}, path, None)
    assert Directory(path).meta == {"epoch": 3}
    assert os.listdir(tmp_path) == ["x.ckpt"], "nothing is left over"


def fails(*_):
    raise OSError("disk full")


def test_a_crash_in_mid_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr("lightning_overlap.checkpoint.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"epoch": 1}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/ran",)


def test_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "x": RunsCode()}, tmp_path / "file.ckpt")
    with pytest.raises(ConfigError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "file.ckpt")
    save_directory(tensors(), {}, tmp_path / "x.ckpt", None)
    (tmp_path / "x.ckpt" / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(ConfigError, match=r"posix\.system, which no checkpoint needs"):
        Directory(tmp_path / "x.ckpt")


def test_an_unfinished_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no complete checkpoint directory: .metadata or meta.pt is missing"):
        Directory(tmp_path)
