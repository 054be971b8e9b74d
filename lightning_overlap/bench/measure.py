"""Times the user's own training step: overlapped, plain, compute alone, communication alone, and under peers.

Every figure is a run of the same module, from the same weights, on the same data, through Trainer. The runs are
interleaved, so that a machine that drifts favours none.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from lightning_overlap.bench.advice import advise
from lightning_overlap.bench.on_paper import OnPaper, on_paper
from lightning_overlap.bench.peers import Peer, find_peers
from lightning_overlap.bench.rows import Row
from lightning_overlap.bench.runs import Runs
from lightning_overlap.bench.skip import Skipped, skip_transfers
from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.clock import Clock, DeviceClock, Timeline
from lightning_overlap.ranks.group import Transfer
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tables import as_text


@dataclass
class Measured:
    """All rows of one benchmark."""

    rows: list[Row]
    ranks: int
    steps: int
    doubts: list[str]
    advice: str = ""
    modes: dict[str, list[float]] = field(default_factory=dict)
    """By mode that communicates, seconds of its communication alone: one figure for each repeat."""
    plan: str = ""
    """Of the overlapped runs, as text."""
    on_paper: OnPaper | None = None
    """What the schedule takes on paper, if steps are run in parts on several ranks."""

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def limit(self) -> float:
        """What no schedule can beat: the longer of compute alone and communication alone, in seconds."""
        return max(self.row("compute").median, self.row("communication").median)

    def efficiency(self, mode: str) -> float:
        """A mode's limit over the step as it would be if other modes' transfers were not waited for."""
        ours, compute = self.row("overlapped"), self.row("compute").median
        others = ours.waited() - ours.waited(mode)
        return max(compute, statistics.median(self.modes[mode])) / (ours.median - others)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = {row.name: row.median for row in self.rows}
        return {**asdict(self), "limit": self.limit, "medians": medians, "efficiency": {m: self.efficiency(m) for m in self.modes}}

    def table(self) -> str:
        """Formats all rows and figures as text; times in milliseconds."""
        ours = self.row("overlapped").median
        rows = [self._cells(row, ours) for row in self.rows]
        rows.append(("limit = max(compute, communication)", f"{self.limit * 1e3:.0f}", "", "", "", "1.00", ""))
        head = ("", "ms a step", "spread", "exposed", "MB", "x limit", "overlapped is")
        lines = [as_text(head, rows, numbers=True)]
        runs = f"{self.ranks} ranks, medians of {len(self.rows[0].seconds)} runs of {self.steps} steps"
        lines.append(f"efficiency {self.limit / ours:.0%}; {runs}")
        for mode, seconds in self.modes.items() if len(self.modes) > 1 else ():
            alone, waited = statistics.median(seconds), self.row("overlapped").waited(mode)
            lines.append(
                f"{mode}: communication {alone * 1e3:.0f}, waited for {waited * 1e3:.0f}, efficiency {self.efficiency(mode):.0%}"
            )
        if self.on_paper is not None:
            lines.append(self.on_paper.describe(ours))
        return "\n".join([*lines, *[f"doubtful: {doubt}" for doubt in self.doubts], self.advice])

    def _cells(self, row: Row, overlapped: float) -> tuple[str, ...]:
        exposed = f"{row.waited() * 1e3:.0f}" if row.exposed else ""
        gain = "" if row.name in ("overlapped", "compute", "communication") else f"{row.median / overlapped:.2f} x"
        memory = f"{statistics.median(row.memory) / 1e6:.0f}" if row.memory else ""
        return row.name, f"{row.median * 1e3:.0f}", f"{row.spread:.0%}", exposed, memory, f"{row.median / self.limit:.2f}", gain


class _Clock(Callback):
    """Times the steps after ``warmup``; with ``skip``, without transfers, which are then replayed and timed too."""

    def __init__(self, warmup: int, steps: int, *, skip: bool = False) -> None:
        self.warmup, self.steps, self.skip = warmup, steps, skip
        self.seconds = 0.0
        self.memory = 0
        self.logs = False
        """Whether there is a log of transfers."""
        self.waits: dict[str, float] = {}
        """Seconds a step for which a kind of transfer was waited for."""
        self.communication: dict[str, float] = {}
        """Seconds a step of the transfers alone, by mode, and of all under an empty name."""
        self.work: list[tuple[str, float, float]] = []
        """What modes have computed, in all steps."""
        self._skipped: dict[str, list[Skipped]] = {}
        self._log: list[Transfer] = []
        self._begun = 0.0
        self._step = -1

    @property
    def figures(self) -> tuple[float, int, dict[str, float] | None]:
        """What :meth:`Row.add` takes."""
        return self.seconds, self.memory, self.waits if self.logs else None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._modes = getattr(trainer.strategy, "modes", ())
        self._on_device = trainer.strategy.root_device.type == "cuda"
        self._clock = DeviceClock() if self._on_device else Clock()
        self._skipped = {mode.name: skip_transfers(mode) for mode in self._modes if self.skip}
        self.logs = bool(self._modes) and not self.skip

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # another batch of the same accumulation window
        self._step = trainer.global_step
        for stand_in in chain(*self._skipped.values()):
            stand_in.calls.clear()
        # From the start of a step to that of a later one, in full swing: what is in flight at either is alike.
        if self._step == self.warmup:
            if self._on_device:
                torch.cuda.reset_peak_memory_stats()
            self._clock.start()
            timeline = Timeline(self._clock) if self.skip else None
            for mode in self._modes:
                mode.timeline = timeline
                for group in mode.groups if self.logs else ():
                    group.log, group.clock = self._log, self._clock
            self._begun = time.perf_counter()
        elif self._step == self.warmup + self.steps:
            if self._on_device:
                torch.cuda.synchronize()
            self.seconds = (time.perf_counter() - self._begun) / self.steps
            self.memory = memory_in_use(trainer.strategy.root_device)
            self._stop()

    def _stop(self) -> None:
        for mode in self._modes:
            if mode.timeline is not None:
                self.work, mode.timeline = mode.timeline.take() or self.work, None
            for group in mode.groups if self.logs else ():
                group.log = group.clock = None
        for transfer in self._log:
            transfer.read()
            kind, waited = transfer.label.split("[")[0], transfer.waited or (0.0, 0.0)
            self.waits[kind] = self.waits.get(kind, 0.0) + (waited[1] - waited[0]) / self.steps

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.seconds:
            raise ConfigError(f"the data ended before {self.warmup} + {self.steps} + 1 steps: ask for fewer --steps")
        for stand_in in chain(*self._skipped.values()):
            stand_in.stop()  # what follows belongs to no step
        if self._skipped:
            self.communication[""] = self._replay(trainer, list(chain(*self._skipped.values())))
        for name, of_mode in self._skipped.items():
            alone = len(self._skipped) == 1
            self.communication[name] = self.communication[""] if alone else self._replay(trainer, of_mode)

    def _replay(self, trainer: Trainer, skipped: Sequence[Skipped]) -> float:
        self._meet(trainer)
        start = time.perf_counter()
        for _ in range(self.steps):
            for pending in [pending for stand_in in skipped for pending in stand_in.post()]:
                pending.wait()
        self._meet(trainer)
        return (time.perf_counter() - start) / self.steps

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
    """Runs everything, ``repeats`` times; ``model``, ``datamodule``, ``strategy`` and ``trainer`` are those of :class:`Runs`.

    Args:
        model: the module.
        datamodule: its data.
        strategy: the configuration.
        trainer: arguments of Trainer.
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

    config = strategy.config
    # Without transfers no number is right, so nothing is checked.
    unchecked = {mode.section: replace(config.of(mode), **mode.unchecked) for mode in config.modes if mode.unchecked}
    rows = {name: Row(name) for name in ("overlapped", "plain", "compute", "communication")}
    peers: dict[str, Peer] = {}
    refused: dict[str, str] = {}
    alone: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats):
        overlapped = runs.ours()
        rows["overlapped"].add(*run(overlapped).figures)
        rows["plain"].add(*run(runs.ours(overlap="off")).figures)
        clock = run(runs.ours(verify_first_step=False, **unchecked), skip=True)
        rows["compute"].add(*clock.figures)
        for name, seconds in clock.communication.items():
            (alone[name] if name else rows["communication"].seconds).append(seconds)
        if with_peers and repeat == 0:
            peers = find_peers(overlapped.plan, config, strategy.backend_name)
        for name in [name for name in peers if name not in refused]:
            make, prepare = peers[name]
            try:
                rows.setdefault(name, Row(name)).add(*run(make(), prepare(copy.deepcopy(model))).figures)
            except Exception as error:  # a peer that cannot train this module costs no figures
                refused[name] = f"{name} is left out: {error}"
    measured = [row for row in rows.values() if row.name not in refused]
    doubts = [*refused.values(), *_doubts(measured, strategy.num_processes)]
    simulation = _simulated(overlapped, clock.work, rows["compute"].median, alone, steps)
    return Measured(
        measured, strategy.world_size, steps, doubts, advise(rows, config), dict(alone), overlapped.plan.explain(), simulation
    )


def _simulated(
    strategy: OverlapStrategy, work: Sequence[tuple[str, float, float]], step: float, alone: dict[str, list[float]], steps: int
) -> OnPaper | None:
    """What the schedule takes on paper, if a mode runs steps in parts on several ranks; for the arguments see :func:`on_paper`."""
    for mode in strategy.config.modes:
        choices = strategy.plan.choices.get(mode.name)
        schedule = None if choices is None else mode.schedule(strategy.config.of(mode), choices)
        if schedule is not None and schedule.ranks > 1:
            return on_paper(schedule, work, step, alone[mode.name], steps)
    return None


def sweep(runs: Runs, setting: str, *, steps: int, warmup: int, repeats: int) -> list[Row]:
    """Times the overlapped step with each of some values of one setting, interleaved; the fastest comes first.

    Args:
        runs: what to train.
        setting: such as ``data_parallel.bucket_size=100000,400000,auto``, or, of a setting that is a table,
            ``tensor_parallel.methods.row_fprop=pipeline,plain``.
        steps: as in :func:`measure`.
        warmup: as in :func:`measure`.
        repeats: as in :func:`measure`.

    Raises:
        ConfigError: there is no such setting, or it takes no such value.
    """
    path, _, values_text = setting.partition("=")
    mode, name, key, *_ = (*path.split(".", 2), "", "")
    settings = getattr(runs.strategy.config, mode, None)
    names = [f.name for f in fields(settings)] if is_dataclass(settings) else []
    table = getattr(settings, name, None) if name in names else None
    if name not in names or not values_text or isinstance(table, dict) != bool(key):
        raise ConfigError(
            f"--sweep {setting}: it is MODE.SETTING=VALUE,VALUE,... with a setting of the mode: {', '.join(names) or path}; "
            "of one that is a table, MODE.SETTING.KEY=VALUE,VALUE,..."
        )

    def changed(value: Any) -> Any:
        return replace(settings, **{name: {**table, key: value} if isinstance(table, dict) else value})  # type: ignore[type-var]

    values = {value: changed(_parsed(value)) for value in values_text.split(",")}
    rows = {value: Row(f"{path}={value}") for value in values}
    for _ in range(repeats):
        for value, config in values.items():
            clock = _Clock(warmup, steps)
            runs.fit(runs.ours(**{mode: config}), warmup + steps + 1, clock)
            rows[value].add(*clock.figures)
    return sorted(rows.values(), key=lambda row: row.median)


def ranking(rows: list[Row]) -> str:
    """Formats the rows of a sweep as a table; times in milliseconds."""
    cells = [
        (
            row.name,
            f"{row.median * 1e3:.0f}",
            f"{row.spread:.0%}",
            f"{row.waited() * 1e3:.0f}",
            f"{statistics.median(row.memory) / 1e6:.0f}",
        )
        for row in rows
    ]
    return as_text(("", "ms a step", "spread", "exposed", "MB"), cells, numbers=True)


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value  # a word, such as auto


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a CUDA device, else what is resident of this process (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def _doubts(rows: list[Row], local_ranks: int) -> list[str]:
    """Lists the reasons why the figures may not be trusted."""
    doubts = [f"{row.name} differs by {row.spread:.0%} between runs" for row in rows if row.spread > 0.1]
    cores = len(os.sched_getaffinity(0))
    if local_ranks * torch.get_num_threads() > cores:
        doubts.append(f"{local_ranks} ranks x {torch.get_num_threads()} threads share {cores} cores: set OMP_NUM_THREADS lower")
    return doubts
