"""A model, a callback and a run for tests of checkpoints."""

import os

import pytest
import torch
from lightning.pytorch import Callback

from lightning_overlap import CheckpointError
from tests.helpers.training import Net, train

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


def failing(setting, folder=None):
    if folder is not None:
        os.chdir(folder)
    with pytest.raises(CheckpointError) as caught:
        run(Plain, setting)
    return str(caught.value)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
