"""Reports: pages that a browser opens without a network."""

from __future__ import annotations

import html
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import versions
from lightning_overlap.profiling.trace import Step, Summary, TransferTime, observe_transfers, spans, transfer_time

COLOURS = {
    "compute": "#4c72b0",
    "forward": "#4c72b0",
    "backward and step": "#7a9bd1",
    "between batches": "#b8c0cc",
    "exposed": "#c44e52",
    "waited": "#c44e52",
    "hidden": "#55a868",
    "late peers": "#dd8452",
    "late peer": "#dd8452",
    "core taken": "#ccb974",
    "forwards": "#55a868",
    "backwards": "#8172b3",
    "gradients of inputs": "#8172b3",
    "gradients of weights": "#937860",
}
"""Colours of bars by name."""
TRANSFERS = ("#17becf", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#ff9da6", "#2f9e8f", "#b07aa1")
"""Colours of kinds of transfers."""
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


def write_report(summary: Summary, steps: Sequence[Sequence[Step]], plan: str, path: Path) -> None:
    """Writes the plan, the table, a step as bars, bars for each step, and the timeline of every rank.

    Args:
        summary: of all measured steps.
        steps: the steps to draw, at least one; of each the records of all ranks, on one clock.
        plan: as text.
        path: of the file.
    """
    _write(path, "Hidden and exposed communication", summary.table(), [_mean_step(summary), _bars(steps), _timeline(steps)], plan)


def write_figures(
    table: str, medians: Mapping[str, float], limit: float, steps: Mapping[str, Sequence[Step]], plan: str, path: Path
) -> None:
    """Writes a benchmark's table, its bars, and a step of the first rank under each of several strategies.

    Args:
        table: as text.
        medians: seconds of a step, by row.
        limit: in seconds; drawn as a line across the bars.
        steps: by row, a step: the records of all ranks, on one clock.
        plan: as text.
        path: of the file.
    """
    graphs = import_plotly()
    milliseconds = [seconds * 1e3 for seconds in medians.values()]
    bars = graphs.Bar(x=milliseconds, y=list(medians), orientation="h", texttemplate="%{x:.0f}", marker_color=COLOURS["compute"])
    figure = graphs.Figure([bars]).add_vline(limit * 1e3, line_dash="dash", annotation_text="limit", annotation_position="top")
    figure.update_layout(title="Milliseconds a step", height=140 + 34 * len(medians)).update_yaxes(autorange="reversed")
    _write(path, "Gain of overlap", table, [_side_by_side(steps), figure], plan)


def _write(path: Path, title: str, table: str, figures: Sequence[Any], plan: str) -> None:
    # The first figure includes plotly's script, so that the page needs no network.
    drawn = "\n".join(
        f.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False}) for i, f in enumerate(figures)
    )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lightning_overlap: {title.lower()}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} pre {{ background: #f4f6f8; padding: 1em; white-space: pre-wrap }}</style>
</head>
<body><h1>{title}</h1>
<p>{time.strftime("%Y-%m-%d %H:%M")}, {used}</p>
<pre id="table">{html.escape(table)}</pre>
{drawn}
<h2>The plan</h2><pre id="plan">{html.escape(plan)}</pre>
</body></html>
""",
        encoding="utf-8",
    )


def _mean_step(summary: Summary) -> Any:
    """Draws the mean step as a bar, and below it for each mode what its transfers hide, expose and wait for late peers."""
    graphs = import_plotly()
    mean = summary.mean()
    parts: dict[str, dict[str, float]] = {
        "compute": {"step": summary.compute},
        "hidden": {},
        "exposed": {"step": mean.exposed},
        "late peers": {"step": mean.late},
        "core taken": {"step": summary.core_taken},
    }
    for mode in summary.names:
        of_mode = summary.mean(mode)
        parts["hidden"][f"{mode} transfers"] = of_mode.hidden
        parts["exposed"][f"{mode} transfers"] = of_mode.exposed
        parts["late peers"][f"{mode} transfers"] = of_mode.late
    bars = [
        graphs.Bar(
            orientation="h",
            name=name,
            x=[seconds * 1e3 for seconds in rows.values()],
            y=list(rows),
            marker_color=COLOURS[name],
            texttemplate="%{x:.0f}",
            textposition="inside",
        )
        for name, rows in parts.items()
        if any(rows.values())
    ]
    title = f"A step of {summary.step * 1e3:.0f} ms: {mean.hidden_percent:.0f}% of the communication is hidden"
    return _for_a_talk(graphs.Figure(bars), title, rows=1 + len(summary.names)).update_layout(barmode="stack")


def _side_by_side(steps: Mapping[str, Sequence[Step]]) -> Any:
    """Draws a step of the first rank under each strategy: compute with waits on it, and below it each kind of transfers."""
    graphs = import_plotly()
    drawn: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    rows: dict[str, None] = {}
    for name, step in steps.items():
        for rank, kind, label, (start, end), _ in spans(step):
            if rank > 0 or kind == "compute, stages":
                continue
            on_compute = kind in ("compute", "waits")
            row = f"{name}: {'compute' if on_compute else kind}"
            rows[row] = None
            bars = drawn[label.split(":")[0] if on_compute else kind]
            bars["base"].append((start - step[0].start) * 1e3)
            bars["x"].append((end - start) * 1e3)
            bars["y"].append(row)
    on_top = sorted(drawn.items(), key=lambda item: item[0] in ("waited", "late peer"))
    styles = _styles(drawn)
    figure = graphs.Figure([graphs.Bar(orientation="h", name=kind, marker=styles[kind], **bars) for kind, bars in on_top])
    lengths = ", ".join(f"{name} {(step[0].end - step[0].start) * 1e3:.0f} ms" for name, step in steps.items())
    figure = _for_a_talk(figure, f"One step of rank 0: {lengths}", len(rows)).update_layout(barmode="overlay", bargap=0.15)
    return figure.update_yaxes(categoryorder="array", categoryarray=list(rows))


def _styles(kinds: Iterable[str]) -> dict[str, Any]:
    """Markers of bars, by what they show."""
    transfers = dict(zip((kind for kind in kinds if kind not in COLOURS), cycle(TRANSFERS), strict=False))
    return {kind: {"color": colour, "line": {"width": 0}} for kind, colour in {**COLOURS, **transfers}.items()}


def _for_a_talk(figure: Any, title: str, rows: int) -> Any:
    """Formats a figure of horizontal bars so that it can be read on a slide: in large letters, without a background."""
    height = 46 * rows
    legend = {"orientation": "h", "y": -80 / height, "traceorder": "normal"}  # below the title of the axis
    figure.update_layout(template="simple_white", title=title, font_size=16, legend=legend, height=height + 230)
    return figure.update_layout(margin={"t": 80, "b": 150}).update_xaxes(title="milliseconds").update_yaxes(autorange="reversed")


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
    last = steps[-1]
    origin = min(record.start for record in last)
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
    styles = _styles(drawn)
    figure = graphs.Figure(
        [
            graphs.Bar(
                orientation="h",
                name=kind,
                hoverinfo="text",
                hovertext=bars.pop("text"),
                marker=styles[kind],
                **bars,
            )
            for kind, bars in drawn.items()
        ]
    )
    title = "Timeline of the last measured step (drag to zoom, double click for the steps before it, too)"
    figure.update_layout(title=title, barmode="overlay", height=140 + 34 * len(rows), bargap=0.15)
    figure.update_xaxes(title="milliseconds", range=[0, (max(record.end for record in last) - origin) * 1e3])
    return figure.update_yaxes(categoryorder="array", categoryarray=sorted(rows, reverse=True))
