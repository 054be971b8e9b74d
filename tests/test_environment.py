"""Which variables a plan wants on CUDA, and what becomes of them."""

import os
import subprocess
from importlib import metadata
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_overlap import OverlapStrategy, PipelineParallel, TensorParallel, environment
from lightning_overlap.config import OverlapConfig
from lightning_overlap.environment import Setting, apply, capability, settings_for


@pytest.mark.parametrize(
    ("size", "overlap", "major", "value"),
    [
        (2, "auto", 9, "1"),
        (2, "auto", 8, "1"),
        (2, "auto", 10, None),
        (2, "auto", None, None),
        (2, "off", 9, None),
        (1, "auto", 9, None),
    ],
)
def test_one_queue_for_tensor_parallelism_before_blackwell(size: int, overlap: Any, major: int | None, value: str | None) -> None:
    found = settings_for(OverlapConfig(tensor_parallel=TensorParallel(size=size), overlap=overlap), major)
    assert [(s.variable, s.value) for s in found] == ([("CUDA_DEVICE_MAX_CONNECTIONS", value)] if value else [])


def test_room_for_the_transfers_of_transformer_engine() -> None:
    own = TensorParallel(size=2, backend="userbuffers")
    margins = [("NVTE_FWD_LAYERNORM_SM_MARGIN", "16"), ("NVTE_BWD_LAYERNORM_SM_MARGIN", "16")]
    assert [(s.variable, s.value) for s in settings_for(OverlapConfig(tensor_parallel=own), None)] == margins
    found = settings_for(OverlapConfig(tensor_parallel=own), 9)
    assert [(s.variable, s.value) for s in found] == [("CUDA_DEVICE_MAX_CONNECTIONS", "1"), *margins]
    assert settings_for(OverlapConfig(tensor_parallel=own, overlap="off"), 9) == []


def test_a_pipeline_wants_many_queues_and_comes_first() -> None:
    """With one, what is launched after two receives waits for the first of them: it stands still on the device."""
    config = OverlapConfig(tensor_parallel=TensorParallel(size=2), pipeline_parallel=PipelineParallel(size=2))
    assert [s.value for s in settings_for(config, 9)] == ["32", "1"]
    assert [s.value for s in settings_for(OverlapConfig(pipeline_parallel=PipelineParallel(size=2), overlap="off"), 9)] == []


def test_what_is_set_stays_and_the_first_mode_counts() -> None:
    environ = {"A": "user's", "B": "1"}
    settings = [Setting("A", "1", "x"), Setting("B", "1", "x"), Setting("C", "1", "x"), Setting("C", "32", "y")]
    said = apply(settings, environ, started=False)
    assert environ == {"A": "user's", "B": "1", "C": "1"}
    assert [line.split(": ", 1)[1] for line in said] == [
        "not set, because it is user's already",
        "already set",
        "set",
        "not set, because it is 1 already",
    ]
    assert apply([Setting("D", "1", "x")], environ, started=True) == [
        "D=1 (x): not set, because CUDA has started. Set it in the shell"
    ]
    assert "D" not in environ


@pytest.mark.parametrize(("told", "major"), [("9.0\n9.0\n", 9), ("", None), ("no devices", None)])
def test_the_driver_is_asked(told: str, major: int | None) -> None:
    with mock.patch.object(subprocess, "run", return_value=mock.Mock(stdout=told)):
        assert capability() == major
    with mock.patch.object(subprocess, "run", side_effect=FileNotFoundError):
        assert capability() is None


@pytest.mark.parametrize(("kind", "value"), [("cuda", "1"), ("cpu", None)])
def test_the_launcher_sets_it_for_cuda_only(monkeypatch: Any, kind: str, value: str | None) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    strategy = OverlapStrategy(tensor_parallel=2, parallel_devices=[torch.device(kind, 0), torch.device(kind, 1)])
    strategy.cluster_environment = mock.Mock(local_rank=lambda: 0, creates_processes_externally=True)
    with mock.patch.object(environment, "capability", return_value=9):
        strategy._configure_launcher()
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == value


@pytest.mark.parametrize("backend", ["symm_mem", "userbuffers"])
def test_the_launcher_knows_the_device_and_the_precision(monkeypatch: Any, backend: Any) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(metadata, "version", lambda package: "2.20")
    own = TensorParallel(size=2, backend=backend)
    strategy = OverlapStrategy(tensor_parallel=own, parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)])
    strategy.cluster_environment = mock.Mock(local_rank=lambda: 0, creates_processes_externally=True)
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cuda")
    with mock.patch.object(environment, "capability", return_value=10):
        strategy._configure_launcher()
