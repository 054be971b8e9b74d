"""The descriptor of a mode. ``modes/<mode>/__init__.py`` defines it, ``MODES`` lists it, and the core loops over that list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from lightning_overlap.decision import Choices, Setting
from lightning_overlap.facts import Facts, Room
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.steps.schedule import Schedule


class Decide(Protocol):
    def __call__(self, config: Any, degrees: Degrees, facts: Facts, *, overlap: bool) -> Choices | None:
        """Decides every feature of the mode.

        Args:
            config: the mode's.
            degrees: the number of ranks along each axis. A mode knows no more of other modes.
            facts: about the run.
            overlap: False turns every overlap off, and keeps the layout.

        Returns:
            The choices; None if the mode is off.

        Raises:
            ConfigError: a setting of the user cannot be met.
        """


class Look(Protocol):
    def __call__(self, model: nn.Module, config: Any, roles: Mapping[str, str]) -> object | None:
        """Finds the facts about the model on which the mode's choices depend. Called before :class:`Decide`.

        Args:
            model: the user's.
            config: the mode's.
            roles: by name of a part of the model, its role, from the user's ``parallel_plan``.

        Returns:
            An object of the mode's class of facts; None if the mode is off.

        Raises:
            ConfigError: the mode cannot shard this model.
        """


class Environment(Protocol):
    def __call__(self, config: Any, capability: int | None) -> Sequence[Setting]:
        """Lists the environment variables that the mode's overlap needs on CUDA.

        Args:
            config: the mode's.
            capability: the device's compute capability (major); None: unknown.
        """


class Scheduled(Protocol):
    def __call__(self, config: Any, choices: Any | None) -> Schedule | None:
        """Returns the schedule in which the mode runs a step in parts; None if it does not.

        Args:
            config: the mode's.
            choices: the mode's; None: the schedule as configured.
        """


class Alternatives(Protocol):
    def __call__(self, config: Any, degrees: Degrees, facts: Facts, room: Room) -> Iterable[Any]:
        """Lists configurations that may be faster or need less memory. Each differs in one setting; a size only grows.

        Args:
            config: the mode's.
            degrees: the number of ranks along each axis.
            facts: about the run, with those about the model as ``config`` shards it.
            room: what limits sizes.

        Returns:
            Configurations, of which some may be impossible: then :class:`Look` or :class:`Decide` refuses them.
        """


@dataclass(frozen=True, kw_only=True)
class ModeDescriptor:
    """One mode, for the code that loops over modes: plan, launch, strategy, benchmark, verification.

    Attributes:
        name: the first part of the labels of its transfers (``data`` of ``data.grads``), its key in a plan, and the name of the module
            of ``bench/peers`` with its peers, if it has any.
        section: its field in :class:`~lightning_overlap.config.OverlapConfig`.
        decide: see :class:`Decide`.
        mode_type: the mode's class; None if this version cannot run the mode.
        look: see :class:`Look`.
        environment: see :class:`Environment`.
        advice: by kind of transfer (``grads`` of ``data.grads``), what may help if it is exposed. The key ``bytes`` is for a link that
            is too slow, the empty key for all other transfers.
        schedule: see :class:`Scheduled`.
        alternatives: see :class:`Alternatives`.
        unchecked: settings that turn the mode's checks off, for a benchmark without transfers, whose numbers are wrong.
    """

    name: str
    section: str
    decide: Decide
    mode_type: type[OverlapMode] | None = None
    look: Look = lambda model, config, roles: None
    environment: Environment = lambda config, capability: ()
    advice: Mapping[str, str] = field(default_factory=dict)
    schedule: Scheduled = lambda config, choices: None
    alternatives: Alternatives = lambda config, degrees, facts, room: ()
    unchecked: Mapping[str, object] = field(default_factory=dict)

    def advise(self, kind: str) -> str:
        """The advice for a kind of transfer that is exposed."""
        fallback = self.advice.get("", "overlap: off, or a larger batch")
        return f"{self.section}: {self.advice.get(kind, fallback)}"


def in_order(modes: Iterable[ModeDescriptor]) -> list[tuple[ModeDescriptor, type[OverlapMode]]]:
    """The modes that can run, with their classes, in the order in which they are applied: from the outermost nesting inwards."""
    runnable = [(mode, mode.mode_type) for mode in modes if mode.mode_type is not None]
    return sorted(runnable, key=lambda pair: pair[1].nesting)
