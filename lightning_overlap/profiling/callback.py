"""The profiling callback."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.modes.base import IMBALANCE, OverlapMode
from lightning_overlap.profiling.chrome_trace import write_chrome_trace
from lightning_overlap.profiling.flops import StepFlops, peak_flops
from lightning_overlap.profiling.recorder import StepRecorder
from lightning_overlap.profiling.report import import_plotly, write_report
from lightning_overlap.profiling.trace import BETWEEN, Step, Summary
from lightning_overlap.profiling.usage import Usage, memory_in_use, samples_and_tokens
from lightning_overlap.ranks.clock import Clock, DeviceClock
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import make_group

DRAWN = 8
"""How many of the last measured steps are drawn; the table and the log cover all."""


class OverlapProfiler(Callback):
    """Measures speed, and how much communication is hidden: in the log, a table at the end of fit, a report and a trace.

    It records every transfer of :class:`~lightning_overlap.ranks.group.Group`, and adds nothing to a mode. At the trainer's logging
    steps the ranks exchange the records of the steps measured since the last exchange, on one clock. It logs means over the ranks:

    ``overlap/exposed_ms``: milliseconds of a step in which a rank only waited for the wire.
    ``overlap/late_ms``: milliseconds in which it waited for a rank that had not posted its transfer yet.
    ``overlap/core_taken_ms``: milliseconds in which it waited for no transfer and had no core, since transfers or other programs used
    it (0 on CUDA).
    ``overlap/hidden_percent``: the part of the time with transfers on the wire in which the ranks waited for none.
    ``overlap/<mode>/exposed_ms``, ``overlap/<mode>/late_ms`` and ``overlap/<mode>/hidden_percent``: the same for one mode. ``late_ms``
    is the waiting that an uneven load of the ranks causes, apart from the wire.
    ``overlap/<mode>/...``: what a mode measures itself, such as the load of experts. ``overlap/<mode>/<load>_max_over_mean`` is the
    largest one of all layers.

    And of all ranks together:

    ``overlap/samples_per_second``, ``overlap/tokens_per_second``: of the measured steps. The first tensor of a batch (or its
    ``input_ids``) has the samples in its first dim; if it has integers in two dims, its elements are tokens, padding included.
    ``overlap/teraflops_per_second``: floating-point operations of products, convolutions and attention, forward and backward. They are
    counted in one step that is not measured. What an activation checkpoint computes again does not count.
    ``overlap/mfu_percent``: model FLOPs utilisation: these operations, of what the devices can do at most.
    ``overlap/memory_mb``: of the rank that has most: on CUDA torch's peak allocation, on the CPU the process's resident size.

    Args:
        every_n_steps: steps from one measured step to the next.
        warmup: steps before the first measured step.
        prog_bar: also show ``overlap/exposed_ms`` on the progress bar.
        report: file for a page with plan, table, bars and the timeline of every rank; a browser opens it without a network.
        trace: file for the same steps in Chrome's trace format, which Perfetto opens.
        count_flops: counts the floating-point operations of one step, for ``overlap/teraflops_per_second`` and MFU. Functions that
            ``torch.compile`` has compiled run uncompiled in that step; with ``fullgraph=True``, as in ``flex_attention``, torch raises
            an error.
        peak_flops: FLOP/s that one rank's device can do at most, for ``overlap/mfu_percent``. By default known of some GPUs.

    Attributes:
        summary: on rank 0, of all steps measured and exchanged in this fit.
        steps: on rank 0, the last of them: of each the records of all ranks, on one clock.

    Raises:
        ConfigError: ``every_n_steps``, ``warmup`` or ``peak_flops`` is too small; or ``report`` is set and plotly is not installed.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        warmup: int = 2,
        prog_bar: bool = False,
        report: str | None = None,
        trace: str | None = None,
        count_flops: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        if every_n_steps < 1 or warmup < 0:
            raise ConfigError(f"every_n_steps={every_n_steps} must be at least 1, and warmup={warmup} at least 0")
        if peak_flops is not None and peak_flops <= 0:
            raise ConfigError(f"peak_flops={peak_flops} must be more than 0: operations a second of one rank's device, such as 989e12")
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
        self._count_flops = count_flops
        self._peak = peak_flops
        self._flops = StepFlops("")
        self.summary = Summary()
        self.steps: deque[list[Step]] = deque(maxlen=DRAWN)

    # -- this rank ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not hasattr(trainer.strategy, "modes"):
            rank_zero_warn("OverlapProfiler measures nothing, because it records transfers of OverlapStrategy only")
        modes = self._modes = list(getattr(trainer.strategy, "modes", ()))
        groups = [group for mode in modes for group in mode.groups if group.size > 1]
        self.summary = Summary(remarks={mode.name: mode.uncounted_transfers or mode.remark for mode in modes})
        self._flops = StepFlops(self._flops_obstacle(trainer) if modes else "")
        self._current = -1
        self.steps.clear()
        self._recorder = self._world = None  # a fit that failed leaves them
        if groups:
            clock = DeviceClock() if trainer.strategy.root_device.type == "cuda" else Clock()
            self._recorder = StepRecorder(modes, groups, clock)
            # Not a mode's group: its own transfers must not be measured.
            limit = trainer.strategy.time_limit  # type: ignore[attr-defined]
            self._world = make_group([range(trainer.world_size)], "profiler", limit, backend="gloo", gathers=False, threads=False)

    def _flops_obstacle(self, trainer: Trainer) -> str:
        """Says why the operations of no step can be counted; empty if they can."""
        if not self._count_flops:
            return "count_flops is off"
        if trainer.strategy.plan.facts.compiled:  # type: ignore[attr-defined]
            return "a compiled model would run uncompiled in that step"
        if uncounted := next((reason for mode in self._modes if (reason := mode.uncounted_products)), ""):
            return uncounted
        if self._every == 1 and self._warmup < 2:
            return "every step is measured. Set warmup to 2, or every_n_steps to 2"
        return ""

    def _is_measured(self, step: int) -> bool:
        return step >= self._warmup and (step - self._warmup) % self._every == 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is None:
            return
        step = trainer.global_step
        may_count = False
        if step != self._current:  # otherwise the batch belongs to the same accumulation window
            may_count = self._current >= 0 and not self._is_measured(step)  # the first step of a fit may be verified
            self._current = step
            self._recorder.start_step(step, record=self._is_measured(step))
        self._recorder.start_batch(*samples_and_tokens(batch))
        self._flops.start_batch(may_count=may_count)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        if self._recorder is not None:
            self._recorder.next_phase("backward and step")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self._recorder is None:
            return
        self._recorder.next_phase(BETWEEN)
        self._flops.end_batch(ends_step=trainer.global_step != self._current)
        if trainer.global_step != self._current and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._recorder.end_step()
            if (summary := self._exchange(trainer)) is not None:
                self._log_values(module, summary)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._flops.end_batch(ends_step=False)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.end_step()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.end_step()

    # -- all ranks ---------------------------------------------------------------------------------------------------

    def _exchange(self, trainer: Trainer) -> Summary | None:
        """Gathers the steps measured since the last exchange. Returns their summary on rank 0, if there are any. Collective."""
        assert self._recorder is not None, "on_train_start made it"
        assert self._world is not None, "on_train_start made it"
        offset = self._world.clock_offset()
        measured = {f"overlap/{mode.name}/{name}": value for mode in self._modes for name, value in mode.measurements().items()}
        steps = [step.on_clock(offset) for step in self._recorder.take()]
        everyone = self._world.gather_objects((steps, measured, self._usage(trainer)))
        self._measured = {name: value for _, values, _ in reversed(everyone) for name, value in values.items()}
        together = [list(step) for step in zip(*(steps for steps, *_ in everyone), strict=True)]
        if not together:
            return None
        self.steps.extend(together)
        sharers = trainer.world_size // trainer.strategy.mesh.size("samples")  # type: ignore[attr-defined]
        usage = Usage.of_all([usage for *_, usage in everyone])
        summary = Summary(sharers=sharers, usage=usage, imbalances=largest_imbalances(self._measured))
        for step in together:
            summary.add(step)
        self.summary.merge(summary)
        return summary

    def _usage(self, trainer: Trainer) -> Usage:
        """This rank's."""
        device = trainer.strategy.root_device
        peak = self._peak or peak_flops(device, str(trainer.precision))
        return Usage(self._flops.flops, self._flops.obstacle, peak, memory_in_use(device))

    def _log_values(self, module: LightningModule, summary: Summary) -> None:
        together = summary.mean()
        module.log("overlap/exposed_ms", together.exposed * 1e3, prog_bar=self._prog_bar, rank_zero_only=True)
        values = {"late_ms": together.late * 1e3, "hidden_percent": together.hidden_percent, "core_taken_ms": summary.core_taken * 1e3}
        for mode in summary.names:
            mean = summary.mean(mode)
            values |= {f"{mode}/exposed_ms": mean.exposed * 1e3, f"{mode}/late_ms": mean.late * 1e3}
            values[f"{mode}/hidden_percent"] = mean.hidden_percent
        values |= {f"{mode}/{load}{IMBALANCE}": ratio for (mode, load), (ratio, _) in summary.imbalances.items()}
        rates = {"samples_per_second": summary.samples, "tokens_per_second": summary.tokens}
        values |= {name: summary.per_second(count) for name, count in rates.items() if count}
        if (flops := summary.flops_per_second) is not None:
            values["teraflops_per_second"] = flops / 1e12
        if (utilisation := summary.utilisation) is not None:
            values["mfu_percent"] = utilisation
        if summary.usage.memory:
            values["memory_mb"] = summary.usage.memory / 1e6
        module.log_dict({f"overlap/{name}": value for name, value in values.items()} | self._measured, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._recorder is None or self._world is None:
            return
        self._flops.end_batch(ends_step=False)
        self._recorder.detach()
        self._exchange(trainer)
        self._world.close()
        self._recorder = self._world = None
        self._modes = []
        if self.summary.steps:
            self._show(trainer)
        else:
            log_on_rank_zero(f"OverlapProfiler: no step was measured (warmup={self._warmup}, every_n_steps={self._every})")

    def _show(self, trainer: Trainer) -> None:
        """Prints the table, and writes the files. On rank 0."""
        log_on_rank_zero(self.summary.table())
        if self._trace is not None:
            write_chrome_trace(list(self.steps), self._trace)
        if self._report is not None:
            write_report(self.summary, list(self.steps), trainer.strategy.plan.explain(), self._report)  # type: ignore[attr-defined]


def largest_imbalances(measured: Mapping[str, float]) -> dict[tuple[str, str], tuple[float, str]]:
    """Finds the largest of the modes' imbalances.

    Args:
        measured: by name, as they are logged: ``overlap/<mode>/<part of the model>/<load>_max_over_mean``, beside others.

    Returns:
        By mode and kind of load: the largest load over the mean, and the part of the model that has it.
    """
    largest: dict[tuple[str, str], tuple[float, str]] = {}
    for name, ratio in measured.items():
        if name.endswith(IMBALANCE):
            mode, _, rest = name.removeprefix("overlap/").partition("/")
            part, _, load = rest.removesuffix(IMBALANCE).rpartition("/")
            largest[mode, load] = max(largest.get((mode, load), (0.0, "")), (ratio, part))
    return largest
