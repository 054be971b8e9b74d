"""Reports: pages that a browser opens without a network."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_overlap.decision import ConfigError
from lightning_overlap.profiling.trace import Step, TransferTime, observe_transfers, spans, transfer_time

COLOURS = {
    "compute": "#4c72b0",
    "forward": "#4c72b0",
    "backward and step": "#7a9bd1",
    "between batches": "#b8c0cc",
    "exposed": "#c44e52",
    "waited": "#c44e52",
    "late peers": "#dd8452",
    "late peer": "#dd8452",
    "core taken": "#ccb974",
    "forwards": "#55a868",
    "backwards": "#8172b3",
    "gradients of inputs": "#8172b3",
    "gradients of weights": "#937860",
}
"""Colours of bars by name; transfers have plotly's default colours."""
ACTIONS = {"F": "forwards", "B": "backwards", "I": "gradients of inputs", "W": "gradients of weights"}
"""Names of a schedule's actions by their letters."""


def import_plotly() -> Any:
    """Imports plotly's graph objects.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ConfigError("a report needs plotly. Run: pip install 'lightning-overlap[report]'") from error
    return plotly.graph_objects


def write_report(table: str, steps: Sequence[Sequence[Step]], plan: str, path: Path) -> None:
    """Writes the plan, the table, bars for each step, and the timeline of every rank.

    Args:
        table: the summary of all measured steps, as text.
        steps: the steps to draw, at least one; of each the records of all ranks, on one clock.
        plan: as text.
        path: of the file.
    """
    _write(path, "Hidden and exposed communication", table, [_bars(steps), _timeline(steps)], plan)


def write_figures(table: str, medians: dict[str, float], limit: float, plan: str, path: Path) -> None:
    """Writes a benchmark's table and its bars.

    Args:
        table: as text.
        medians: seconds of a step, by row.
        limit: in seconds; drawn as a line across the bars.
        plan: as text.
        path: of the file.
    """
    graphs = import_plotly()
    milliseconds = [seconds * 1e3 for seconds in medians.values()]
    bars = graphs.Bar(x=milliseconds, y=list(medians), orientation="h", texttemplate="%{x:.0f}", marker_color=COLOURS["compute"])
    figure = graphs.Figure([bars]).add_vline(limit * 1e3, line_dash="dash", annotation_text="limit")
    figure.update_layout(title="Milliseconds a step", height=140 + 34 * len(medians)).update_yaxes(autorange="reversed")
    _write(path, "Gain of overlap", table, [figure], plan)


def _write(path: Path, title: str, table: str, figures: Sequence[Any], plan: str) -> None:
    # The first figure includes plotly's script, so that the page needs no network.
    drawn = "\n".join(
        f.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False}) for i, f in enumerate(figures)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lightning_overlap: {title.lower()}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} pre {{ background: #f4f6f8; padding: 1em; overflow-x: auto }}</style></head>
<body><h1>{title}</h1>
<pre id="table">{html.escape(table)}</pre>
{drawn}
<h2>The plan</h2><pre id="plan">{html.escape(plan)}</pre>
</body></html>
""",
        encoding="utf-8",
    )


def _bars(steps: Sequence[Sequence[Step]]) -> Any:
    """Draws a stacked bar for each step, of means over the ranks."""
    graphs = import_plotly()
    parts: dict[str, list[float]] = {"compute": [], "exposed": [], "late peers": [], "core taken": []}
    for step in steps:
        together = TransferTime()
        for observed in observe_transfers(step):
            together.add(transfer_time(observed))
        mean = together.over(len(step))
        length = sum(record.end - record.start for record in step) / len(step)
        taken = sum(record.core_taken for record in step) / len(step)
        shares = (length - mean.exposed - mean.late - taken, mean.exposed, mean.late, taken)
        for name, seconds in zip(parts, shares, strict=True):
            parts[name].append(seconds * 1e3)
    names = [f"step {step[0].index}" for step in steps]
    figure = graphs.Figure([graphs.Bar(x=names, y=values, name=name, marker_color=COLOURS[name]) for name, values in parts.items()])
    return figure.update_layout(title="Milliseconds a step", barmode="stack", height=360)


def _timeline(steps: Sequence[Sequence[Step]]) -> Any:
    """Draws a row for each rank's compute, waits and kinds of transfers."""
    graphs = import_plotly()
    origin = min(record.start for step in steps for record in step)
    drawn: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    rows: dict[str, None] = {}
    for step in steps:
        for rank, kind, name, (start, end), nbytes in spans(step):
            row = f"rank {rank} {kind}"
            rows[row] = None
            colour = {"waits": name.split(":")[0], "compute": name, "compute, stages": ACTIONS.get(name[0], name)}.get(kind, kind)
            bars = drawn[colour]
            bars["base"].append((start - origin) * 1e3)
            bars["x"].append((end - start) * 1e3)
            bars["y"].append(row)
            bars["text"].append(f"{name}<br>{(end - start) * 1e3:.2f} ms" + (f"<br>{nbytes / 1e6:.2f} MB sent" if nbytes else ""))
    figure = graphs.Figure(
        [
            graphs.Bar(
                orientation="h",
                name=kind,
                hoverinfo="text",
                hovertext=bars.pop("text"),
                marker={"color": COLOURS.get(kind), "line": {"width": 0}},
                **bars,
            )
            for kind, bars in drawn.items()
        ]
    )
    title = "Timeline of the last measured step, in milliseconds (drag to zoom, double click for all steps)"
    figure.update_layout(title=title, barmode="overlay", height=140 + 34 * len(rows), bargap=0.15)
    last = steps[-1]
    start, end = min(record.start for record in last), max(record.end for record in last)
    figure.update_xaxes(range=[(start - origin) * 1e3, (end - origin) * 1e3])
    return figure.update_yaxes(categoryorder="array", categoryarray=sorted(rows, reverse=True))
