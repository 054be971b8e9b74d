"""What a process that plays a rank does when something fails: it answers, tells the other players, and keeps nothing."""

import logging
import pickle
import queue
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_overlap import OverlapConfig
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.torch_seams import dispatch_modes
from lightning_overlap.tune.memory import StepMemory
from lightning_overlap.tune.worker import Failure, Task, serve

CPU = torch.device("cpu")
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
MADE: list["weakref.ref[Small]"] = []


class Small(LightningModule):
    """A layer, whose ``configure_optimizers`` keeps a reference to each copy that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        MADE.append(weakref.ref(self))
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(8, 2))  # type: ignore[arg-type]


class FailsInStep2(Small):
    def training_step(self, batch: Any, index: int) -> Any:
        if index == 1:
            raise OSError("the disk is gone")
        return super().training_step(batch, index)


class StepsTwice(Small):
    """Two steps a batch, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).sum())
            optimizer.step()


class Pipe:
    """Gives tasks, and keeps the answers."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = list(tasks)
        self.answers: list[Any] = []

    def recv(self) -> Task:
        if not self.tasks:
            raise EOFError
        return self.tasks.pop(0)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Undoes what :func:`serve` sets in its process."""
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    logging.disable(level)
    MADE.clear()


def served(run: bytes, *, device: torch.device = CPU, players: int = 1) -> tuple[Failure, Any]:
    """Plays rank 0 of two until it fails; returns the answer and the inbox of the last player."""
    task = Task(OverlapConfig(), 2, tuple(range(players)), (device,) * players, "gloo", steps=1, session=1)
    pipe: Any = Pipe(task)
    inboxes: list[Any] = [queue.Queue() for _ in range(players)]
    serve(pipe, 0, inboxes, threading.Lock(), run, 1)
    ((succeeded, answer),) = pipe.answers
    assert not succeeded
    return answer, inboxes[-1]


def pickled(model: LightningModule) -> bytes:
    return pickle.dumps((model, None, {"accelerator": "cpu"}))


def test_a_failure_before_the_fit_is_told_to_the_other_players() -> None:
    nowhere = torch.device("cuda", torch.cuda.device_count())
    failure, inbox = served(pickled(Small()), device=nowhere, players=2)
    session, (player, subject), message = inbox.get_nowait()
    assert (session, player, subject) == (1, 0, "failure")
    assert failure.message == pickle.loads(message)


def test_a_module_that_cannot_be_read_is_answered() -> None:
    failure, inbox = served(b"no pickle", players=2)
    assert failure.message.startswith("UnpicklingError")
    assert not inbox.empty()


def test_a_run_that_has_failed_is_freed() -> None:
    failure, _ = served(pickled(FailsInStep2()))
    assert failure.message == "OSError: the disk is gone"
    assert [reference() for reference in MADE] == [None]


def test_several_steps_a_batch_are_refused() -> None:
    failure, _ = served(pickled(StepsTwice()))
    assert failure.is_config_error
    assert failure.message.startswith("a batch makes 2 optimizer steps")


def test_transfers_that_cannot_be_seen_are_refused() -> None:
    with mock.patch.object(DataMode, "uncounted_transfers", "data_parallel sends by post; by wire, all transfers are seen"):
        failure, _ = served(pickled(Small()))
    assert failure.is_config_error
    assert "need to see all transfers, and data_parallel sends by post" in failure.message


def test_the_memory_of_a_step_that_fails_is_counted_no_longer() -> None:
    model = FailsInStep2()
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[memory := StepMemory(1)], **QUIET)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(model)
    assert memory.memory is None
    assert not dispatch_modes()
    parameters: Any = model.parameters()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)
