import csv
import datetime
import json
import threading
import time
from unittest import mock

import pytest
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

from lightning_overlap import ConfigError, OverlapProfiler
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.profiling.flops import FlopCount
from lightning_overlap.ranks.gloo import ThreadedGlooEngine
from lightning_overlap.ranks.world import make_group
from lightning_overlap.torch_seams import dispatch_modes
from tests.helpers.training import Net, train

QUIET = {"limit_val_batches": 0, "max_steps": 6}


def profiled(folder):
    files = {"report": str(folder / "report.html"), "trace": str(folder / "trace.json")}
    profiler = OverlapProfiler(every_n_steps=2, warmup=1, count_flops=True, peak_flops=1e12, **files)
    logger = CSVLogger(folder, "", "")
    log = {"logger": logger if dist.get_rank() == 0 else False, "log_every_n_steps": 2}
    done = train(callbacks=[profiler], accumulate_grad_batches=2, **QUIET, **log)
    return done["hash"], profiler.summary


def test_what_it_tells(world, tmp_path):
    (ours, summary), (_, nothing) = world(2).run(profiled, tmp_path)
    assert ours == world(2).run(unprofiled)[0], "looking changes nothing"
    assert summary.steps == 3  # 1, 3 and 5
    assert nothing.steps == 0, "the first rank tells"
    assert summary.names == ["data"]
    spent = summary.mean("data")
    assert spent.communication > 0
    assert spent.nbytes > 0
    assert summary.compute > 0
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["overlap/exposed_ms"]]
    assert len(logged) == 3
    names = ["exposed_ms", "late_ms", "core_taken_ms", "hidden_percent"]
    names += ["data/exposed_ms", "data/late_ms", "data/hidden_percent"]
    names += ["samples_per_second", "tokens_per_second", "memory_mb"]
    assert all(row[f"overlap/{name}"] for row in logged for name in names)
    # Step 2 is counted, the first one after the first step that is not measured.
    assert [bool(row["overlap/teraflops_per_second"]) for row in logged] == [False, True, True]
    for row in logged[1:]:  # of two devices with a peak of 1e12
        assert float(row["overlap/mfu_percent"]) == pytest.approx(50 * float(row["overlap/teraflops_per_second"]))
    assert summary.samples == 3 * 2 * 8, "two batches of 8 a step"
    assert summary.tokens == 9 * summary.samples
    assert summary.usage.flops == sum(world(2).run(flops_of_a_step))
    assert summary.usage.memory > 0
    page = (tmp_path / "report.html").read_text()
    assert "data_parallel" in page
    assert "overlap_grad_reduce" in page
    assert "steps measured, means over 2 ranks" in page
    assert "data.grads[0]" in page
    assert 'src="http' not in page, "it opens without a network"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}


def remarks():
    profiler = OverlapProfiler(every_n_steps=1)
    with mock.patch.object(DataMode, "uncounted_transfers", "data_parallel sends by post"):
        train(callbacks=[profiler], log_every_n_steps=2, **QUIET)
    return profiler.summary.table()


def test_the_table_says_which_transfers_it_lacks(world):
    assert "data_parallel sends by post" in world(2).run(remarks)[0]


def unprofiled():
    return train(accumulate_grad_batches=2, **QUIET)["hash"]


def flops_of_a_step():
    module = Net()
    module.log = lambda *_: None
    with FlopCount() as count:
        for index, batch in zip(range(2), module.loader(), strict=False):
            module.training_step(batch, index).backward()
    return count.flops


def of_unusual_runs():
    """A run in which every step is measured, and one that fails in the step that is counted."""
    every = OverlapProfiler(every_n_steps=1, warmup=0, count_flops=True)
    train(callbacks=[every], **QUIET)

    class Fails(Net):
        def training_step(self, batch, index):
            if index == 1:
                raise ValueError("in the counted step")
            return super().training_step(batch, index)

    with pytest.raises(Exception, match="in the counted step"):
        train(callbacks=[OverlapProfiler()], module=Fails, **QUIET)
    return every.summary.usage.obstacle, dispatch_modes()


def test_no_step_is_counted_where_it_would_be_measured_and_a_failure_ends_the_count(world):
    for obstacle, modes in [world(2).run(of_unusual_runs)[0]]:
        assert obstacle == "every step is measured. Set warmup to 2, or every_n_steps to 2"
        assert not modes
    with pytest.raises(ConfigError, match="peak_flops=0 must be more than 0"):
        OverlapProfiler(peak_flops=0)


def planted():
    """One bucket's reduction arrives late, where nothing is hidden; what was waited is measured where it is planted."""
    waited, real = [], ThreadedGlooEngine.block_for

    def late(self, label, works):
        receives = threading.current_thread().name == "data._wait_for_reductions"  # another thread sends
        start, chosen = time.perf_counter(), label == "data.grads[1]" and works and receives
        while chosen and time.perf_counter() - start < 0.05:
            time.sleep(0.001)
        real(self, label, works)
        if chosen:
            waited.append(time.perf_counter() - start)

    profiler = OverlapProfiler(every_n_steps=1, warmup=0, count_flops=True)
    with mock.patch.object(ThreadedGlooEngine, "block_for", late):
        train(callbacks=[profiler], overlap="off", **QUIET)
    return waited, profiler.summary


def test_a_planted_exposure_is_told_with_its_label(world):
    waited, summary = world(2).run(planted)[0]
    assert len(waited) == summary.steps == 6
    label, seconds = summary.waited_for()[0]
    assert label == "data.grads[1]"
    # Late peers' part is not the wire's: what both ranks planted is in both.
    assert summary.mean().exposed + summary.mean().late >= 0.95 * sum(waited) / 6
    assert seconds == pytest.approx(sum(waited) / 6, rel=0.05)


def ahead(seconds):
    """The second rank's clock is ahead of the first one's."""
    real = time.perf_counter
    shift = seconds * dist.get_rank()
    group = make_group([range(dist.get_world_size())], "clocks", datetime.timedelta(seconds=30), gathers=False)
    try:
        with mock.patch("time.perf_counter", side_effect=lambda: real() + shift):
            return group.clock_offset()
    finally:
        group.close()


def test_clocks_are_compared(world):
    assert world(4).run(ahead, 1000.0) == pytest.approx([0.0, 1000.0, 2000.0, 3000.0], abs=1.0)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="every_n_steps=0"):
        OverlapProfiler(every_n_steps=0)
    with (
        mock.patch.dict("sys.modules", {"plotly.graph_objects": None}),
        pytest.raises(ConfigError, match=r"lightning-overlap\[report\]"),
    ):
        OverlapProfiler(report="report.html")
