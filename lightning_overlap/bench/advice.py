"""What to try next, in words, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_overlap.bench.rows import Row
from lightning_overlap.config import OverlapConfig

LITTLE = 0.03
"""Part of a step that is not worth a word."""


def advise(rows: Mapping[str, Row], config: OverlapConfig) -> str:
    """One line: which mode's communication is exposed most, and which setting to try.

    Args:
        rows: of the benchmark, by name.
        config: what was measured, whose modes know what may help.
    """
    ours, plain, compute, communication = (rows[name].median for name in ("overlapped", "plain", "compute", "communication"))
    if ours > plain:
        return f"advice: overlap costs {(ours - plain) * 1e3:.0f} ms more than it hides here; set overlap: off, or make buckets larger"
    exposed, waits = rows["overlapped"].waited(), rows["overlapped"].exposed[-1]
    kind = max(waits, key=lambda k: waits[k], default=None)
    if kind is None or exposed < LITTLE * ours:
        return f"advice: nothing to gain from a setting, {exposed * 1e3:.0f} of {ours * 1e3:.0f} ms are exposed"
    name, _, transfer = kind.partition(".")
    mode = next(mode for mode in config.modes if mode.name == name)
    slow = communication > compute
    hint = mode.advise("bytes" if slow else transfer)
    why = ", and the link is the limit" if slow else ""
    return f"advice: {kind} is exposed most, {waits[kind] * 1e3:.0f} of {ours * 1e3:.0f} ms{why}; try {hint}"
