"""Decisions with their reasons, and the checks that all configurations share. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ConfigError(ValueError):
    """A request that cannot be met. The message has the request, the reason and the remedy."""


MOST = 1 << 16
"""Largest number of ranks, stages or microbatches. A larger one is a mistake, and its plan would take forever."""


def check_count(name: str, value: object, *, most: int | None = MOST) -> None:
    """Refuses a value that is not an integer of at least 1; also True, 2.0 and "2", which Python accepts in places.

    Args:
        name: as in the configuration.
        value: the configured value.
        most: the largest valid value; None: there is none.

    Raises:
        ConfigError: the value is not valid.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")


def check_switch(name: str, value: object) -> None:
    """Refuses a value other than True, False and ``"auto"``; also 1 and 0.0, which are equal to a bool.

    Args:
        name: as in the configuration.
        value: the configured value.

    Raises:
        ConfigError: the value is not valid.
    """
    if type(value) is not bool and value != "auto":
        raise ConfigError(f"{name} must be true, false or auto, got {value!r}")


def check_flags(section: str, settings: Any) -> None:
    """Refuses values other than True and False of a dataclass's ``bool`` fields; also 1 and ``"false"``, which Python takes for true.

    Args:
        section: the dataclass's name in the configuration.
        settings: the dataclass.

    Raises:
        ConfigError: a value is not valid.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type in (bool, "bool") and type(value) is not bool:
            raise ConfigError(f"{section}.{field.name} must be true or false, got {value!r}")


def check_word(name: str, value: object, words: Sequence[str]) -> None:
    """Refuses a value that is not in a list of words.

    Args:
        name: as in the configuration.
        value: the configured value.
        words: the valid values, at least two.

    Raises:
        ConfigError: the value is not valid.
    """
    if value not in words:
        raise ConfigError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, got {value!r}")


@dataclass(frozen=True)
class Choice(Generic[T_co]):
    """The decision about one feature.

    Attributes:
        value: the decision; code reads this.
        asked: the configured value; None if there is nothing to configure.
        why: the reason, as the plan prints it.
    """

    value: T_co
    asked: object
    why: str


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The decisions for one mode. A mode's subclass has a :class:`Choice` for each feature; the plan prints all of them.

    A field that is neither a ``Choice`` nor a mapping of names to them is for the mode itself, and is not printed.

    Attributes:
        size: the number of ranks over which the mode shards.
        first_step_blocker: why the first step cannot be compared with the unsharded model; empty if it can.
    """

    size: Choice[int]
    first_step_blocker: str = ""

    def features(self) -> dict[str, Choice[object]]:
        """Returns the choices by feature; those of a mapping are named ``field.key``."""
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
    """A value that a mode needs in an environment variable before CUDA starts, and the reason."""

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
        best: the value if no blocker applies.
        otherwise: the value if a blocker applies, or False is configured.
        because: the reason for ``best``.
        blockers: (applies, reason and fix) of everything that can prevent ``best``.
        overlap: False if the feature is an overlap and ``overlap="off"`` is configured, which decides alone.

    Raises:
        ConfigError: a blocker applies to an explicit request. The message has the reasons of all that apply.
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
    """Refuses a request if a reason against it applies.

    Args:
        request: as configured, ``tensor_parallel.size=2``.
        reasons: (applies, reason and fix) of everything that can prevent it.
        advice: a remedy for all of them, appended to the message.

    Raises:
        ConfigError: a reason applies. The message has all that apply.
    """
    if applying := [reason for applies, reason in reasons if applies]:
        raise ConfigError(f"{request} cannot run here: {'; '.join(applying)}{advice}")
