"""Trains a model of the zoo inside a world's workers, and compares it with a plain process."""

from __future__ import annotations

import logging
import math
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_overlap import ConfigError, OverlapStrategy
from tests.zoo.case import BATCH, HAVE_OTHER_SAMPLES, LAYOUTS, MICROBATCHES, STEPS, Model
from tests.zoo.models import MODELS

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
TIMEOUT = timedelta(seconds=15)
SAME_LOSS, SAME_WEIGHT = 1e-5, 2e-3
"""Relative difference of losses, and of a weight relative to its own update, that rounding may make."""


@dataclass
class Result:
    """The numbers of a fit."""

    losses: list[float]
    val_loss: float
    state: dict[str, Tensor]
    initial: dict[str, Tensor]


@dataclass
class Report:
    """What one rank tells of a run.

    Attributes:
        error: a ``ConfigError``'s sentence.
        crash: any other error, with the last lines of its traceback.
        steps: how many were done.
        losses: of each step, and of the validation.
        expected: the same of each reference.
        wrong: by reference, the tensors that are not its own: their names and how far they are off, the worst first.
        words: warnings and the plan.
        digest: of the final weights, to compare ranks.
    """

    error: str = ""
    crash: str = ""
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    expected: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    words: str = ""
    digest: str = ""


class Recorder(Callback):
    """Keeps each step's loss as Lightning has it, which is of the whole batch under every strategy but data parallelism."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(outputs["loss"]))


def loaders(model: Model, data: str, replicas: int, rank: int) -> tuple[DataLoader, DataLoader]:
    """For training and validation; all replicas together read what one process reads, batch by batch."""
    samples = model.data[data]()
    made = []
    for part in (samples[: STEPS * BATCH], samples[STEPS * BATCH :]):
        sampler = DistributedSampler(part, replicas, rank, shuffle=False)  # type: ignore[arg-type]
        made.append(DataLoader(part, batch_size=BATCH // replicas, sampler=sampler, collate_fn=model.collate))  # type: ignore[arg-type]
    return made[0], made[1]


def fit(model: Model, data: str, strategy: Any, recorder: Recorder, *, devices: int = 1, replicas: int = 1) -> Result:
    seed_everything(5, verbose=False)
    module = model.make()
    initial = {name: value.detach().clone() for name, value in module.state_dict().items()}
    length: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, callbacks=[recorder], log_every_n_steps=1, **QUIET, **length
    )  # type: ignore[arg-type]
    seed_everything(6, verbose=False)
    trainer.fit(module, *loaders(model, data, replicas, dist.get_rank() if replicas > 1 else 0))
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Result(recorder.losses, float(trainer.callback_metrics["val_loss"]), state, initial)


@lru_cache(maxsize=2)
def whole(name: str, data: str) -> Result:
    """One process on the whole batch."""
    return fit(MODELS[name], data, SingleDeviceStrategy(torch.device("cpu")), Recorder())


@lru_cache(maxsize=2)
def ddp(name: str, data: str) -> Result:
    """Lightning's own data parallelism. Collective."""
    recorder = Recorder()
    environment = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo", "timeout": TIMEOUT}
    result = fit(MODELS[name], data, DDPStrategy(find_unused_parameters=True, **environment), recorder, devices=2, replicas=2)  # type: ignore[arg-type]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, result.losses)
    result.losses = [sum(losses) / 2 for losses in zip(*everyone, strict=True)]
    return result


@lru_cache(maxsize=2)
def microbatched(name: str, data: str) -> Result:
    """One process that goes through the microbatches of each batch, without Lightning's Trainer and without this package."""
    model = MODELS[name]
    seed_everything(5, verbose=False)
    module: Any = model.make()
    initial = {key: value.detach().clone() for key, value in module.state_dict().items()}
    module.log = lambda *_, **__: None
    optimizer = module.configure_optimizers()
    samples, size = model.data[data](), BATCH // MICROBATCHES
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(0.0)
        for start in range(step * BATCH, (step + 1) * BATCH, size):
            share = module.training_step(model.collate(samples[start : start + size]), step) / MICROBATCHES
            share.backward()
            losses[-1] += share.item()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        val_loss = float(module.validation_step(model.collate(samples[STEPS * BATCH :]), 0))
    return Result(losses, val_loss, {key: value.detach().clone() for key, value in module.state_dict().items()}, initial)


REFERENCES = {"one process": whole, "DDP": ddp, "microbatches in one process": microbatched}


def differing(found: Result, expected: Result) -> list[tuple[str, float]]:
    """Entries of the state that are not the reference's, and how far they are off relative to their update; the worst first."""
    if found.state.keys() != expected.state.keys():
        return [(f"keys {sorted(found.state.keys() ^ expected.state.keys())}", math.inf)]
    wrong = []
    for name, reference in expected.state.items():
        value = found.state[name]
        if value.shape != reference.shape:
            wrong.append((f"{name}: shape {tuple(value.shape)}", math.inf))
        elif not reference.is_floating_point() and not reference.is_complex():
            if not value.equal(reference):
                wrong.append((name, math.inf))
        else:
            error, update = (value - reference).norm().item(), (reference - expected.initial[name]).norm().item()
            # Rounding alone: the gradient of a key's bias is zero, say.
            rounding = 3e-7 * reference.norm().item() + 1e-7 * math.sqrt(reference.numel())
            if not error <= SAME_WEIGHT * update + rounding:
                wrong.append((name, error / update if update else math.inf))
    return sorted(wrong, key=lambda each: (not math.isnan(each[1]), -each[1]))


def run(name: str, data: str, layout: str, references: Iterable[str]) -> Report:
    """Trains as one rank of two, and compares with each of the references."""
    model, report, recorder = MODELS[name], Report(), Recorder()
    settings = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo", "timeout": TIMEOUT}
    replicas = 2 if layout.startswith(HAVE_OTHER_SAMPLES) else 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = {kind: REFERENCES[kind](name, data) for kind in references}
        plan = "no plan"
        caught.clear()
        try:
            strategy = OverlapStrategy(**LAYOUTS[layout], parallel_plan=dict(model.plan or {}), **settings)  # type: ignore[arg-type]
            found = fit(model, data, strategy, recorder, devices=2, replicas=replicas)
            plan = " ".join(strategy.plan.explain().split())  # as sentences, not as a table
        except ConfigError as error:
            report.error = str(error)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            report.crash = f"{type(error).__name__}: {str(error)[:300]} ({last.filename.rpartition('/')[2]}:{last.lineno})"
    report.steps = len(recorder.losses)
    if not report.error and not report.crash:
        report.losses = [*found.losses, found.val_loss]
        report.digest = repr([value.double().sum().item() for value in found.state.values() if not value.is_complex()])
        for kind, reference in expected.items():
            report.expected[kind] = [*reference.losses, reference.val_loss]
            report.wrong[kind] = differing(found, reference)[:3]
    report.words = "\n".join([plan, *(str(each.message) for each in caught)])
    return report
