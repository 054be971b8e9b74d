"""What goes wrong while training: a clear error, the same on every rank; nobody hangs and nothing is lost."""

import os
import signal
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError
from lightning_overlap.ranks.announcements import TransferError
from tests.helpers.training import Net, train
from tests.helpers.world import World


class InTheThirdBatch(Net):
    """Something happens to the last rank (or to all)."""

    def training_step(self, batch, index):
        if self.global_step == 2:
            self.happen()
        return super().training_step(batch, index)

    @property
    def last(self):
        return self.global_rank == self.trainer.world_size - 1


class Killed(InTheThirdBatch):
    def happen(self):
        if self.last:
            os.kill(os.getpid(), signal.SIGKILL)


class Silent(InTheThirdBatch):
    def happen(self):
        if self.last:
            os.kill(os.getpid(), signal.SIGSTOP)


def fail(module, error, kwargs):
    """The message of the error, which is reported even if the other rank is gone."""
    with pytest.raises(error) as caught:
        train(module=module, **kwargs)
    return str(caught.value)


def saved_run(module, folder, resume=None):
    """Three epochs of two batches, with a checkpoint after each."""
    saving = ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=True, filename="{step}")
    length = {"max_epochs": 3, "max_steps": -1, "limit_train_batches": 2, "limit_val_batches": 0}
    return train(module=module, enable_checkpointing=True, callbacks=[saving], resume=resume, **length)


def alone(function, *arguments):
    """What the ranks that live on say; a world of its own, since one of its ranks does not."""
    world = World(2)
    world.timeout = 60.0
    try:
        world.run(function, *arguments)
    except (AssertionError, TimeoutError) as error:
        return str(error)
    finally:
        world.close()
    raise AssertionError("one rank was to fail")


def killed(folder):
    with pytest.raises((TransferError, RuntimeError)) as caught:
        saved_run(Killed, folder)
    (folder / "told").write_text(f"{type(caught.value).__name__}: {caught.value}")


def test_the_others_name_the_peer_that_was_killed_and_the_run_resumes(world, tmp_path):
    assert "rank 1: the worker died" in alone(killed, tmp_path)
    message = (tmp_path / "told").read_text()
    assert message.startswith("TransferError: transfer '")
    assert "between rank 0 and rank" in message
    whole = world(2).run(saved_run, Net, tmp_path / "whole")
    resumed = world(2).run(saved_run, Net, tmp_path / "resumed", str(tmp_path / "step=2.ckpt"))
    assert resumed[0]["hash"] == whole[0]["hash"]


def test_a_silent_peer_is_named_within_the_timeout(monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    world = World(2)
    try:
        message = world.first(fail, Silent, TransferError, {"strategy_kwargs": {"timeout": timedelta(seconds=3)}})
    finally:
        world.close()
    assert "between rank 0 and rank" in message
    assert "Incomplete transfers of this rank: data." in message
    assert "Last collectives in torch's Flight Recorder: gloo:" in message


class NotFinite(InTheThirdBatch):
    def happen(self):
        if self.last:
            self.up.weight.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize(("size", "instances"), [(2, 1), (4, 2)])
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(world, size, instances):
    kwargs = {"data": {"check_for_nan_in_grad": True, "num_optimizer_instances": instances}}
    messages = world(size).run(fail, NotFinite, FloatingPointError, kwargs)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"rank {size - 1}: the gradient of up.weight (bucket")


class ThawsALayer(InTheThirdBatch):
    def happen(self):
        self.frozen.requires_grad_()


class AddsAParameter(InTheThirdBatch):
    def happen(self):
        self.late = nn.Parameter(torch.ones(1))
        self.optimizers().optimizer.add_param_group({"params": [self.late]})


class Uneven(Net):
    def loader(self):
        data = super().loader().dataset
        return DataLoader(data[: 8 * (1 + self.global_rank)], batch_size=4)

    train_dataloader = loader


class NoData(Uneven):
    def loader(self):
        data = super().loader().dataset
        return DataLoader(data[: 8 * self.global_rank], batch_size=4)

    train_dataloader = loader


@pytest.mark.parametrize(
    ("module", "kwargs", "words"),
    [
        (ThawsALayer, {}, "frozen at setup and is trained now"),
        (ThawsALayer, {"data": {"distributed_optimizer": False}}, "frozen at setup and is trained now"),
        (AddsAParameter, {}, "param_groups changed after setup"),
        (AddsAParameter, {"data": {"distributed_optimizer": False}}, "param_groups changed after setup"),
        (Uneven, {"use_distributed_sampler": False}, "different numbers of training batches, [2, 4] by rank"),
        (NoData, {"use_distributed_sampler": False}, "ranks [0] have no batch, and other ranks have some"),
    ],
)
def test_the_same_error_on_every_rank(world, module, kwargs, words):
    messages = world(2).run(fail, module, ConfigError, kwargs)
    assert messages[0] == messages[1]
    assert words in messages[0]


class Requeued(InTheThirdBatch):
    def happen(self):
        if self.last:
            os.kill(os.getpid(), signal.SIGUSR1)


def requeue(folder):
    """The last rank gets SLURM's signal; all save at the same batch, and the first asks for the job to be requeued."""
    (folder / "scontrol").write_text(f"#!/bin/sh\necho $@ > {folder}/asked\n")
    (folder / "scontrol").chmod(0o755)
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    slurm = {
        "SLURM_NTASKS": size,
        "SLURM_NTASKS_PER_NODE": size,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "7",
    }
    with mock.patch.dict(os.environ, {**slurm, "PATH": f"{folder}:{os.environ['PATH']}"}):
        environment = SLURMEnvironment(requeue_signal=signal.SIGUSR1)
        return train(module=Requeued, default_root_dir=folder, strategy_kwargs={"cluster_environment": environment}, max_steps=8)[
            "hash"
        ]


def test_slurm_requeues_with_a_checkpoint_of_all_ranks(world, tmp_path):
    hashes = world(2).run(requeue, tmp_path)
    assert hashes[0] == hashes[1], "training goes on until the job is ended"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] in (3, 4)
    assert saved["optimizer_states"][0]["state"], "the states of both ranks' shards"
