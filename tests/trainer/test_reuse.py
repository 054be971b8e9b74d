"""Trainers, modules and optimizers before and after a fit: used again, released, pickled."""

import gc
import logging
import os
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_overlap import ConfigError, OverlapStrategy
from tests.helpers.training import Plain, train


class Reuses(Plain):
    """The same optimizer object in each fit."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.made = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)

    def configure_optimizers(self):
        return self.made


def fitted_twice(name, path):
    """Weights after two fits by one Trainer; and after a checkpoint that was saved between fits was loaded by a third."""
    torch.manual_seed(1)
    module = Reuses()
    first = train(module=lambda _: module, name=name, made=(trainer := []), max_steps=3)
    trainer[0].save_checkpoint(path)
    trainer[0].fit_loop.epoch_loop.max_steps = 6
    trainer[0].fit(module)
    twice = torch.cat([p.detach().flatten() for p in module.parameters()])
    resumed = train(module=lambda _: Reuses(), name=name, resume=path, max_steps=6)
    assert type(module.up._parameters) is dict
    assert first["step"] == 3
    return twice.tolist(), resumed["weights"], torch.load(path, weights_only=True)["optimizer_states"][0]["state"]


def test_fit_again_and_save_after_fit(world, tmp_path):
    ours = world(2).run(fitted_twice, "overlap", tmp_path / "overlap.ckpt")
    ddp = world(2).run(fitted_twice, "ddp", tmp_path / "ddp.ckpt")
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(torch.tensor(ours[0][0]), torch.tensor(ddp[0][0]), **close)
    torch.testing.assert_close(torch.tensor(ours[0][1]), torch.tensor(ddp[0][1]), **close)
    assert ours[0][2].keys() == ddp[0][2].keys()
    for key, value in ddp[0][2].items():
        torch.testing.assert_close(ours[0][2][key]["momentum_buffer"], value["momentum_buffer"], **close)


def plans_printed(path):
    """The heads and sizes of buckets of the plans that are printed in four fits: twice alike, then otherwise, then resumed so."""
    printed = []
    handler = mock.Mock(level=logging.INFO, handle=lambda record: printed.append(record.getMessage()))
    logger = logging.getLogger("lightning_overlap")
    logger.addHandler(handler)
    try:
        for size, resume in ((911, None), (911, None), (912, None), (912, path)):
            train(data={"bucket_size": size}, max_steps=1 if resume is None else 2, resume=resume, made=(made := []))
            made[0].validate(made[0].lightning_module, verbose=False)
            made[0].save_checkpoint(path)
    finally:
        logger.removeHandler(handler)
    return [re.findall(r"bucket_size +(\d+)", message) for message in printed if "bucket_size" in message]


def test_a_plan_is_printed_once(world, tmp_path):
    assert world(2).run(plans_printed, tmp_path / "last.ckpt") == [[["911"], ["912"]], []], "by the first rank"


def connections_after(trainers):
    for _ in range(trainers):
        train(module=Plain, max_steps=1)
    gc.collect()
    # gloo has a thread for each group of connections.
    return sum(Path(f"/proc/self/task/{thread}/comm").read_text().startswith("gloo_tcp") for thread in os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_trainers_that_are_let_go_of_leave_no_connections(world):
    before = world(2).run(connections_after, 0)
    after = world(2).run(connections_after, 3)
    assert all(now <= earlier for now, earlier in zip(after, before, strict=True))  # some of an earlier failure may end meanwhile


class AsksForTheState(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.optimizers[0].state_dict()


def test_the_state_of_a_shard_is_not_taken_for_the_whole(world):
    for message in world(2).run(ask_for_the_state):
        assert "sharded over the ranks. trainer.save_checkpoint()" in message


def ask_for_the_state():
    with pytest.raises(ConfigError) as caught:
        train(module=Plain, callbacks=[AsksForTheState()])
    return str(caught.value)


def test_a_trainer_can_be_sent_to_other_processes():
    trainer = Trainer(strategy=OverlapStrategy(start_method="spawn"), accelerator="cpu", devices=2, logger=False)
    trainer.strategy.connect(LightningModule())
    again = pickle.loads(pickle.dumps(trainer.strategy))
    assert again.precision_plugin.main_params.__self__ is again
    assert not dist.is_initialized()
