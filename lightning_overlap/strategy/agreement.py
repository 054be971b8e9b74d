"""What ranks must have alike when a fit is set up, in words that are compared between them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.world import all_gather_objects, world_size

ARGUMENTS = (
    *("accumulate_grad_batches", "max_epochs", "min_epochs", "max_steps", "min_steps", "fast_dev_run", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("reload_dataloaders_every_n_epochs", "gradient_clip_val", "gradient_clip_algorithm"),
)
"""Of the Trainer, that decide when ranks meet."""
MEETING = (
    *(BaseFinetuning, BatchSizeFinder, Checkpoint, EarlyStopping, GradientAccumulationScheduler, LearningRateFinder),
    *(StochasticWeightAveraging, Timer, WeightAveraging),
)
"""Callbacks in which all ranks meet. Others (a progress bar, what a user has on one rank) may differ."""
PLACES = ("dirpath", "filename", "verbose")
"""Arguments of these in which no rank but the first one's counts."""


def trainer_in_words(trainer: Trainer) -> dict[str, str]:
    """The Trainer's arguments that decide when ranks meet, and its callbacks in which they do."""
    words = {f"the Trainer's {name}": repr(getattr(trainer, name)) for name in ARGUMENTS}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MEETING):
            name = type(callback).__name__
            number = sum(key.startswith(f"the callback {name} ") for key in words) + 1
            words[f"the callback {name} ({number})"] = _arguments(callback)
    return words


def _arguments(callback: Callback) -> str:
    """What it was made with, as far as that is kept and is a plain value."""
    names = {name: None for kind in type(callback).__mro__[:-1] for name in inspect.signature(kind).parameters}
    kept = {name: getattr(callback, name, getattr(callback, f"_{name}", inspect)) for name in names if name not in PLACES}
    plain: dict[str, Any] = {n: v for n, v in kept.items() if v is None or isinstance(v, bool | int | float | str | timedelta)}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def model_in_words(module: nn.Module) -> dict[str, str]:
    """Shapes and dtypes of parameters and buffers, and the order in which they are registered."""
    words = {f"parameter {n}": f"{tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}" for n, p in module.named_parameters()}
    words |= {f"buffer {name}": f"{tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()}
    return {**words, "the order of parameters and buffers": _digest(words)}


def optimizers_in_words(optimizers: Sequence[Optimizer], module: nn.Module) -> dict[str, str]:
    """Classes, parameter groups and their settings (learning rates, ...), and which parameters each group has, in which order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    words = {"the number of optimizers": str(len(optimizers))}
    for number, optimizer in enumerate(optimizers):
        words[f"the class of optimizer {number}"] = type(optimizer).__name__
        for place, group in enumerate(optimizer.param_groups):
            where = f"group {place} of optimizer {number}"
            words |= {f"{key} in {where}": _value(value) for key, value in group.items() if key not in ("params", "param_names")}
            held = [names.get(id(parameter), "not the module's") for parameter in group["params"]]
            words[f"the parameters in {where}"] = f"{len(held)} ({', '.join(held[:3])}, ...; digest {_digest(held)})"
    return words


def refuse_differences(mine: Mapping[str, str]) -> None:
    """Compares what ranks say of themselves. Collective.

    Args:
        mine: what this rank has, by a phrase that names it in the error.

    Raises:
        ConfigError: on every rank, naming the first thing that differs.
    """
    # A digest first: what is to be compared grows with the model, and all ranks would send it to all.
    if world_size() == 1 or len(set(all_gather_objects(_digest(f"{key}: {value}" for key, value in mine.items())))) == 1:
        return
    everyone = all_gather_objects(dict(mine))
    for rank, other in enumerate(everyone):
        for subject in {**everyone[0], **other}:
            first, second = everyone[0].get(subject, "absent"), other.get(subject, "absent")
            if first != second:
                raise ConfigError(
                    f"ranks disagree about {subject}: rank 0 has {first}, rank {rank} has {second}. "
                    "Start the same script with the same arguments and packages on every rank."
                )


def _value(value: Any) -> str:
    """A setting in words that do not depend on devices and addresses."""
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value) if isinstance(value, bool | int | float | complex | str | None) else type(value).__qualname__


def _digest(words: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
