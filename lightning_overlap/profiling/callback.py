"""The profiling callback."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.profiling.recorder import StepRecorder
from lightning_overlap.profiling.report import import_plotly, write_report
from lightning_overlap.profiling.trace import BETWEEN, Step, Summary, write_chrome_trace
from lightning_overlap.ranks.clock import Clock, DeviceClock
from lightning_overlap.ranks.group import Group
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
    ``overlap/<mode>/exposed_ms``, ``overlap/<mode>/late_ms`` and ``overlap/<mode>/hidden_percent``: the same for one mode. ``late_ms``
    is the waiting that an uneven load of the ranks causes, apart from the wire.
    ``overlap/<mode>/...``: what a mode measures itself, such as the load of experts.

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
        self._recorder: StepRecorder | None = None  # from the start to the end of training
        self._world: Group | None = None
        self._modes: list[OverlapMode] = []
        self._measured: dict[str, float] = {}  # on rank 0, what the modes of all ranks measured themselves
        self._current = -1  # number of the current step
        self.summary = Summary()
        self._drawn: deque[list[Step]] = deque(maxlen=DRAWN)

    # -- this rank ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not hasattr(trainer.strategy, "modes"):
            rank_zero_warn("OverlapProfiler measures nothing, because it records transfers of OverlapStrategy only")
        modes = self._modes = list(getattr(trainer.strategy, "modes", ()))
        groups = [group for mode in modes for group in mode.groups if group.size > 1]
        self.summary = Summary(remarks={mode.name: mode.remark for mode in modes})
        self._current = -1
        self._drawn.clear()
        self._recorder = self._world = None  # a fit that failed leaves them
        if groups:
            clock = DeviceClock() if trainer.strategy.root_device.type == "cuda" else Clock()
            self._recorder = StepRecorder(modes, groups, clock)
            # Not a mode's group: its own transfers must not be measured.
            limit = trainer.strategy.time_limit  # type: ignore[attr-defined]
            self._world = make_group([range(trainer.world_size)], "profiler", limit, backend="gloo", gathers=False, threads=False)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is None:
            return
        step = trainer.global_step
        if step != self._current:  # otherwise the batch belongs to the same accumulation window
            self._current = step
            self._recorder.start_step(step, record=step >= self._warmup and (step - self._warmup) % self._every == 0)
        self._recorder.start_batch()

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        if self._recorder is not None:
            self._recorder.next_phase("backward and step")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self._recorder is None:
            return
        self._recorder.next_phase(BETWEEN)
        if trainer.global_step != self._current and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._recorder.end_step()
            if (summary := self._exchange()) is not None:
                self._log_values(module, summary)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.end_step()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.end_step()

    # -- all ranks ---------------------------------------------------------------------------------------------------

    def _exchange(self) -> Summary | None:
        """Gathers the steps measured since the last exchange. Returns their summary on rank 0, if there are any. Collective."""
        assert self._recorder is not None, "on_train_start made it"
        assert self._world is not None, "on_train_start made it"
        offset = self._world.clock_offset()
        measured = {f"overlap/{mode.name}/{name}": value for mode in self._modes for name, value in mode.measurements().items()}
        everyone = self._world.gather_objects(([step.on_clock(offset) for step in self._recorder.take()], measured))
        self._measured = {name: value for _, values in reversed(everyone) for name, value in values.items()}
        steps = [list(step) for step in zip(*(steps for steps, _ in everyone), strict=True)]
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
            values |= {f"overlap/{mode}/exposed_ms": mean.exposed * 1e3, f"overlap/{mode}/late_ms": mean.late * 1e3}
            values[f"overlap/{mode}/hidden_percent"] = mean.hidden_percent
        module.log_dict(values | self._measured, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is None or self._world is None:
            return
        self._recorder.detach()
        self._exchange()
        self._world.close()
        self._recorder = self._world = None
        self._modes = []
        if not self.summary.steps:
            log_on_rank_zero(f"OverlapProfiler: no step was measured (warmup={self._warmup}, every_n_steps={self._every})")
            return
        log_on_rank_zero(self.summary.table())
        if self._trace is not None:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            write_chrome_trace(list(self._drawn), self._trace)
        if self._report is not None:
            write_report(self.summary.table(), list(self._drawn), trainer.strategy.plan.explain(), self._report)  # type: ignore[attr-defined]
