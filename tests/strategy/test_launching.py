"""A launched function: its error reaches all ranks, and one runs at a time."""

import sys
import threading

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_overlap import ConfigError, OverlapStrategy
from lightning_overlap.strategy.launching import Watched


class Strategy:
    launched = False

    def note_failure(self, trainer):
        pass


def asked_to_stop():
    raise SIGTERMException


def test_a_process_that_has_to_answer_and_is_asked_to_stop_does_not_end_well():
    with pytest.raises(SystemExit) as ended:
        Watched(Strategy(), None, asked_to_stop, answers=True)()
    assert ended.value.code == 143
    with pytest.raises(SIGTERMException):
        Watched(Strategy(), None, asked_to_stop)()


def test_two_trainers_at_once_in_one_process_are_refused():
    inside, over = threading.Event(), threading.Event()
    first = threading.Thread(target=Watched(Strategy(), None, lambda: (inside.set(), over.wait(10))))
    first.start()
    inside.wait(10)
    try:
        with pytest.raises(ConfigError, match="another thread of this process runs a Trainer"):
            Watched(Strategy(), None, lambda: None)()
    finally:
        over.set()
        first.join()
    assert Watched(Strategy(), None, lambda: "after it")() == "after it"


def test_fabric_is_told_that_the_strategy_is_not_for_it():
    with pytest.raises(ValueError, match="<OverlapStrategy: for lightning.pytorch.Trainer, not for Fabric>".replace(".", r"\.")):
        Fabric(strategy=OverlapStrategy())


def test_a_notebook_copies_its_process_or_has_one(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be started again for 2 processes. Use OverlapStrategy\(start_method='fork'\)"):
        Trainer(strategy="overlap", devices=2, accelerator="cpu")
    assert Trainer(strategy="overlap_notebook", devices=2, accelerator="cpu").strategy.launcher.is_interactive_compatible
    assert Trainer(strategy="overlap", devices=1, accelerator="cpu").strategy.launcher.is_interactive_compatible


def test_more_processes_than_devices_are_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    strategy = OverlapStrategy(cluster_environment=TorchElasticEnvironment(), parallel_devices=[torch.device("cpu")])
    with pytest.raises(ConfigError, match="has the local rank 1, and the Trainer has devices=1"):
        strategy._configure_launcher()
