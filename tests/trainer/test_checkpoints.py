"""Checkpoints through Trainer: resumed training is uninterrupted training, in every format and with any number of ranks."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import lightning_overlap.state.dcp as dcp
from tests.helpers.checkpoints import LENGTH, SHARDED, Plain, Save, run
from tests.helpers.training import strategy, train


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
