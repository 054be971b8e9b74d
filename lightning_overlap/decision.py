"""What was decided, and why; and the checks that all configurations share. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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


def check_switch(name: str, value: object) -> None:
    """Refuses what is neither True, False nor ``"auto"``: also 1 and 0.0, which compare equal to a bool.

    Args:
        name: as in the configuration.
        value: what was given.

    Raises:
        ConfigError: naming both.
    """
    if type(value) is not bool and value != "auto":
        raise ConfigError(f"{name} must be true, false or auto, got {value!r}")


def check_word(name: str, value: object, words: Sequence[str]) -> None:
    """Refuses what is none of some words.

    Args:
        name: as in the configuration.
        value: what was given.
        words: the values that are allowed.

    Raises:
        ConfigError: naming all three.
    """
    if value not in words:
        raise ConfigError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


@dataclass(frozen=True)
class Choice(Generic[T_co]):
    """What runs of one feature, what was asked for, and why.

    Attributes:
        value: what runs; code reads this.
        asked: the request as it was configured; None if there is nothing to configure.
        why: the reason, as a sentence of the plan.
    """

    value: T_co
    asked: object
    why: str


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was decided for one mode. A mode's subclass has a :class:`Choice` for each feature; the plan prints all of them.

    A field that is no ``Choice`` (and no mapping of names to them) is for the mode itself, and is not printed.

    Attributes:
        size: the number of ranks over which the mode shards.
        first_step_blocker: why the first step cannot be compared with the unsharded model; empty if it can.
    """

    size: Choice[int]
    first_step_blocker: str = ""

    def features(self) -> dict[str, Choice[object]]:
        """The choices by feature; those of a mapping are named ``field.key``."""
        named: dict[str, Choice[object]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Choice):
                named[field.name] = value
            elif isinstance(value, Mapping):
                named |= {f"{field.name}.{key}": each for key, each in value.items() if isinstance(each, Choice)}
        return named


@dataclass(frozen=True)
class Setting:
    """A value that a mode wants an environment variable to have before CUDA starts, and the reason."""

    variable: str
    value: str
    why: str


def settle(
    feature: str,
    asked: bool | str,
    *,
    best: T,
    otherwise: T,
    because: str,
    blockers: Sequence[tuple[bool, str]] = (),
    overlap: bool = True,
) -> Choice[T]:
    """Decides one feature: ``"auto"`` may decline with its reasons, an explicit request may not.

    Args:
        feature: name as in the configuration, ``data_parallel.overlap_grad_reduce``.
        asked: False, True or ``"auto"``.
        best: what runs if nothing is in the way.
        otherwise: what runs if something is, or if False was asked for.
        because: the reason for ``best``.
        blockers: (applies, reason and fix) of whatever can be in the way.
        overlap: False if the feature is an overlap, and ``overlap="off"`` turns it off, whatever was asked for.

    Raises:
        ConfigError: an explicit request is blocked; with every reason.
    """
    if not overlap:
        return Choice(otherwise, asked, 'overlap="off" turns every overlap off')
    if asked is False:
        return Choice(otherwise, asked, "as configured")
    reasons = [reason for applies, reason in blockers if applies]
    if reasons and asked is True:
        raise ConfigError(f"{feature}: true cannot run here: {'; '.join(reasons)}")
    return Choice(otherwise, asked, "; ".join(reasons)) if reasons else Choice(best, asked, because)


def refuse(request: str, reasons: Sequence[tuple[bool, str]], advice: str = "") -> None:
    """Refuses a request that something is in the way of.

    Args:
        request: as configured, ``tensor_parallel.size=2``.
        reasons: (applies, reason and fix) of whatever can be in the way.
        advice: what helps against all of them.

    Raises:
        ConfigError: with every reason that applies.
    """
    if applying := [reason for applies, reason in reasons if applies]:
        raise ConfigError(f"{request} cannot run here: {'; '.join(applying)}{advice}")
