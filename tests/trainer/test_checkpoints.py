"""Checkpoints through Trainer: what is resumed equals what was not interrupted, in either form, on other numbers of ranks."""

import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_overlap import ConfigError
from tests.helpers.training import train
from tests.trainer.test_unchanged_code import Plain

EPOCHS = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3, "limit_val_batches": 0}


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


def fit(kwargs):
    return train(**{"module": Plain, **EPOCHS, **kwargs})


def save(kwargs, path):
    return fit({**kwargs, "max_epochs": 1, "callbacks": [Save(path)]})


SHARDED = {"strategy_kwargs": {"state_dict_type": "sharded"}}
ASYNC = {"strategy_kwargs": {"state_dict_type": "sharded", "async_save": True}}
FULL_ASYNC = {"strategy_kwargs": {"async_save": True}}


@pytest.mark.parametrize(
    ("how", "kwargs"),
    [
        (SHARDED, {"optimizer": "adamw"}),
        (SHARDED, {"optimizer": "sgd"}),
        (SHARDED, {"optimizer": "adafactor"}),
        (SHARDED, {"optimizer": "adamw", "precision": "bf16-true"}),
        (SHARDED, {"optimizer": "adamw", "data": {"distributed_optimizer": False}}),
        (ASYNC, {"optimizer": "adamw"}),
        (FULL_ASYNC, {"optimizer": "adamw"}),
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(world, tmp_path, how, kwargs):
    path = str(tmp_path / "half.ckpt")
    whole = world(2).run(fit, kwargs)
    world(2).run(save, {**kwargs, **how}, path)
    assert os.path.isdir(path) == ("state_dict_type" in how["strategy_kwargs"])
    resumed = world(2).run(fit, {**kwargs, "resume": path})  # either form is loaded by either
    assert resumed[0]["hash"] == whole[0]["hash"]
    assert os.listdir(tmp_path) == ["half.ckpt"]


@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 4), (2, 1), (1, 2)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_numbers_of_ranks(world, tmp_path, saving, loading, optimizer):
    path = str(tmp_path / "half.ckpt")
    world(saving).run(save, {"optimizer": optimizer, **SHARDED}, path)
    resumed = world(loading).run(fit, {"optimizer": optimizer, "resume": path})
    whole = world(saving).run(fit, {"optimizer": optimizer})
    assert resumed[0]["step"] == 6
    # Another order of summing over the ranks; Adam makes steps of the rounding of gradients that are zero.
    close = {"rtol": 1e-3, "atol": 1e-4} if optimizer == "sgd" else {"rtol": 1e-2, "atol": 5e-2}
    torch.testing.assert_close(torch.tensor(resumed[0]["weights"]), torch.tensor(whole[0]["weights"]), **close)


def sizes(path):
    save({"optimizer": "adamw", **SHARDED}, path)
    return


def test_each_rank_writes_its_share(world, tmp_path):
    world(2).run(sizes, str(tmp_path / "x.ckpt"))
    parts = [os.path.getsize(tmp_path / "x.ckpt" / name) for name in os.listdir(tmp_path / "x.ckpt") if name.endswith(".distcp")]
    assert len(parts) == 2
    assert max(parts) < 0.65 * sum(parts)


def keep_best(folder):
    saving = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True, every_n_epochs=1, filename="{epoch}")
    stopping = EarlyStopping("val_loss", patience=5)
    more = {"max_epochs": 3, "limit_val_batches": 2, "enable_checkpointing": True, "callbacks": [saving, stopping]}
    fit({"optimizer": "sgd", **SHARDED, **more})
    return saving.best_model_path, sorted(os.listdir(folder))


def test_model_checkpoint_keeps_the_best_directory(world, tmp_path):
    (best, left), _ = world(2).run(keep_best, tmp_path)
    assert os.path.isdir(best)
    assert left == sorted([os.path.basename(best), "last.ckpt"])


class Wider(Plain):
    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.up = torch.nn.Linear(16, 48)
        self.down = torch.nn.Linear(48, 16)


def load_into_another(path):
    with pytest.raises(ConfigError) as caught:
        fit({"module": Wider, "optimizer": "sgd", "resume": path})
    return str(caught.value)


def test_a_directory_of_another_module_is_refused(world, tmp_path):
    path = str(tmp_path / "x.ckpt")
    world(2).run(save, {"optimizer": "sgd", **SHARDED}, path)
    for message in world(2).run(load_into_another, path):
        assert "model.up.weight (48, 16) ((64, 16))" in message
