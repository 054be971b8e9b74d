"""Short runs of the user's own training, all from the same weights and on the same data."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.strategy.strategy import OverlapStrategy

TRAINING = (BaseFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging)


class Runs:
    """Trains the user's module for a few steps, many times.

    Args:
        model: the module; copies of it are trained.
        datamodule: its data, where the module has none of its own.
        strategy: has the configuration; this object does not train.
        trainer: the user's arguments of Trainer. Runs have no loggers, checkpoints and validation, and of Lightning's callbacks only
            the four that take part in training.
    """

    def __init__(
        self, model: LightningModule, datamodule: LightningDataModule | None, strategy: OverlapStrategy, trainer: dict[str, Any]
    ) -> None:
        self.model = model
        self.strategy = strategy
        self._datamodule = datamodule
        self._trainer = training_arguments(trainer)
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))

    def ours(self, **changes: Any) -> OverlapStrategy:
        """Returns a strategy with the user's ``OverlapConfig``, of which some fields are changed."""
        made = OverlapStrategy(process_group_backend=self.strategy.process_group_backend)
        made.config = replace(self.strategy.config, **changes)
        return made

    def fit(
        self,
        strategy: Strategy,
        steps: int,
        callback: Callback | Sequence[Callback],
        module: LightningModule | None = None,
        **trainer: Any,
    ) -> None:
        """Trains ``module``, by default a copy of the user's, for ``steps`` steps, with one more callback or several."""
        module = copy.deepcopy(self.model) if module is None else module
        more = [callback] if isinstance(callback, Callback) else callback
        callbacks = [*(copy.deepcopy(given) for given in self._trainer["callbacks"]), *more]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        length = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        made = {**self._trainer, **quiet, **length, "strategy": strategy, "callbacks": callbacks, **trainer}
        seed_everything(self._seed, workers=True, verbose=False)
        data = {} if "train_dataloaders" not in trainer else {"train_dataloaders": made.pop("train_dataloaders")}
        Trainer(**made).fit(module, **(data or {"datamodule": self._datamodule}))
        for mode in getattr(strategy, "modes", ()):
            mode.close()
        del module, strategy, made
        gc.collect()  # a trainer, its module and its strategy refer to each other


def training_arguments(trainer: dict[str, Any]) -> dict[str, Any]:
    """Returns the user's arguments of Trainer without those that have no part in training."""
    given = trainer.get("callbacks") or []
    callbacks = [each for each in (given if isinstance(given, Sequence) else [given]) if _trains(each)]
    return {**{name: value for name, value in trainer.items() if name not in ("logger", "strategy")}, "callbacks": callbacks}


def check_one_step(before: int, after: int) -> None:
    """Checks that a batch makes no more than one optimizer step, since those who time steps go from batch to batch.

    Args:
        before: number of steps before the batch.
        after: number of steps after it.

    Raises:
        ConfigError: it makes several, as manual optimization may.
    """
    if after > before + 1:
        raise ConfigError(
            f"a batch makes {after - before} optimizer steps, as manual optimization may, but bench, tune and plan --memory time "
            "steps of one or more batches. Measure a fit with OverlapProfiler instead"
        )


def refuse_uncounted(modes: Sequence[OverlapMode]) -> None:
    """Refuses modes that make transfers outside of their groups: no run can do without these, or rehearse them.

    Raises:
        ConfigError: one does.
    """
    if uncounted := next((reason for mode in modes if (reason := mode.uncounted_transfers)), ""):
        raise ConfigError(f"bench, tune and plan --memory need to see all transfers, and {uncounted}. Set that for them")


def without_checks(config: OverlapConfig) -> dict[str, Any]:
    """Returns the fields of a configuration without checks, for runs in which no number is right since nothing is transferred."""
    unchecked = {mode.section: replace(config.of(mode), **mode.unchecked) for mode in config.modes if mode.unchecked}
    return {"verify_first_step": False, **unchecked}


def _trains(callback: Callback) -> bool:
    # Lightning has two package names.
    lightnings = type(callback).__module__.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_overlap")
    return isinstance(callback, TRAINING) or not lightnings
