"""What was decided, and why. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ConfigError(ValueError):
    """A request that cannot be met. Says what was asked, why it cannot be, and what to do."""


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
