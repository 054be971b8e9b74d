"""Checkpoint files: names, checksums, removal, and actions that follow a save."""

import os
import re
from contextlib import suppress
from unittest import mock

import pytest
import torch

from lightning_overlap import CheckpointError
from lightning_overlap.state.checkpoint import AtomicCheckpointIO, Saves, aside, beside, load_file, remove, what_is_broken
from tests.helpers.checkpoints import flip


def test_what_follows_a_failed_save_does_not_happen():
    saves, happened = Saves(), []

    def fail():
        raise OSError

    saves._submit(fail)
    saves.then(lambda: happened.append(1))
    saves.then(lambda: happened.append(2))
    assert isinstance(saves._finish(), OSError)
    saves.then(lambda: happened.append(3))
    assert happened == [3]


@pytest.mark.parametrize(
    "name", ["last.ckpt", "last-v1.ckpt", 245 * "a" + ".ckpt", 125 * "\u00e4" + ".ckpt", 255 * "b", "a." + 250 * "c"]
)
def test_names_beside_fit_where_the_name_does(tmp_path, name):
    path = tmp_path / name
    hidden, replaced = beside(path), aside(path)
    assert len({path, hidden, replaced}) == 3
    assert all(len(os.fsencode(each.name)) <= max(143, len(os.fsencode(name))) for each in (hidden, replaced))
    assert hidden.name.startswith("."), "it is not complete"
    io = AtomicCheckpointIO()
    for value in (1, 2):
        io.save_checkpoint({"value": value}, path)
    assert load_file(io, path, weights_only=True) == {"value": 2}
    assert os.listdir(tmp_path) == [name]


def test_long_names_that_begin_alike_have_names_of_their_own_beside(tmp_path):
    first, second = (tmp_path / f"{200 * 'a'}{end}.ckpt" for end in "xy")
    assert len({beside(first), beside(second), aside(first), aside(second)}) == 4


def test_a_link_beside_is_not_followed(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "last.ckpt"
    target.write_text("whole")
    beside(path).symlink_to(target)
    AtomicCheckpointIO().save_checkpoint({"value": 1}, path)
    assert target.read_text() == "whole"
    assert not path.is_symlink()


def test_a_crash_while_a_folder_is_removed_leaves_no_half_of_it(tmp_path):
    path = tmp_path / "last.ckpt"
    for _ in range(2):  # the second finds what the first has left
        path.mkdir()
        (path / "meta.pt").write_text("")
        with mock.patch("shutil.rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            remove(path)
        remove(path) if path.exists() else None
        assert all(name.startswith(".") for name in os.listdir(tmp_path))


def test_a_changed_byte_of_a_file_is_told(tmp_path):
    path, io = tmp_path / "a.ckpt", AtomicCheckpointIO()
    saved = {"state_dict": {"w": torch.arange(200.0)}, "epoch": 3}
    io.save_checkpoint(saved, path)
    whole = path.read_bytes()
    assert what_is_broken(path) is None
    passed = []
    for place in range(0, len(whole), 17):
        path.write_bytes(whole)
        flip(path, place)
        if what_is_broken(path) is None:
            passed.append(place)
            with suppress(CheckpointError):  # that it is no archive any more, say
                read = load_file(io, path, weights_only=True)
                assert torch.equal(read["state_dict"]["w"], saved["state_dict"]["w"]), "changed where nothing is read"
                assert read["epoch"] == 3
    numbers = whole.index(saved["state_dict"]["w"].numpy().tobytes())
    assert not [place for place in passed if numbers <= place < numbers + 800]


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, left):
    path, io = tmp_path / "a.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"w": torch.arange(200.0)}, path)
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    for weights_only in (True, False):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_file(io, path, weights_only=weights_only)
