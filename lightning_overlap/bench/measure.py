"""Times the user's training step: overlapped, without overlap, without transfers, transfers alone, and under other strategies.

Every figure is a run of the same module, from the same weights, on the same data, through Trainer. The runs are interleaved, so that a
machine whose speed drifts favours none of them.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from lightning_overlap.bench.advice import advise
from lightning_overlap.bench.on_paper import OnPaper, on_paper
from lightning_overlap.bench.peers import Peer, find_peers, made_by_all
from lightning_overlap.bench.rows import Row
from lightning_overlap.bench.runs import Runs, check_one_step, refuse_uncounted, without_checks
from lightning_overlap.bench.skip import Skipped, skip_transfers
from lightning_overlap.decision import ConfigError
from lightning_overlap.profiling.callback import OverlapProfiler
from lightning_overlap.profiling.trace import Step
from lightning_overlap.profiling.usage import memory_in_use
from lightning_overlap.ranks.clock import Clock, DeviceClock, Timeline
from lightning_overlap.ranks.group import Transfer
from lightning_overlap.ranks.world import all_gather_objects
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tables import as_text

_Figures = tuple[float, int, dict[str, float] | None]
RECORDED = 3
"""Steps of which the one of middle length is drawn."""


@dataclass
class Measured:
    """All rows of one benchmark."""

    rows: list[Row]
    ranks: int
    steps: int
    doubts: list[str]
    advice: str = ""
    modes: dict[str, list[float]] = field(default_factory=dict)
    """By mode, seconds a step of its transfers alone: one figure for each repeat."""
    plan: str = ""
    """The plan of the overlapped runs, as text."""
    on_paper: OnPaper | None = None
    """The simulated schedule, if a mode runs steps in parts on several ranks."""

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def limit(self) -> float:
        """The time of the best possible overlap: the longer of compute alone and communication alone, in seconds."""
        return max(self.row("compute").median, self.row("communication").median)

    def efficiency(self, mode: str) -> float:
        """Returns a mode's limit divided by the time of a step without the waits for other modes' transfers."""
        ours, compute = self.row("overlapped"), self.row("compute").median
        others = ours.waited() - ours.waited(mode)
        return max(compute, statistics.median(self.modes[mode])) / (ours.median - others)

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures, for JSON."""
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
    """Times the steps after ``warmup``; with ``skip``, steps without transfers, and then the transfers alone."""

    def __init__(self, warmup: int, steps: int, *, skip: bool = False) -> None:
        self.warmup, self.steps, self.skip = warmup, steps, skip
        self.seconds = 0.0
        self.memory = 0
        self.logs = False
        """Whether transfers are logged."""
        self.waits: dict[str, float] = {}
        """Seconds a step of the waits for each kind of transfer."""
        self.communication: dict[str, float] = {}
        """Seconds a step of the transfers alone, by mode; of all modes under an empty name."""
        self.work: list[tuple[str, float, float]] = []
        """The modes' spans of compute in all timed steps: name, start, end."""
        self._skipped: dict[str, list[Skipped]] = {}
        self._log: list[Transfer] = []
        self._begun = 0.0
        self._step = -1

    @property
    def figures(self) -> _Figures:
        """The arguments of :meth:`Row.add`."""
        return self.seconds, self.memory, self.waits if self.logs else None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._modes = getattr(trainer.strategy, "modes", ())
        self._on_device = trainer.strategy.root_device.type == "cuda"
        self._clock = DeviceClock() if self._on_device else Clock()
        self._skipped = {mode.name: skip_transfers(mode) for mode in self._modes if self.skip}
        if self.skip and isinstance(trainer.strategy, OverlapStrategy):
            trainer.strategy.stop_comparing()
        self.logs = bool(self._modes) and not self.skip

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return  # another batch of the same accumulation window
        self._step = trainer.global_step
        for stand_in in chain(*self._skipped.values()):
            stand_in.calls.clear()
        # From the start of one step to the start of a later one, so that the same transfers are under way at both.
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

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        check_one_step(self._step, trainer.global_step)

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
            raise ConfigError(f"the data ended before {self.warmup} + {self.steps} + 1 steps. Set fewer --steps")
        # Without transfers no rank waits for another one, and a step takes as long as that of the rank with the most work.
        self.seconds = max(all_gather_objects(self.seconds))
        for stand_in in chain(*self._skipped.values()):
            stand_in.stop()  # later transfers belong to no step
        if self._skipped:
            self.communication[""] = self._replay(trainer, list(chain(*self._skipped.values())))
        for name, of_mode in self._skipped.items():
            alone = len(self._skipped) == 1
            self.communication[name] = self.communication[""] if alone else self._replay(trainer, of_mode)

    def _replay(self, trainer: Trainer, skipped: Sequence[Skipped]) -> float:
        self._synchronize(trainer)
        start = time.perf_counter()
        for _ in range(self.steps):
            for pending in [pending for stand_in in skipped for pending in stand_in.post()]:
                pending.wait()
        self._synchronize(trainer)
        return (time.perf_counter() - start) / self.steps

    @staticmethod
    def _synchronize(trainer: Trainer) -> None:
        """Waits for the work of all ranks."""
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
    """Runs all rows of a benchmark, ``repeats`` times.

    Args:
        model: as in :class:`Runs`.
        datamodule: as in :class:`Runs`.
        strategy: as in :class:`Runs`.
        trainer: as in :class:`Runs`.
        steps: timed steps of a run.
        warmup: steps before them.
        repeats: runs of each row.
        with_peers: measure the peers, too.

    Raises:
        ConfigError: the configuration cannot run, or its steps or transfers cannot be measured.
    """
    config = strategy.config
    timed = TimedRuns(Runs(model, datamodule, strategy, trainer), steps, warmup)
    rows = {name: Row(name) for name in ("overlapped", "plain", "compute", "communication")}
    peers = _Peers(timed, model)
    alone: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats):
        overlapped = timed.runs.ours()
        rows["overlapped"].add(*timed.run(overlapped).figures)
        refuse_uncounted(overlapped.modes)
        rows["plain"].add(*timed.run(timed.runs.ours(overlap="off")).figures)
        clock = timed.run(timed.runs.ours(**without_checks(config)), skip=True)
        rows["compute"].add(*clock.figures)
        for name, seconds in clock.communication.items():
            (alone[name] if name else rows["communication"].seconds).append(seconds)
        if with_peers and repeat == 0:
            peers.makers = find_peers(overlapped.plan, config, strategy.backend_name)
        peers.measure()
    measured = [*rows.values(), *peers.rows.values()]
    doubts = [*peers.refused.values(), *_doubts(measured, strategy.num_processes)]
    simulation = _simulated(overlapped, clock.work, rows["compute"].median, alone, steps)
    return Measured(
        measured, strategy.world_size, steps, doubts, advise(rows, config), dict(alone), overlapped.plan.explain(), simulation
    )


@dataclass
class TimedRuns:
    """Runs with a clock.

    Attributes:
        runs: the training.
        steps: timed steps of a run.
        warmup: steps before them.
    """

    runs: Runs
    steps: int
    warmup: int

    def run(self, strategy: Strategy, module: LightningModule | None = None, *, skip: bool = False) -> _Clock:
        """Trains under a strategy and returns the clock; ``skip``: without transfers."""
        clock = _Clock(self.warmup, self.steps, skip=skip)
        self.runs.fit(strategy, self.warmup + self.steps + 1, clock, module)
        return clock


class _Peers:
    """Measures the peers. A peer that cannot train the module is left out.

    Attributes:
        makers: the peers by name.
        rows: of the peers that can train the module.
        refused: by name, the reason why a peer cannot.
    """

    def __init__(self, timed: TimedRuns, model: LightningModule) -> None:
        self.makers: dict[str, Peer] = {}
        self.rows: dict[str, Row] = {}
        self.refused: dict[str, str] = {}
        self._timed = timed
        self._model = model

    def measure(self) -> None:
        """Runs each peer once."""
        for name, (make, prepare) in self.makers.items():
            if name in self.refused:
                continue
            try:
                self.rows.setdefault(name, Row(name)).add(*self._figures(make, prepare))
            except Exception as error:  # of any kind: the other figures are still worth printing
                self.refused[name] = f"{name} is left out: {error}"
                self.rows.pop(name, None)
            gc.collect()  # what a run that has failed holds

    def _figures(self, make: Callable[[], Strategy], prepare: Callable[[LightningModule], LightningModule]) -> _Figures:
        strategy, module = made_by_all(lambda: (make(), prepare(copy.deepcopy(self._model))))
        return self._timed.run(strategy, module).figures


def _simulated(
    strategy: OverlapStrategy, work: Sequence[tuple[str, float, float]], step: float, alone: dict[str, list[float]], steps: int
) -> OnPaper | None:
    """Simulates the schedule of a mode that runs steps in parts on several ranks; for the arguments see :func:`on_paper`."""
    for mode in strategy.config.modes:
        choices = strategy.plan.choices.get(mode.name)
        schedule = None if choices is None else mode.schedule(strategy.config.of(mode), choices)
        if schedule is not None and schedule.ranks > 1:
            return on_paper(schedule, work, step, alone[mode.name], steps)
    return None


def sweep(runs: Runs, setting: str, *, steps: int, warmup: int, repeats: int) -> list[Row]:
    """Times the overlapped step with several values of one setting, interleaved. Returns the fastest first.

    Args:
        runs: the training.
        setting: such as ``data_parallel.bucket_size=100000,400000,auto``, or, of a setting that is a table,
            ``tensor_parallel.methods.row_fprop=pipeline,plain``.
        steps: as in :func:`measure`.
        warmup: as in :func:`measure`.
        repeats: as in :func:`measure`.

    Raises:
        ConfigError: there is no such setting, or a value is invalid.
    """
    path, _, values_text = setting.partition("=")
    mode, name, key, *_ = (*path.split(".", 2), "", "")
    settings = getattr(runs.strategy.config, mode, None)
    names = [f.name for f in fields(settings)] if is_dataclass(settings) else []
    table = getattr(settings, name, None) if name in names else None
    if name not in names or not values_text or isinstance(table, dict) != bool(key):
        raise ConfigError(
            f"--sweep {setting} is not MODE.SETTING=VALUE,VALUE,... with a setting of the mode ({', '.join(names) or path}), nor "
            "MODE.SETTING.KEY=VALUE,VALUE,... for a setting that is a table"
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


class _Recording(OverlapProfiler):
    """Records steps, and prints nothing."""

    def _show(self, trainer: Trainer) -> None:
        """The caller draws the steps."""


def record_steps(runs: Runs, warmup: int) -> dict[str, Sequence[Step]]:
    """Records a step of usual length without overlap, and one with it.

    Args:
        runs: the training.
        warmup: steps before them.

    Returns:
        By row of the benchmark, the records of all ranks, on one clock; empty on other ranks than the first.
    """
    recorded: dict[str, Sequence[Step]] = {}
    for row, changes in (("plain", {"overlap": "off"}), ("overlapped", {})):
        profiler = _Recording(every_n_steps=1, warmup=warmup)
        runs.fit(runs.ours(**changes), warmup + RECORDED, profiler)
        by_length = sorted(profiler.steps, key=lambda step: step[0].end - step[0].start)
        recorded |= {row: by_length[len(by_length) // 2]} if by_length else {}
    return recorded


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
        return value  # auto, for example


def _doubts(rows: list[Row], local_ranks: int) -> list[str]:
    """Lists the reasons why figures may be wrong."""
    doubts = [f"{row.name} differs by {row.spread:.0%} between runs" for row in rows if row.spread > 0.1]
    cores = len(os.sched_getaffinity(0))
    if local_ranks * torch.get_num_threads() > cores:
        doubts.append(f"{local_ranks} ranks x {torch.get_num_threads()} threads share {cores} cores: lower OMP_NUM_THREADS")
    return doubts
