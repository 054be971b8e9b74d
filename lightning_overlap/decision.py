"""What was decided, and why. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ConfigError(ValueError):
    """A request that cannot be met. Says what was asked, why it cannot be, and what to do."""


MOST = 1 << 16
"""Ranks, stages, microbatches: more of them is a mistake, and plans for it would never be made."""


def check_count(name: str, value: object, *, most: int | None = MOST) -> None:
    """Refuses what is no count of at least 1: also True, 2.0 and "2", which Python would take for one somewhere.

    Args:
        name: as in the configuration.
        value: what was given.
        most: the largest.

    Raises:
        ConfigError: naming all three.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")


@dataclass(frozen=True)
class Decision:
    """One line of the plan: what was asked of a feature, what runs, and why."""

    feature: str
    asked: str
    choice: str
    why: str


def settle(
    feature: str,
    asked: bool | str,
    *,
    best: str,
    because: str,
    blockers: Sequence[tuple[bool, str]] = (),
    otherwise: str = "off",
) -> Decision:
    """Decides one feature: ``"auto"`` may decline with its reasons, an explicit request may not.

    Args:
        feature: name as in the configuration, ``data_parallel.overlap_grad_reduce``.
        asked: False, True or ``"auto"``.
        best: the choice if nothing is in the way.
        because: its reason.
        blockers: (applies, reason and fix) of whatever can be in the way.
        otherwise: the choice if something is.

    Raises:
        ConfigError: an explicit request is blocked; with every reason.
    """
    if asked is False:
        return Decision(feature, "off", "off", "asked for")
    reasons = [reason for applies, reason in blockers if applies]
    if reasons and asked is True:
        raise ConfigError(f"{feature}: true cannot run here: {'; '.join(reasons)}")
    said = "auto" if asked == "auto" else "on"
    return Decision(feature, said, otherwise, "; ".join(reasons)) if reasons else Decision(feature, said, best, because)
