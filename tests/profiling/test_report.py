import shutil
import subprocess

import pytest

from lightning_overlap.profiling.report import write_figures, write_report
from lightning_overlap.profiling.trace import Step, Summary
from lightning_overlap.ranks.group import Transfer

CHROMIUM = shutil.which("chromium")


def page(folder):
    steps = []
    for index in range(3):
        start = 10.0 * index
        held = [Transfer("data.grads[0]", index, 5000, (0, 1), start + 2, start + 2, start + 6, (start + 4, start + 7))]
        phases = [("forward", start, start + 2), ("backward and step", start + 2, start + 8)]
        work = [("F0.0", start, start + 1), ("B0.0", start + 3, start + 8)]
        steps.append([Step(index, start, start + 8, phases, held, work) for _ in range(2)])
    summary = Summary()
    for step in steps:
        summary.add(step)
    path = folder / "report.html"
    write_report(summary, steps, "a plan with <brackets> & such", path)
    return path


def test_everything_is_in_the_page(tmp_path):
    text = page(tmp_path).read_text()
    assert "a plan with &lt;brackets&gt; &amp; such" in text
    assert "3 steps measured, means over 2 ranks" in text
    assert "data.grads[0]" in text
    assert 'src="http' not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")
def test_a_browser_draws_it_without_a_network(tmp_path):
    alone = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--proxy-server=127.0.0.1:1", f"--user-data-dir={tmp_path}/profile"]  # fmt: skip
    shown = subprocess.run(
        [CHROMIUM, *alone, "--virtual-time-budget=5000", "--dump-dom", page(tmp_path).as_uri()],
        capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    drawn = shown[shown.index("main-svg") :]
    assert all(row in drawn for row in ("rank 0 compute", "rank 0 compute, stages", "rank 1 data.grads", "rank 1 waits"))
    assert all(name in drawn for name in ("exposed", "step 2", "forwards", "backwards"))
    assert "A step of 8000 ms: 50% of the communication is hidden" in drawn
    assert "data transfers" in drawn


def test_a_benchmark_has_a_page(tmp_path):
    waits = Transfer("data.grads[0]", 0, 5000, (0, 1), 2, 2, 6, (4, 7))
    step = [Step(0, 0.0, 8.0, [("forward", 0.0, 8.0)], [waits]) for _ in range(2)]
    page = tmp_path / "new" / "bench.html"
    write_figures("the table", {"overlapped": 0.2, "plain": 0.35}, 0.15, {"plain": step, "overlapped": step}, "the plan", page)
    text = page.read_text()
    assert "One step of rank 0: plain 8000 ms, overlapped 8000 ms" in text
    assert all(f'"{name}: {row}"' in text for name in ("plain", "overlapped") for row in ("compute", "data.grads"))
    assert all(part in text for part in ("the table", "the plan", '"overlapped","plain"', "[200.0,350.0]", "limit"))
