"""The user's training under any layout: its batch, rehearsal, measurement, and configuration as YAML."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_overlap.bench.measure import TimedRuns
from lightning_overlap.bench.peers import made_by_all
from lightning_overlap.bench.runs import Runs
from lightning_overlap.messages import only_warnings
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tune.layouts import Batch, Layout, changes
from lightning_overlap.tune.machine import Machine
from lightning_overlap.tune.rehearsal import Rehearsal
from lightning_overlap.tune.rehearser import Rehearser

Owner = TypeVar("Owner", LightningModule, LightningDataModule)
STEPS, WARMUP = 4, 2
"""Of a measured run: timed steps, and steps before them."""
REHEARSERS = 2
"""The most batches for which processes are kept: each process has a copy of the module."""
OF_DATA, OF_MODEL = "data.init_args.batch_size", "model.init_args.batch_size"
"""Paths of settings of the command."""


class Training:
    """The user's training.

    Args:
        model: the user's module.
        datamodule: its data, where the module has none of its own.
        strategy: has the backend.
        trainer: the user's arguments of Trainer.
    """

    def __init__(
        self, model: LightningModule, datamodule: LightningDataModule | None, strategy: OverlapStrategy, trainer: dict[str, Any]
    ) -> None:
        self._model, self._datamodule, self._strategy, self._trainer = model, datamodule, strategy, trainer
        self._rehearsers: dict[tuple[int | None, int], Rehearser] = {}
        """By batch size and accumulated batches: each has its module and data."""

    def batch(self, data_ranks: int) -> Batch:
        """Returns the batch of a step, as configured for so many data ranks."""
        owner = {OF_DATA: self._datamodule, OF_MODEL: self._model, None: None}[self._batch_setting]
        accumulate = self._trainer.get("accumulate_grad_batches") or 1
        return Batch(getattr(owner, "batch_size", None), data_ranks, accumulate)

    def start(self, batch: Batch) -> None:
        """Makes what rehearses the configured batch. Collective over the world.

        Raises:
            ConfigError: on every rank, if nothing can be rehearsed, since the training cannot be pickled.
        """
        configured = batch.of(batch.ranks)
        self._rehearsers[configured] = made_by_all(lambda: self._rehearser(*configured))

    def rehearse(self, layout: Layout, machine: Machine) -> list[Rehearsal]:
        """Rehearses one rank of each pipeline stage.

        Raises:
            ConfigError: the layout cannot run.
            RehearsalError: the user's step fails.
        """
        batch = layout.batch_size, layout.accumulate
        if batch not in self._rehearsers:
            while len(self._rehearsers) >= REHEARSERS:
                self._rehearsers.pop(next(iter(self._rehearsers))).close()
            self._rehearsers[batch] = self._rehearser(*batch)
        return self._rehearsers[batch].rehearse(layout.config, machine.ranks)

    def close(self) -> None:
        """Ends the processes in which ranks are rehearsed."""
        for rehearser in self._rehearsers.values():
            rehearser.close()
        self._rehearsers.clear()

    def runs(self, layout: Layout) -> Runs:
        """Returns runs of the training under a layout."""
        model, datamodule, trainer = self._with_batch(layout.batch_size, layout.accumulate)
        strategy = OverlapStrategy(process_group_backend=self._strategy.process_group_backend)
        strategy.config = layout.config
        return Runs(model, datamodule, strategy, trainer)

    def measure(self, layout: Layout) -> float:
        """Returns the seconds of a step, measured in one run. Collective over the world."""
        timed = TimedRuns(self.runs(layout), STEPS, WARMUP)
        with only_warnings():
            return timed.run(timed.runs.ours()).seconds

    def recipe(self, layout: Layout, machine: Machine) -> str:
        """Returns a layout as a configuration in YAML, which is read after the user's."""
        modes = {mode.section: changes(layout.config, mode) for mode in layout.config.modes}
        settings: dict[str, Any] = {section: _plain(given) for section, given in modes.items() if given}
        if layout.config.overlap == "off":
            settings["overlap"] = "off"
        trainer: dict[str, Any] = {"strategy": {"class_path": "lightning_overlap.OverlapStrategy", "init_args": settings}}
        if not machine.is_there:
            trainer |= {"devices": machine.ranks_per_host, "num_nodes": machine.hosts}
        if layout.accumulate != (self._trainer.get("accumulate_grad_batches") or 1):
            trainer["accumulate_grad_batches"] = layout.accumulate
        recipe: dict[str, Any] = {"trainer": trainer}
        if layout.batch_size is not None and self._batch_setting is not None:
            section, arguments, name = self._batch_setting.split(".")
            recipe[section] = {arguments: {name: layout.batch_size}}
        return f"# {layout.name}\n{yaml.safe_dump(recipe, sort_keys=False)}"

    def _rehearser(self, batch_size: int | None, accumulate: int) -> Rehearser:
        model, datamodule, trainer = self._with_batch(batch_size, accumulate)
        return Rehearser(model, datamodule, self._strategy, trainer)

    @property
    def _batch_setting(self) -> str | None:
        """The path of ``batch_size`` in the user's configuration; None if neither the data module nor the module has it."""
        for name, owner in ((OF_DATA, self._datamodule), (OF_MODEL, self._model)):
            has_one = isinstance(getattr(owner, "batch_size", None), int)
            if has_one and "batch_size" in inspect.signature(type(owner)).parameters:
                return name
        return None

    def _with_batch(
        self, batch_size: int | None, accumulate: int
    ) -> tuple[LightningModule, LightningDataModule | None, dict[str, Any]]:
        """Returns module, data and arguments of Trainer with a layout's batch."""
        model, datamodule = self._model, self._datamodule
        if batch_size is not None:
            if datamodule is not None and self._batch_setting == OF_DATA:
                datamodule = _with_batch_size(datamodule, batch_size)
            else:
                model = _with_batch_size(model, batch_size)
        return model, datamodule, {**self._trainer, "accumulate_grad_batches": accumulate}


def _with_batch_size(owner: Owner, batch_size: int) -> Owner:
    """Returns a shallow copy of a module or data module with another ``batch_size``, also in its hyperparameters."""
    copied = copy.copy(owner)
    setattr(copied, "batch_size", batch_size)  # noqa: B010  # an attribute of the user's class
    if "batch_size" in owner.hparams:
        hparams = copy.copy(owner.hparams)
        hparams["batch_size"] = batch_size
        vars(copied).update({name: hparams for name, value in vars(owner).items() if value is owner.hparams})
    return copied


def _plain(value: Any) -> Any:
    """Returns a setting's value as YAML has it."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
