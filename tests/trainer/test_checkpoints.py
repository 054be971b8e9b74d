"""Checkpoints through Trainer: resumed training is uninterrupted training, and a crash leaves the last good one."""

import io
import os
import pickle
import re
import signal
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.distributed.checkpoint.filesystem import _StorageInfo

import lightning_overlap.state.dcp as dcp
from lightning_overlap import CheckpointError
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.state.checkpoint import AtomicCheckpointIO, Saves, aside, beside, load_file, remove, what_is_broken
from tests.helpers.training import Net, strategy, train
from tests.helpers.world import World

SHARDED = {"state_dict_type": "sharded"}
LENGTH = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3, "limit_val_batches": 0}


class Plain(Net):
    """All parameters are used in each step, so that DDP has the same to do; one has no dimensions, one a dimension of one."""

    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer)
        del self.unused, self.sometimes
        self.sometimes = torch.nn.Identity()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.shift = torch.nn.Parameter(torch.zeros(1))
        self.save_hyperparameters()

    def training_step(self, batch, index):
        return super().training_step(batch, index) * self.scale + self.shift.square().sum()

    def configure_optimizers(self):
        if self.optimizer == "plain sgd":
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)
        return super().configure_optimizers()


class Save(Callback):
    """After the first epoch, or a step."""

    def __init__(self, path, step=None):
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer, module):
        if self.step is None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(module, setting, path=None, step=None):
    callbacks = [Save(path, step)] if path else []
    name = "ddp" if setting.get("name") == "ddp" else "overlap"
    kwargs = {} if name == "ddp" else setting.get("strategy_kwargs", {})
    return train(module=module, **{**LENGTH, **setting, "callbacks": callbacks, "strategy_kwargs": kwargs})


def close(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=2e-5)


WHOLE: dict = {}


def uninterrupted(world, size, setting):
    key = (size, repr(sorted(setting.items())))
    if key not in WHOLE:
        WHOLE[key] = world(size).run(run, Plain, setting)
    return WHOLE[key]


@pytest.mark.parametrize(
    ("setting", "background"),
    [
        ({}, False),
        ({}, True),
        ({"precision": "bf16-true"}, False),
        ({"optimizer": "plain sgd", "precision": "bf16-true"}, False),
        ({"optimizer": "sgd"}, False),
        ({"optimizer": "adafactor"}, False),
        ({"data": {"distributed_optimizer": False}}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path, setting, background, kind):
    path = tmp_path / "half.ckpt"
    kwargs = {"strategy_kwargs": {"state_dict_type": kind, "async_save": background}}
    whole = uninterrupted(world, 2, setting)
    saving = world(2).run(run, Plain, {**setting, **kwargs}, path)
    assert saving[0]["hash"] == whole[0]["hash"]
    assert path.is_dir() == (kind == "sharded")
    assert os.listdir(tmp_path) == ["half.ckpt"]
    resumed = world(2).run(run, Plain, {**setting, "resume": str(path)})
    assert resumed[0]["step"] == 6
    assert {r["hash"] for r in resumed} == {whole[0]["hash"]}


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_folder_loads_into_another_number_of_ranks(world, tmp_path, saved, loaded, optimizer):
    # The attention's key bias has a gradient of zero but for rounding, which Adam would make a step of: so its losses.
    path = tmp_path / "half.ckpt"
    setting = {"optimizer": optimizer}
    whole = world(saved).run(run, Plain, {**setting, "strategy_kwargs": SHARDED}, path)
    resumed = world(loaded).run(run, Plain, {**setting, "resume": str(path), "strategy_kwargs": SHARDED})
    close(mean_losses(resumed), mean_losses(whole)[3:])
    if optimizer == "sgd":
        close(resumed[0]["weights"], whole[0]["weights"])


def mean_losses(ranks):
    return torch.tensor([rank["losses"] for rank in ranks]).mean(0).tolist()


@pytest.mark.parametrize(("first", "second"), [("ddp", "sharded"), ("sharded", "full"), ("full", "ddp")])
def test_formats_follow_each_other(world, tmp_path, first, second):
    """Saved in one, resumed and saved in another: the same optimizer state as never interrupted, number for number."""
    setting = {"optimizer": "sgd"}
    kinds = {"ddp": {"name": "ddp"}, "full": {}, "sharded": {"strategy_kwargs": SHARDED}}
    half, end, whole = tmp_path / "half.ckpt", tmp_path / "end.ckpt", tmp_path / "whole.ckpt"
    world(2).run(run, Plain, {**setting, **kinds[first]}, half)
    world(2).run(run, Plain, {**setting, **kinds[second], "resume": str(half)}, end, 5)
    world(2).run(run, Plain, {**setting, **kinds["ddp"]}, whole, 5)
    ours, theirs = flat(end), flat(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-5)


def flat(path):
    """Weights and momenta by name, from either kind."""
    if path.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        saved = _load_distributed_checkpoint(path)  # what Lightning's `consolidate_checkpoint` reads with
        state = saved["optimizer_0"]["state"]
        return {**saved["model"], **{f"{name}.{key}": v for name, values in state.items() for key, v in values.items()}}
    saved = torch.load(path, weights_only=True)
    names = [n for n, p in Plain().named_parameters() if p.dim() >= 2] + [
        n for n, p in Plain().named_parameters() if p.dim() < 2 and n != "frozen"
    ]
    state = saved["optimizer_states"][0]["state"]
    return {**saved["state_dict"], **{f"{names[i]}.{key}": v for i, values in state.items() for key, v in values.items()}}


def test_each_rank_writes_its_share(world, tmp_path):
    path = tmp_path / "half.ckpt"
    world(2).run(run, Plain, {"strategy_kwargs": SHARDED}, path)
    index = dcp.FolderReader(path).index
    owners, sizes = {place.fqn: set() for place in index.storage_data}, dict.fromkeys(os.listdir(path), 0)
    for place, where in index.storage_data.items():
        owners[place.fqn].add(where.relative_path)
        chunks = index.state_dict_metadata[place.fqn].chunks
        sizes[where.relative_path] += sum(chunk.sizes.numel() for chunk in chunks if chunk.offsets == place.offset)
    shares = [sizes["__0_0.distcp"], sizes["__1_0.distcp"]]
    assert max(shares) < 1.2 * min(shares), shares
    assert any(len(files) == 2 for files in owners.values()), "a parameter that two ranks share is in both of their files"
    assert torch.load(path / "meta.pt", weights_only=True)["optimizer_states"][0]["param_groups"][1]["params"][0] == "scale"


def evaluated(path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy("overlap", {}, "auto", {}), **quiet)
    return trainer.validate(Plain(), ckpt_path=str(path), verbose=False)


def test_a_folder_is_validated(world, tmp_path):
    path = tmp_path / "half.ckpt"
    world(2).run(run, Plain, {"strategy_kwargs": SHARDED, "max_epochs": 1}, path)
    one, two = world(1).run(evaluated, path)[0], world(2).run(evaluated, path)[0]
    assert one[0]["val_loss"] == pytest.approx(two[0]["val_loss"], rel=1e-4)


class Trusted:
    """An object of the user's in a checkpoint."""


class KeepsAnObject(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = Trusted()


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def failing(setting, folder=None):
    if folder is not None:
        os.chdir(folder)
    with pytest.raises(CheckpointError) as caught:
        run(Plain, setting)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_objects_are_refused_unless_trusted(world, tmp_path, kind):
    path = tmp_path / "half.ckpt"
    world(2).run(run, KeepsAnObject, {"strategy_kwargs": {"state_dict_type": kind}, "max_epochs": 1}, path)
    for message in world(2).run(failing, {"resume": str(path)}):
        assert "test_checkpoints.Trusted" in message
        assert "weights_only=False" in message
    assert world(2).run(trusting, str(path))[0] == 6


def trusting(path):
    fit = Trainer.fit
    with mock.patch.object(Trainer, "fit", lambda *args, **kwargs: fit(*args, weights_only=False, **kwargs)):
        return run(Plain, {"resume": path})["step"]


class Looked:
    """Pickled as a look-up by getattr, which is how Python 3.11.2 writes the members of an enum."""

    def __init__(self, of, name):
        self.looked_up = getattr, (of, name)

    def __reduce__(self):
        return self.looked_up


def test_an_index_looks_up_nothing_but_members_of_its_enum():
    def read(what):
        return dcp.IndexUnpickler(io.BytesIO(pickle.dumps(what))).load()

    enum = type(dcp.MemoryFormatEncoding.TORCH_CONTIGUOUS_FORMAT)
    assert read(Looked(enum, "TORCH_PRESERVE_FORMAT")) is enum.TORCH_PRESERVE_FORMAT
    for of, name in ((enum, "__init__"), (dcp.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="it names"):
            read(Looked(of, name))


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


def test_instances_hold_the_same_state_and_save_it_once(world, tmp_path):
    path = tmp_path / "half.ckpt"
    setting = {"optimizer": "sgd", "data": {"num_optimizer_instances": 2}}
    whole = world(4).run(run, Plain, {**setting, "strategy_kwargs": SHARDED}, path)
    resumed = world(4).run(run, Plain, {**setting, "resume": str(path)})
    assert resumed[0]["hash"] == whole[0]["hash"]


class WeightsOnly(Save):
    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.path, weights_only=True)


def weights_only(path):
    train(module=Plain, callbacks=[WeightsOnly(path)], strategy_kwargs=SHARDED, **{**LENGTH, "max_epochs": 1})
    return evaluated(path)


def test_weights_only(world, tmp_path):
    world(2).run(weights_only, tmp_path / "weights.ckpt")
    assert {name.split(".")[0] for name in flat_index(tmp_path / "weights.ckpt")} == {"model"}


def flat_index(path):
    return dcp.FolderReader(path).index.state_dict_metadata


class TwoOptimizers(Plain):
    """By hand; the second optimizer's state has what is no tensor."""

    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = [*self.embedding.parameters(), *self.attention.parameters()]
        second = [*self.up.parameters(), *self.down.parameters(), *self.norm.parameters()]
        return [torch.optim.SGD(first, 0.1, momentum=0.9), torch.optim.AdamW(second, 1e-2)]

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            for state in optimizer.optimizer.state.values():
                state["steps"] = state.get("steps", 0) + 1
        return loss


def by_hand(path, resume):
    made = []
    setting = {"strategy_kwargs": SHARDED, "resume": resume}
    result = train(module=TwoOptimizers, made=made, **{**LENGTH, "max_steps": -1}, **setting, callbacks=[Save(path)] if path else [])
    counts = {state["steps"] for optimizer in made[0].optimizers for state in optimizer.state.values()}
    return result["hash"], counts


def test_two_optimizers_by_hand(world, tmp_path):
    path = tmp_path / "half.ckpt"
    whole = world(2).run(by_hand, path, None)
    assert world(2).run(by_hand, None, str(path)) == whole
    assert whole[0][1] == {6}


class Watching(AsyncCheckpointIO):
    """Lightning's plugin around ours."""


def wrapped(path):
    return run(Plain, {"strategy_kwargs": {"checkpoint_io": Watching()}}, path)["hash"]


def test_lightnings_plugin_wraps_ours(world, tmp_path):
    path = tmp_path / "half.ckpt"
    whole = uninterrupted(world, 2, {})
    assert world(2).run(wrapped, path)[0] == whole[0]["hash"]
    assert world(2).run(run, Plain, {"resume": str(path)})[0]["hash"] == whole[0]["hash"]


def test_a_view_is_not_written_with_its_buffer(world, tmp_path):
    path = tmp_path / "half.ckpt"
    world(2).run(run, Plain, {"optimizer": "plain sgd", "max_epochs": 1}, path)
    numbers = sum(p.numel() for p in Plain().parameters())
    assert path.stat().st_size < 4 * numbers * 1.5 + 20_000


# -- names ---------------------------------------------------------------------------------------------------------------------


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


# -- what is on the disk is not what was written -------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


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


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "..", ""])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    place = dcp.MetadataIndex("model.w")
    index = dcp.Metadata({}, storage_data={place: _StorageInfo(name, 0, 1)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        dcp.FolderReader(tmp_path)


# -- crashes and links ---------------------------------------------------------------------------------------------------------


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


# -- optimizers that are not in it ---------------------------------------------------------------------------------------------


def resumed_without_states(path):
    with mock.patch("lightning_overlap.strategy.checkpoints.rank_zero_warn") as warn:
        run(Plain, {"resume": str(path)})
    return [call.args[0] for call in warn.call_args_list]


def test_an_optimizer_without_its_state_is_told(world, tmp_path):
    path = tmp_path / "half.ckpt"
    world(1).run(run, Plain, {"max_epochs": 1}, path)
    assert world(1).run(resumed_without_states, path) == [[]]
    saved = torch.load(path, weights_only=True)
    saved["optimizer_states"] = []
    torch.save(saved, path)
    (told,) = world(1).run(resumed_without_states, path)[0]
    assert "the state of 0 optimizers, and the module has 1" in told
