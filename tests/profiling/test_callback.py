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
from lightning_overlap.ranks.gloo import ThreadedGlooEngine
from lightning_overlap.ranks.world import make_group
from tests.helpers.training import train

QUIET = {"limit_val_batches": 0, "max_steps": 6}


def profiled(folder):
    profiler = OverlapProfiler(every_n_steps=2, warmup=1, report=str(folder / "report.html"), trace=str(folder / "trace.json"))
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
    assert all(row[f"overlap/{name}"] for row in logged for name in names)
    page = (tmp_path / "report.html").read_text()
    assert "data_parallel" in page
    assert "overlap_grad_reduce" in page
    assert "steps measured, means over 2 ranks" in page
    assert "data.grads[0]" in page
    assert 'src="http' not in page, "it opens without a network"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}


def unprofiled():
    return train(accumulate_grad_batches=2, **QUIET)["hash"]


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

    profiler = OverlapProfiler(every_n_steps=1, warmup=0)
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
