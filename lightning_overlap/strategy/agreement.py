"""Checks, when a fit is set up, that all ranks have the same Trainer, model and optimizers."""

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
from lightning_overlap.model.trees import is_container, items
from lightning_overlap.ranks.world import all_gather_objects, world_size

ARGUMENTS = (
    *("accumulate_grad_batches", "max_epochs", "min_epochs", "max_steps", "min_steps", "fast_dev_run", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("reload_dataloaders_every_n_epochs", "gradient_clip_val", "gradient_clip_algorithm"),
)
"""Arguments of the Trainer that decide when ranks communicate."""
COLLECTIVE_CALLBACKS = (
    *(BaseFinetuning, BatchSizeFinder, Checkpoint, EarlyStopping, GradientAccumulationScheduler, LearningRateFinder),
    *(StochasticWeightAveraging, Timer, WeightAveraging),
)
"""Callbacks in which all ranks communicate. Others (a progress bar, a callback on one rank) may differ."""
RANK_ZERO_ARGUMENTS = ("dirpath", "filename", "verbose")
"""Arguments of these callbacks that only rank 0 uses."""


Description = str | tuple[str, ...]
"""What one phrase names: a value, or names in their order."""


def describe_settings(settings: Any, name: str = "") -> dict[str, Description]:
    """Describes each value in nested dataclasses, mappings and tuples, by its path: ``pipeline_parallel.microbatches``.

    Of a mapping also the order, since the last pattern that fits may decide.
    """
    if not is_container(settings) or not items(settings):
        return {name: repr(settings)}
    words: dict[str, Description] = {}
    if isinstance(settings, Mapping):
        words[f"the order of {name}"] = tuple(map(str, settings))
    for key, value in items(settings):
        words |= describe_settings(value, f"{name}.{key}" if name else key)
    return words


def describe_trainer(trainer: Trainer) -> dict[str, Description]:
    """Describes the Trainer's :data:`ARGUMENTS` and :data:`COLLECTIVE_CALLBACKS`, by a phrase for each."""
    words: dict[str, Description] = {f"the Trainer's {name}": repr(getattr(trainer, name)) for name in ARGUMENTS}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, COLLECTIVE_CALLBACKS):
            name = type(callback).__name__
            number = sum(key.startswith(f"the callback {name} ") for key in words) + 1
            words[f"the callback {name} ({number})"] = _arguments(callback)
    return words


def _arguments(callback: Callback) -> str:
    """Describes a callback's constructor arguments, those that it keeps as attributes and that are plain values."""
    names = {name: None for kind in type(callback).__mro__[:-1] for name in inspect.signature(kind).parameters}
    kept = {name: getattr(callback, name, getattr(callback, f"_{name}", inspect)) for name in names if name not in RANK_ZERO_ARGUMENTS}
    plain: dict[str, Any] = {n: v for n, v in kept.items() if v is None or isinstance(v, bool | int | float | str | timedelta)}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def describe_model(module: nn.Module) -> dict[str, Description]:
    """Describes shapes and dtypes of parameters and buffers, and the order of registration, by a phrase for each."""
    words = {f"parameter {n}": f"{tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}" for n, p in module.named_parameters()}
    words |= {f"buffer {name}": f"{tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()}
    return {**words, "the order of parameters and buffers": tuple(words)}


def describe_optimizers(optimizers: Sequence[Optimizer], module: nn.Module) -> dict[str, Description]:
    """Describes optimizers' classes, the settings of their groups, and the parameters of each group in order, by a phrase for each."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    words: dict[str, Description] = {"the number of optimizers": str(len(optimizers))}
    for number, optimizer in enumerate(optimizers):
        words[f"the class of optimizer {number}"] = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            where = f"group {index} of optimizer {number}"
            words |= {f"{key} in {where}": _value(value) for key, value in group.items() if key not in ("params", "param_names")}
            held = tuple(names.get(id(parameter), "a parameter outside the module") for parameter in group["params"])
            words[f"the parameters in {where}"] = held
    return words


def refuse_differences(mine: Mapping[str, Description]) -> None:
    """Compares descriptions between ranks. Collective.

    Args:
        mine: this rank's descriptions, by the phrase that names each in the error.

    Raises:
        ConfigError: on every rank, with the first difference.
    """
    # Digests first, because descriptions grow with the model, and every rank would send them to every other.
    if world_size() == 1 or len(set(all_gather_objects(_digest(f"{key}: {value}" for key, value in sorted(mine.items()))))) == 1:
        return
    everyone = all_gather_objects(mine)
    for rank, other in enumerate(everyone):
        for subject in sorted({**everyone[0], **other}, key=_is_order):
            first, second = everyone[0].get(subject, "absent"), other.get(subject, "absent")
            if first != second:
                raise ConfigError(
                    f"ranks disagree about {subject}: {_difference(first, second, rank)}. "
                    "Start the same script with the same arguments and packages on every rank."
                )


def _is_order(subject: str) -> bool:
    """Whether a phrase is of an order, which also differs where a name is missing: that says more."""
    return subject.startswith("the order of ")


def _difference(first: Description, second: Description, rank: int) -> str:
    """Tells how a rank's description differs from that of rank 0; of names, only where they begin to differ."""
    if isinstance(first, str) or isinstance(second, str):
        return f"rank 0 has {first}, rank {rank} has {second}"
    index = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    name, other = (names[index] if index < len(names) else "no more" for names in (first, second))
    return f"rank 0 has {name} at {index} (of {len(first)}), rank {rank} has {other} (of {len(second)})"


def _value(value: Any) -> str:
    """Describes a setting without devices and addresses, which differ between ranks."""
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value) if isinstance(value, bool | int | float | complex | str | None) else type(value).__qualname__


def _digest(words: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
