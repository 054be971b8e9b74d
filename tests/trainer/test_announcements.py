"""An error of one rank, wherever it is raised, ends the others at once, with its words, also if the process lives on."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_overlap import ConfigError, OverlapStrategy
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.world import WORLD, make_group
from tests.helpers.training import Net, train
from tests.trainer.test_first_step import PIPELINE, TENSOR
from tests.trainer.test_first_step import Net as CutNet

EPOCHS = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 2, "limit_val_batches": 1}


def failing_at(hook, bad, base=Net):
    """A module that fails in a hook on one rank, when it has been called twice there if it is one of several calls."""

    def fail(self, *args, **kwargs):
        if dist.get_rank() == bad and (hook != "training_step" or self.global_step == 2):
            raise ValueError("the user's")
        return getattr(base, hook)(self, *args, **kwargs)

    return type("Failing", (base,), {hook: fail})


def told(hook, bad, folder):
    """What a run that fails on one rank ends with on this one. Nobody waits for the timeout, which is longer than the world's."""
    WORLD.announcements.interval = 0.1
    saving = ModelCheckpoint(folder, save_on_train_epoch_end=True)
    try:
        train(module=failing_at(hook, bad), callbacks=[saving], enable_checkpointing=True, **EPOCHS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def told_of_each(places, folder):
    return [told(hook, bad, folder / str(number)) for number, (hook, bad) in enumerate(places)]


def expected(bad):
    answers = [f"TransferError: rank {bad} has failed: ValueError: the user's"] * 2
    answers[bad] = "ValueError: the user's"
    return answers


def test_an_error_outside_of_steps_is_told_and_the_world_lives_on(world, tmp_path):
    places = [
        ("setup", 0),
        ("train_dataloader", 1),
        ("configure_optimizers", 0),
        ("on_train_start", 1),
        ("training_step", 0),
        ("validation_step", 1),
        ("on_validation_epoch_end", 0),
        ("on_train_epoch_end", 1),
        ("on_save_checkpoint", 0),
        ("on_fit_end", 1),
    ]
    undisturbed = world(2).run(train)
    answers = world(2).run(told_of_each, places, tmp_path)
    for (hook, bad), *here in zip(places, *answers, strict=True):
        assert here == (["trained", "ValueError: the user's"] if hook == "on_fit_end" else expected(bad)), hook
    again = world(2).run(train)
    assert [each["hash"] for each in again] == [each["hash"] for each in undisturbed]


def told_when_cut(strategy, places):
    """The same with a model that is cut over the ranks."""
    WORLD.announcements.interval = 0.1
    answers = []
    for hook, bad in places:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        made = OverlapStrategy(**strategy, **env)
        data = DataLoader(TensorDataset(torch.ones(16, 6, 3), torch.ones(16, 6, 2)), batch_size=4)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        length = {"max_epochs": 2, "limit_train_batches": 3, "use_distributed_sampler": False}
        try:
            Trainer(accelerator="cpu", devices=2, strategy=made, **quiet, **length).fit(failing_at(hook, bad, CutNet)(), data)
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
        else:
            answers.append("trained")
    return answers


@pytest.mark.parametrize("strategy", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
def test_an_error_of_one_part_of_a_model_is_told(world, strategy):
    places = [("configure_optimizers", 1), ("training_step", 1), ("training_step", 0), ("on_train_epoch_end", 1), ("on_train_end", 1)]
    answers = world(2).run(told_when_cut, strategy, places)
    for (hook, bad), *here in zip(places, *answers, strict=True):
        assert here == expected(bad), hook


class Quits(Callback):
    def on_train_epoch_end(self, trainer, module):
        if dist.get_rank() == 0:
            raise ValueError("the user's")


class InTraining(Net):
    def training_step(self, batch, index):
        if self.global_step == 2 and dist.get_rank() == 1:
            raise ValueError("the user's")
        return super().training_step(batch, index)


def process(where):
    """A whole process, which ends with its error."""
    torch.set_num_threads(1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = OverlapStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    callbacks = [Quits()] if where == "epoch end" else []
    Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=callbacks, **EPOCHS, **quiet).fit(
        InTraining() if where == "step" else Net()
    )


@pytest.mark.parametrize(("where", "bad"), [("epoch end", 0), ("step", 1)])
def test_processes_that_end_have_told_why_and_abort_nowhere(where, bad):
    command = [sys.executable, "-c", f"from tests.trainer.test_announcements import process; process({where!r})"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where_to_meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **where_to_meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=100)[1] for each in ranks]
    assert [each.returncode for each in ranks] == [1, 1], said
    assert said[bad].rstrip().endswith("ValueError: the user's")
    assert f"TransferError: rank {bad} has failed: ValueError: the user's" in said[1 - bad]


def saved_on_exception(bads, folder):
    """A checkpoint callback saves when training fails; the error is still the user's, or tells of it."""
    WORLD.announcements.interval = 0.1

    class Failing(Net):
        def training_step(self, batch, index):
            if self.global_step == 2 and dist.get_rank() in bads:
                raise ValueError("the user's")
            return super().training_step(batch, index)

    with pytest.raises((ValueError, TransferError)) as caught:
        train(module=Failing, enable_checkpointing=True, callbacks=[OnExceptionCheckpoint(folder)])
    return type(caught.value).__name__


@pytest.mark.parametrize(("bads", "errors"), [((0, 1), ["ValueError"] * 2), ((1,), ["TransferError", "ValueError"])])
def test_what_is_saved_on_an_exception_is_saved_in_step_or_not_at_all(world, tmp_path, bads, errors):
    answers = world(2).run(saved_on_exception, bads, tmp_path / "saved")
    assert answers == errors
    assert os.path.exists(tmp_path / "saved" / "on_exception.ckpt") == (len(bads) == 2)


def disagreeing(kwargs, of_last):
    """The error of ranks whose Trainers differ."""
    mine = of_last if dist.get_rank() else kwargs
    with pytest.raises(ConfigError) as caught:
        train(**{name: value() if callable(value) else value for name, value in mine.items()})
    return str(caught.value)


def early(patience):
    return [EarlyStopping("loss", patience=patience, check_on_train_epoch_end=True)]


def two():
    return early(2)


def three():
    return early(3)


def test_arguments_of_the_trainer_that_differ_between_ranks_are_named(world):
    cases = [
        ({"accumulate_grad_batches": 1}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches: rank 0 has 1, rank 1 has 2"),
        ({"max_steps": 4}, {"max_steps": 6}, "the Trainer's max_steps: rank 0 has 4, rank 1 has 6"),
        ({"callbacks": two}, {"callbacks": three}, "the callback EarlyStopping (1): rank 0 has monitor='loss', "),
        ({"callbacks": two}, {}, "the callback EarlyStopping (1)"),
    ]
    for kwargs, of_last, words in cases:
        messages = world(2).run(disagreeing, kwargs, of_last)
        assert messages[0] == messages[1]
        assert words in messages[0]


class GivesNone(Net):
    def training_step(self, batch, index):
        return None if self.global_step == 2 and dist.get_rank() == 1 else super().training_step(batch, index)


def lone_none():
    WORLD.announcements.interval = 0.1
    with pytest.raises((RuntimeError, TransferError)) as caught:
        train(module=GivesNone)
    return str(caught.value)


def test_a_step_that_one_rank_leaves_out_ends_all_with_lightnings_words(world):
    messages = world(2).run(lone_none)
    assert messages[1].startswith("Skipping the `training_step` by returning None in distributed training is not supported")
    assert messages[0] == f"rank 1 has failed: RuntimeError: {messages[1]}"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"timeout": timedelta(seconds=-5)}, "timeout must be"),
        ({"timeout": 30}, "timeout must be"),
        ({"meeting_timeout": timedelta(days=10**5)}, "meeting_timeout must be"),
        ({"process_group_backend": "nonsense"}, "process_group_backend must be gloo, nccl or None"),
        ({"tensor_parallel": True}, "tensor_parallel.size must be an integer of at least 1, got True"),
        ({"tensor_parallel": 2.0}, "tensor_parallel.size must be an integer of at least 1, got 2.0"),
        ({"tensor_parallel": "2"}, "tensor_parallel.size must be an integer of at least 1, got '2'"),
        ({"context_parallel": True}, "context_parallel.size must be an integer of at least 1, got True"),
        ({"expert_parallel": 0}, "expert_parallel.size must be an integer of at least 1, got 0"),
        ({"pipeline_parallel": 0}, "pipeline_parallel.size must be an integer of at least 1, got 0"),
        ({"pipeline_parallel": 10**12}, "pipeline_parallel.size must be at most"),
        ({"data_parallel": True}, "data_parallel.size must be an integer of at least 1, got True"),
    ],
)
def test_what_is_no_size_and_no_limit_is_refused_at_once(asked, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        OverlapStrategy(**asked)


def test_more_stages_than_ranks_are_refused_before_a_schedule_is_built():
    with pytest.raises(ConfigError, match="pipeline_parallel=50000 needs a multiple of 50000 ranks, and there are 2"):
        Trainer(accelerator="cpu", devices=2, strategy=OverlapStrategy(pipeline_parallel=50000), logger=False)


def batch_norm_groups():
    from lightning_overlap.ranks.shared_state import batch_norms_over

    group = make_group([[0], [1]], "alike", timedelta(seconds=30), gathers=False, threads=False)
    own = make_group([[0, 1]], "own", timedelta(seconds=30), gathers=False, threads=False)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    with batch_norms_over(module, own):
        inside = [layer.process_group is own.process_group for layer in module]
    after = [layer.process_group for layer in module]
    own.close()
    group.close()
    return inside, after


def test_batch_norms_sum_over_the_ranks_that_see_different_data(world):
    assert world(2).run(batch_norm_groups) == [([True, True], [None, None])] * 2
