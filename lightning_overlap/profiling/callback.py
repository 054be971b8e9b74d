"""The profiling callback."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.profiling.report import import_plotly, write_report
from lightning_overlap.profiling.trace import BETWEEN, Step, Summary, write_chrome_trace
from lightning_overlap.ranks.clock import Clock, DeviceClock, Timeline
from lightning_overlap.ranks.group import Group, Transfer
from lightning_overlap.ranks.world import make_group

DRAWN = 8
"""How many of the last measured steps are drawn; the table and the log cover all."""


class OverlapProfiler(Callback):
    """Measures how much communication is hidden: in the log, a table at the end of fit, a report and a trace.

    It records every transfer of :class:`~lightning_overlap.ranks.group.Group`, and adds nothing to a mode. At the trainer's logging
    steps the ranks exchange the records of the steps measured since the last exchange, on one clock. It logs means over the ranks:

    ``overlap/exposed_ms``: milliseconds of a step in which a rank only waited for the wire.
    ``overlap/late_ms``: milliseconds in which it waited for a rank that had not posted its transfer yet.
    ``overlap/core_taken_ms``: milliseconds in which it waited for no transfer and had no core, because transfers used it (0 on CUDA).
    ``overlap/hidden_percent``: the part of the time with transfers on the wire in which the ranks computed.
    ``overlap/<mode>/exposed_ms`` and ``overlap/<mode>/hidden_percent``: the same for one mode.

    Args:
        every_n_steps: steps from one measured step to the next.
        warmup: steps before the first measured step.
        prog_bar: also show ``overlap/exposed_ms`` on the progress bar.
        report: file for a page with plan, table, bars and the timeline of every rank; a browser opens it without a network.
        trace: file for the same steps in Chrome's trace format, which Perfetto opens.

    Attributes:
        summary: on rank 0, of all steps measured and exchanged in this fit.

    Raises:
        ConfigError: ``every_n_steps`` or ``warmup`` is too small; or ``report`` is set and plotly is not installed.
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
        self._open: tuple[int, Any] | None = None  # the step under measurement, and the stamp of its start
        self._phase: tuple[str, Any] = ("", None)
        self._cpu_seconds: float | None = None  # see Step.cpu_seconds
        self._counted_at: float | None = None  # the thread's CPU time at the last count
        self._current = -1  # the number of the current step
        self._previous_start = 0.0  # when the previous step began
        self._measured: list[Step] = []  # on this rank, not exchanged yet
        self.summary = Summary()
        self._drawn: deque[list[Step]] = deque(maxlen=DRAWN)

    # -- a step ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not hasattr(trainer.strategy, "modes"):
            rank_zero_warn("OverlapProfiler measures nothing, because it records transfers of OverlapStrategy only")
        self._modes = list(getattr(trainer.strategy, "modes", ()))
        self._groups = [group for mode in self._modes for group in mode.groups if group.size > 1]
        self.summary = Summary(remarks={mode.name: mode.remark for mode in self._modes})
        self._measured, self._open, self._current = [], None, -1
        self._drawn.clear()
        self._log = []
        self._clock = DeviceClock() if trainer.strategy.root_device.type == "cuda" else Clock()
        self._clock.start()
        self._phases, self._work = Timeline(self._clock), Timeline(self._clock)
        for group in self._groups:
            group.log, group.clock = self._log, self._clock
        if self._groups:
            limit = trainer.strategy.time_limit  # type: ignore[attr-defined]
            self._everyone = make_group([range(trainer.world_size)], "profiler", limit, backend="gloo", gathers=False, threads=False)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self._current:  # otherwise the batch belongs to the same accumulation window
            self._close()
            self._current = step
            if self._groups and step >= self._warmup and (step - self._warmup) % self._every == 0:
                self._clock.start()
                self._open = step, self._clock.now()
                self._cpu_seconds = 0.0
                for mode in self._modes:
                    mode.timeline = self._work
            self._forget(self._previous_start)
            self._previous_start = time.perf_counter()
        self._phase, self._counted_at = ("forward", self._clock.now()), self._clock.ran()

    def _forget(self, before: float) -> None:
        """Drops the transfers that ended before a time, which belong to no later step.

        A transfer without a recorded end ended before its wait; a pipeline does not wait for its sends.
        """
        self._log[:] = [t for t in self._log if (t.posted if t.waited is None else t.waited[1] if t.done is None else 0.0) >= before]

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        self._next_phase("backward and step")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._next_phase(BETWEEN)
        if trainer.global_step != self._current and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._close()
            if (summary := self._exchange()) is not None:
                self._log_values(module, summary)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def _next_phase(self, name: str) -> None:
        self._count()
        self._phase = (name, self._clock.now() if self._open is None else self._phases.add(*self._phase))

    def _count(self) -> None:
        """Counts the CPU time of the main thread since the start of the phase."""
        now = self._clock.ran()
        if now is None or self._counted_at is None:
            self._cpu_seconds = None
        elif self._phase[0] != BETWEEN and self._cpu_seconds is not None:
            self._cpu_seconds += now - self._counted_at
        self._counted_at = now

    def _close(self) -> None:
        if self._open is None:
            return
        self._count()
        (index, start), self._open = self._open, None
        end = self._phases.add(*self._phase)
        for transfer in self._log:
            transfer.read()
        read = self._clock.read
        step = Step(index, read(start), read(end), self._phases.take(), list(self._log), self._work.take(), self._cpu_seconds)
        self._measured.append(step)
        for mode in self._modes:
            mode.timeline = None

    # -- all ranks ---------------------------------------------------------------------------------------------------

    def _exchange(self) -> Summary | None:
        """Gathers the steps measured since the last exchange. Returns their summary on rank 0, if there are any. Collective."""
        if self._everyone is None:
            return None
        offset = self._everyone.clock_offset()
        mine, self._measured = [step.on_clock(offset) for step in self._measured], []
        everyone = self._everyone.gather_objects(mine)
        steps = [list(step) for step in zip(*everyone, strict=True)]
        if not steps:
            return None
        self._drawn.extend(steps)
        summary = Summary()
        for step in steps:
            summary.add(step)
        self.summary.merge(summary)
        return summary

    def _log_values(self, module: LightningModule, summary: Summary) -> None:
        together = summary.mean()
        module.log("overlap/exposed_ms", together.exposed * 1e3, prog_bar=self._prog_bar, rank_zero_only=True)
        values = {"overlap/late_ms": together.late * 1e3, "overlap/hidden_percent": together.hidden_percent}
        values |= {"overlap/core_taken_ms": summary.core_taken * 1e3}
        for mode in summary.names:
            mean = summary.mean(mode)
            values |= {f"overlap/{mode}/exposed_ms": mean.exposed * 1e3, f"overlap/{mode}/hidden_percent": mean.hidden_percent}
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
            log_on_rank_zero(f"OverlapProfiler: no step was measured (warmup={self._warmup}, every_n_steps={self._every})")
            return
        log_on_rank_zero(self.summary.table())
        if self._trace is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            write_chrome_trace(list(self._drawn), self._trace)
        if self._report is not None:
            write_report(self.summary.table(), list(self._drawn), trainer.strategy.plan.explain(), self._report)  # type: ignore[attr-defined]
