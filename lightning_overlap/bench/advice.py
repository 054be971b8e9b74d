"""Advice on the next setting to try, from measured rows."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_overlap.bench.rows import Row
from lightning_overlap.config import OverlapConfig

NEGLIGIBLE = 0.03
"""Exposed part of a step below which there is no advice."""


def advise(rows: Mapping[str, Row], config: OverlapConfig) -> str:
    """Returns one line: which kind of transfer is exposed most, and which setting to try.

    Args:
        rows: of the benchmark, by name.
        config: the measured configuration, whose modes have the advice.
    """
    ours, plain, compute, communication = (rows[name].median for name in ("overlapped", "plain", "compute", "communication"))
    if ours > plain:
        return f"advice: overlap costs {(ours - plain) * 1e3:.0f} ms more than it hides here; set overlap: off, or make buckets larger"
    exposed, waits = rows["overlapped"].waited(), rows["overlapped"].exposed[-1]
    kind = max(waits, key=lambda k: waits[k], default=None)
    if kind is None or exposed < NEGLIGIBLE * ours:
        return f"advice: no setting can gain much, only {exposed * 1e3:.0f} of {ours * 1e3:.0f} ms are exposed"
    name, _, transfer = kind.partition(".")
    mode = next(mode for mode in config.modes if mode.name == name)
    slow = communication > compute
    hint = mode.advise("bytes" if slow else transfer)
    why = ", and the link is the limit" if slow else ""
    return f"advice: {kind} is exposed most, {waits[kind] * 1e3:.0f} of {ours * 1e3:.0f} ms{why}; try {hint}"
