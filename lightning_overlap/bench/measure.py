"""Times the user's own training step: overlapped, plain, compute alone, communication alone, and under peers.

Every figure is a run of the same module, from the same weights, on the same data, through Trainer. The runs are
interleaved, so that a machine that drifts favours none.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from lightning_overlap.bench.peers import peers as all_peers
from lightning_overlap.bench.runs import Runs
from lightning_overlap.bench.skip import Skipped, skip_transfers
from lightning_overlap.decision import ConfigError
from lightning_overlap.profiling.callback import groups_of
from lightning_overlap.strategy import OverlapStrategy


@dataclass
class Row:
    """Seconds a step under one strategy: one figure for each repeat."""

    name: str
    seconds: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    """Seconds a step in which this rank did nothing but wait for a transfer (overlapped and plain)."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass
class Measured:
    """All rows of one benchmark."""

    rows: list[Row]
    ranks: int
    steps: int
    doubts: list[str]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def limit(self) -> float:
        """What no schedule can beat: the longer of compute alone and communication alone, in seconds."""
        return max(self.row("compute").median, self.row("communication").median)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "limit": self.limit, "medians": {row.name: row.median for row in self.rows}}

    def table(self) -> str:
        """The table as text; times in milliseconds."""
        lines = [f"{'':34}{'ms a step':>10}{'spread':>8}{'exposed':>9}{'x limit':>9}{'overlapped is':>15}"]
        ours = self.row("overlapped").median
        for row in self.rows:
            exposed = f"{statistics.median(row.exposed) * 1e3:.0f}" if row.exposed else ""
            gain = "" if row.name in ("overlapped", "compute", "communication") else f"{row.median / ours:.2f} x"
            lines.append(f"{row.name:34}{row.median * 1e3:10.0f}{row.spread:8.0%}{exposed:>9}{row.median / self.limit:9.2f}{gain:>15}")
        lines.append(f"{'limit = max(compute, communication)':34}{self.limit * 1e3:9.0f}")
        runs = f"{self.ranks} ranks, medians of {len(self.rows[0].seconds)} runs of {self.steps} steps"
        lines.append(f"efficiency {self.limit / ours:.0%}; {runs}")
        return "\n".join(lines + [f"doubtful: {doubt}" for doubt in self.doubts])


class _Clock(Callback):
    """Times the steps after ``warmup``; with ``skip``, without transfers, which are then replayed and timed too."""

    def __init__(self, warmup: int, steps: int, *, skip: bool = False) -> None:
        self.warmup, self.steps, self.skip = warmup, steps, skip
        self.seconds = self.exposed = self.communication = 0.0
        self._skipped: list[Skipped] = []
        self._first = (0.0, 0.0)
        self._step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for mode in trainer.strategy.modes if self.skip else ():  # type: ignore[attr-defined]
            self._skipped += skip_transfers(mode)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # another batch of the same accumulation window
        self._step = trainer.global_step
        for stand_in in self._skipped:
            stand_in.calls.clear()
        # From the start of a step to that of a later one, in full swing: what is in flight at either is alike.
        if self._step in (self.warmup, self.warmup + self.steps):
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            groups = [g for mode in getattr(trainer.strategy, "modes", ()) for g in groups_of(mode).values()]
            now, exposed = time.perf_counter(), sum(g.exposed for g in groups)
            if self._step == self.warmup:
                self._first = now, exposed
            else:
                self.seconds, self.exposed = (now - self._first[0]) / self.steps, (exposed - self._first[1]) / self.steps

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.seconds:
            raise ConfigError(f"the data ended before {self.warmup} + {self.steps} + 1 steps: ask for fewer --steps")
        if self._skipped:
            for stand_in in self._skipped:
                stand_in.stop()  # what follows belongs to no step
            self._meet(trainer)
            start = time.perf_counter()
            for _ in range(self.steps):
                for stand_in in self._skipped:
                    stand_in.replay()
            self._meet(trainer)
            self.communication = (time.perf_counter() - start) / self.steps

    @staticmethod
    def _meet(trainer: Trainer) -> None:
        """All work of all ranks is done."""
        for mode in getattr(trainer.strategy, "modes", ()):
            mode.sync_parameters()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        trainer.strategy.barrier()


def measure(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    strategy: OverlapStrategy,
    trainer: dict[str, Any],
    *,
    steps: int,
    warmup: int,
    repeats: int,
    with_peers: bool,
) -> Measured:
    """Runs everything, ``repeats`` times.

    Args:
        model: as in :class:`Runs`.
        datamodule: as in :class:`Runs`.
        strategy: as in :class:`Runs`.
        trainer: as in :class:`Runs`.
        steps: timed steps of a run.
        warmup: steps before them.
        repeats: runs of each.
        with_peers: measure the peers too.
    """
    runs = Runs(model, datamodule, strategy, trainer)

    def run(made: Strategy, module: LightningModule | None = None, *, skip: bool = False) -> _Clock:
        clock = _Clock(warmup, steps, skip=skip)
        runs.fit(made, warmup + steps + 1, clock, module)
        return clock

    rows = {name: Row(name) for name in ("overlapped", "plain", "compute", "communication")}
    others = all_peers(strategy._get_process_group_backend(), strategy.world_size) if with_peers else {}
    refused: dict[str, str] = {}
    rows |= {name: Row(name) for name in others}
    for _ in range(repeats):
        for name, changes in (("overlapped", {}), ("plain", {"overlap": "off"})):
            clock = run(runs.ours(**changes))
            rows[name].seconds.append(clock.seconds)
            rows[name].exposed.append(clock.exposed)
        clock = run(runs.ours(), skip=True)
        rows["compute"].seconds.append(clock.seconds)
        rows["communication"].seconds.append(clock.communication)
        for name, (make, prepare) in others.items():
            if name in refused:
                continue
            try:
                rows[name].seconds.append(run(make(), prepare(copy.deepcopy(model))).seconds)
            except Exception as error:  # a peer that cannot train this module costs no figures
                refused[name] = f"{name} is left out: {error}"
    measured = [row for row in rows.values() if row.name not in refused]
    return Measured(measured, strategy.world_size, steps, [*refused.values(), *_doubts(measured, strategy.num_processes)])


def _doubts(rows: list[Row], here: int) -> list[str]:
    """Why the figures may not be trusted."""
    doubts = [f"{row.name} differs by {row.spread:.0%} between runs" for row in rows if row.spread > 0.1]
    cores = len(os.sched_getaffinity(0))
    if here * torch.get_num_threads() > cores:
        doubts.append(f"{here} ranks x {torch.get_num_threads()} threads share {cores} cores: set OMP_NUM_THREADS lower")
    return doubts
