"""What came of a run, in one word and a reason, and what was expected of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.zoo.case import HAVE_OTHER_SAMPLES, STEPS, Model
from tests.zoo.training import SAME_LOSS, Report

WHOLE = "one process"
OTHER_OBJECTIVE = "The loss is not a mean over samples"
"""What a run says whose loss is another one in microbatches."""


@dataclass(frozen=True)
class Verdict:
    """What came of a run.

    Attributes:
        word: ``equal`` to one process; ``refused`` with a sentence; equal to another reference: ``DDP``, ``microbatches in one
            process``; ``random``: ranks agree, and there is nothing to compare with; ``told``: it differs, and says so; or a failure:
            ``differs``, ``crash``, ``hang``.
        why: the sentence, what differs, the error.
        words: warnings and the plan.
    """

    word: str
    why: str = ""
    words: str = ""


@dataclass(frozen=True)
class Expected:
    """What is expected of a run.

    Attributes:
        word: as of :class:`Verdict`.
        said: a part of the sentence by which a run is refused, or says that its numbers are its own.
        why: the reason why numbers are not those of one process.
    """

    word: str
    said: str = ""
    why: str = ""


EQUAL = Expected("equal")
Row = Mapping[str, Expected]


def refused(said: str) -> Expected:
    """A ``ConfigError`` before or in the first step, the same on both ranks, with these words."""
    return Expected("refused", said)


def as_ddp(why: str) -> Expected:
    """The numbers of DDP, which are not those of one process on the whole batch."""
    return Expected("DDP", why=why)


def as_microbatches(why: str, said: str) -> Expected:
    """The numbers of one process that goes through the microbatches, of which the run says that they are not the whole batch's."""
    return Expected("microbatches in one process", said, why)


def at_random(why: str) -> Expected:
    """Random numbers, other than in one process; ranks agree."""
    return Expected("random", why=why)


def told(why: str, said: str) -> Expected:
    """Numbers of its own, of which the run says that they are not the whole batch's."""
    return Expected("told", said, why)


FAILURES = ("differs", "crash", "hang")


def expected_of(row: Row, layout: str, data: str) -> Expected:
    """Of a row of the table: by layout and data, by layout, or by the layout's family, ``dp``, ``pp`` or ``tp`` (``pp*``)."""
    family = f"{layout[:2]}*"
    for key in (f"{layout} {data}", f"{family} {data}", layout, family, "*"):
        if key in row:
            return row[key]
    return EQUAL


def references(model: Model, layout: str, expected: Expected) -> list[str]:
    """What a run is compared with at first."""
    if model.random:
        return []
    return [WHOLE, *([expected.word] if expected.word in ("DDP", "microbatches in one process") else [])]


def judge(model: Model, layout: str, reports: Sequence[Report]) -> Verdict:
    """The verdict of what both ranks report."""
    words = "\n".join(report.words for report in reports)
    if crashes := [f"rank {rank}: {report.crash}" for rank, report in enumerate(reports) if report.crash]:
        crashes += [f"rank {rank}: ConfigError: {report.error[:300]}" for rank, report in enumerate(reports) if report.error]
        return Verdict("crash", "; ".join(crashes), words)
    errors = [report.error for report in reports]
    if any(errors):
        if errors[0] != errors[1]:
            return Verdict("crash", f"other errors by rank: {errors}", words)
        # A decision at random that cannot be met comes when it comes.
        if (steps := max(report.steps for report in reports)) > 0 and not model.random:
            return Verdict("crash", f"refused after {steps} steps: {errors[0]}", words)
        return Verdict("refused", errors[0], words)
    losses = reports[0].losses
    if layout.startswith(HAVE_OTHER_SAMPLES):  # each rank has the losses of its samples; that of the validation is told to all
        losses = [(a + b) / 2 for a, b in zip(reports[0].losses, reports[1].losses, strict=True)]
    elif reports[0].losses != reports[1].losses and not close(reports[0].losses, reports[1].losses):
        return Verdict("differs", f"ranks have other losses: {reports[0].losses} and {reports[1].losses}", words)
    if reports[0].digest != reports[1].digest:
        return Verdict("differs", "ranks have other weights", words)
    if len(losses) != STEPS + 1 or not all(map(math.isfinite, losses)):
        return Verdict("differs", f"losses are {losses}", words)
    if model.random:
        return Verdict("random", "", words)
    reasons = {}
    for kind in reports[0].expected:
        reason = difference(losses, reports, kind)
        if reason is None:
            return Verdict("equal" if kind == WHOLE else kind, "; ".join(reasons.values()), words)
        reasons[kind] = reason
    differing = "; ".join(f"from {kind}: {reason}" for kind, reason in reasons.items())
    return Verdict("told" if OTHER_OBJECTIVE in words else "differs", differing, words)


def close(losses: Sequence[float], expected: Sequence[float]) -> bool:
    return all(abs(a - b) <= SAME_LOSS * max(abs(b), 1e-6) for a, b in zip(losses, expected, strict=True))


def difference(losses: Sequence[float], reports: Sequence[Report], kind: str) -> str | None:
    """In words; None: there is none."""
    said = []
    expected = reports[0].expected[kind]
    if not close(losses, expected):
        off = [f"{abs(a - b) / max(abs(b), 1e-12):.0e}" for a, b in zip(losses, expected, strict=True)]
        said.append(f"losses off by {' '.join(off[:-1])}, validation {off[-1]}")
    if wrong := reports[0].wrong[kind] or reports[1].wrong[kind]:
        said.append("weights off by " + ", ".join(f"{error:.1g} x update of {name}" for name, error in wrong))
    return "; ".join(said) or None


def unexpected(verdict: Verdict, expected: Expected) -> str | None:
    """Why a verdict is not what was expected; None: it is."""
    if verdict.word != expected.word:
        return f"expected {expected.word} ({expected.said or expected.why}), got {verdict.word}: {verdict.why}"
    if expected.word == "refused" and expected.said not in verdict.why:
        return f"refused, but not by the words {expected.said!r}: {verdict.why}"
    if expected.said and expected.said not in verdict.why + verdict.words:
        return f"not said: {expected.said!r}"
    return None
