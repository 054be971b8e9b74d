"""The profiling callback."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.profiling.report import import_plotly, write_report
from lightning_overlap.profiling.trace import BETWEEN, Step, Summary, write_chrome_trace
from lightning_overlap.ranks.clock import Clock, DeviceClock, Timeline
from lightning_overlap.ranks.group import Group, Transfer
from lightning_overlap.ranks.world import make_group

DRAWN = 8
"""The last so many measured steps are drawn; the table and the log know of all."""


class OverlapProfiler(Callback):
    """Tells how much communication was hidden: in the log, in a table at the end of fit, in a report and in a trace.

    Every transfer of :class:`~lightning_overlap.ranks.group.Group` is recorded; nothing is added to a mode. At the trainer's logging
    steps the ranks exchange the records of the steps that were measured since, on one clock. Means over the ranks:

    ``overlap/exposed_ms``: milliseconds a step in which a rank did nothing but wait for the wire.
    ``overlap/late_ms``: in which it waited for a rank that had not come yet.
    ``overlap/core_taken_ms``: in which it waited for nothing and had no core, as transfers have a CPU's (0 on CUDA).
    ``overlap/hidden_percent``: the part of the time with transfers on the wire under which the ranks went on.
    ``overlap/<mode>/exposed_ms`` and ``overlap/<mode>/hidden_percent``: the same for one mode.

    Args:
        every_n_steps: steps from one that is measured to the next.
        warmup: steps before the first one.
        prog_bar: also show ``overlap/exposed_ms`` on the progress bar.
        report: a file for a page that a browser opens without a network: plan, table, bars, timeline of every rank.
        trace: a file for the same steps in Chrome's trace format, which Perfetto opens.

    Attributes:
        summary: of all steps that were measured and exchanged in this fit, on the first rank.

    Raises:
        ConfigError: ``every_n_steps`` or ``warmup`` make no sense; or a report is asked for and plotly is not installed.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        warmup: int = 2,
        prog_bar: bool = False,
        report: str | None = None,
        trace: str | None = None,
    ) -> None:
        if every_n_steps < 1 or warmup < 0:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1, and warmup={warmup} at least 0")
        self._every, self._warmup, self._prog_bar = every_n_steps, warmup, prog_bar
        self._report = None if report is None else Path(report)
        self._trace = None if trace is None else Path(trace)
        if self._report is not None:
            import_plotly()
        self._modes: list[OverlapMode] = []
        self._groups: list[Group] = []
        self._everyone: Group | None = None
        self._log: list[Transfer] = []
        self._clock = Clock()
        self._phases, self._work = Timeline(self._clock), Timeline(self._clock)
        self._open: tuple[int, Any] | None = None  # the step that is measured, and the stamp of its start
        self._phase: tuple[str, Any] = ("", None)
        self._ran: float | None = None  # as Step.ran, and when it was counted last
        self._at: float | None = None
        self._begun = -1
        self._last = 0.0  # when the step before began
        self._measured: list[Step] = []  # on this rank, not exchanged yet
        self.summary = Summary()
        self._drawn: deque[list[Step]] = deque(maxlen=DRAWN)

    # -- a step ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not hasattr(trainer.strategy, "modes"):
            rank_zero_warn("OverlapProfiler knows the transfers of OverlapStrategy only: nothing is measured")
        self._modes = list(getattr(trainer.strategy, "modes", ()))
        self._groups = [group for mode in self._modes for group in mode.groups if group.size > 1]
        self.summary = Summary(remarks={mode.name: mode.remark for mode in self._modes})
        self._measured, self._open, self._begun = [], None, -1
        self._drawn.clear()
        self._log = []
        self._clock = DeviceClock() if trainer.strategy.root_device.type == "cuda" else Clock()
        self._clock.start()
        self._phases, self._work = Timeline(self._clock), Timeline(self._clock)
        for group in self._groups:
            group.log, group.clock = self._log, self._clock
        if self._groups:
            # Not a mode's group: its own transfers must not be measured.
            limit = trainer.strategy.time_limit  # type: ignore[attr-defined]
            self._everyone = make_group([range(trainer.world_size)], "profiler", limit, backend="gloo", gathers=False, threads=False)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self._begun:  # otherwise another batch of the same accumulation window
            self._close()
            self._begun = step
            if self._groups and step >= self._warmup and (step - self._warmup) % self._every == 0:
                self._clock.start()
                self._open = step, self._clock.now()
                self._ran = 0.0
                for mode in self._modes:
                    mode.timeline = self._work
            self._forget(self._last)
            self._last = time.perf_counter()
        self._phase, self._at = ("forward", self._clock.now()), self._clock.ran()

    def _forget(self, before: float) -> None:
        """What is over is no step's any more. What only comes to this rank is over at some time before it was waited for; nobody waits
        for what a pipeline sends."""
        self._log[:] = [t for t in self._log if (t.posted if t.waited is None else t.waited[1] if t.done is None else 0.0) >= before]

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        self._next_phase("backward and step")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._next_phase(BETWEEN)
        if trainer.global_step != self._begun and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._close()
            if (told := self._exchange()) is not None:
                self._log_values(module, told)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def _next_phase(self, name: str) -> None:
        self._count()
        self._phase = (name, self._clock.now() if self._open is None else self._phases.add(*self._phase))

    def _count(self) -> None:
        """What the main thread has run since the last phase began."""
        now = self._clock.ran()
        if now is None or self._at is None:
            self._ran = None
        elif self._phase[0] != BETWEEN and self._ran is not None:
            self._ran += now - self._at
        self._at = now

    def _close(self) -> None:
        if self._open is None:
            return
        self._count()
        (index, start), self._open = self._open, None
        end = self._phases.add(*self._phase)
        for transfer in self._log:
            transfer.read()
        read = self._clock.read
        step = Step(index, read(start), read(end), self._phases.take(), list(self._log), self._work.take(), self._ran)
        self._measured.append(step)
        for mode in self._modes:
            mode.timeline = None

    # -- all ranks ---------------------------------------------------------------------------------------------------

    def _exchange(self) -> Summary | None:
        """What was measured since the last time, on the first rank. Collective."""
        if self._everyone is None:
            return None
        offset = self._everyone.clock_offset()
        mine, self._measured = [step.on_clock(offset) for step in self._measured], []
        everyone = self._everyone.gather_objects(mine)
        steps = [list(step) for step in zip(*everyone, strict=True)]
        if not steps:
            return None
        self._drawn.extend(steps)
        told = Summary()
        for step in steps:
            told.add(step)
        self.summary.merge(told)
        return told

    def _log_values(self, module: LightningModule, told: Summary) -> None:
        together = told.mean()
        module.log("overlap/exposed_ms", together.exposed * 1e3, prog_bar=self._prog_bar, rank_zero_only=True)
        values = {"overlap/late_ms": together.late * 1e3, "overlap/hidden_percent": together.hidden_percent}
        values |= {"overlap/core_taken_ms": told.core_taken * 1e3}
        for mode in told.names:
            own = told.mean(mode)
            values |= {f"overlap/{mode}/exposed_ms": own.exposed * 1e3, f"overlap/{mode}/hidden_percent": own.hidden_percent}
        module.log_dict(values, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()
        for group in self._groups:
            group.log = group.clock = None
        if self._everyone is None:
            return
        self._exchange()
        self._everyone.close()
        self._everyone = None
        if not self.summary.steps:
            rank_zero_info(f"OverlapProfiler: no step was measured (warmup={self._warmup}, every_n_steps={self._every})")
            return
        rank_zero_info(self.summary.table())
        if self._trace is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            write_chrome_trace(list(self._drawn), self._trace)
        if self._report is not None:
            write_report(self.summary.table(), list(self._drawn), trainer.strategy.plan.explain(), self._report)  # type: ignore[attr-defined]
