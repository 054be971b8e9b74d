"""What the core knows of a mode: one descriptor, which ``modes/<mode>/__init__.py`` gives and ``MODES`` lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from lightning_overlap.decision import Choices, Setting
from lightning_overlap.facts import Facts
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.steps.schedule import Schedule


class Decide(Protocol):
    def __call__(self, config: Any, degrees: Degrees, facts: Facts, *, overlap: bool) -> Choices | None:
        """Decides every feature of the mode: the home of its gates.

        Args:
            config: the mode's.
            degrees: ranks along each axis: what a mode may know of its neighbours.
            facts: about the run.
            overlap: False: every overlap is off, and the layout stays.

        Returns:
            The choices; None if the mode is off.

        Raises:
            ConfigError: an explicit request cannot be met.
        """


class Look(Protocol):
    def __call__(self, model: nn.Module, config: Any, roles: Mapping[str, str]) -> object | None:
        """Finds what the mode's choices depend on in the model, none of which has been taken yet.

        Args:
            model: the user's.
            config: the mode's.
            roles: of the model's parts, by name, as the user gave them.

        Returns:
            An object of the mode's class of facts; None if the mode has nothing to do.

        Raises:
            ConfigError: the mode cannot shard this model.
        """


class Environment(Protocol):
    def __call__(self, config: Any, capability: int | None) -> Sequence[Setting]:
        """Lists the environment variables that the mode wants on CUDA while its overlap is on.

        Args:
            config: the mode's.
            capability: the device's compute capability (major); None if it is not known.
        """


class Scheduled(Protocol):
    def __call__(self, config: Any, choices: Any | None) -> Schedule | None:
        """Gives the schedule in which the mode runs a step in parts.

        Args:
            config: the mode's.
            choices: what was decided for the mode; None for the schedule as configured.
        """


@dataclass(frozen=True, kw_only=True)
class ModeDescriptor:
    """One mode, for everybody who loops over modes: plan, launch, strategy, benchmark, verification.

    Attributes:
        name: the first part of the labels of its transfers (``data`` of ``data.grads``), its key in a plan, and the name of the module
            of ``bench/peers`` with its peers, if it has any.
        section: its field in :class:`~lightning_overlap.config.OverlapConfig`.
        decide: see :class:`Decide`.
        mode_type: the class that runs it; None if it cannot run in this version.
        look: see :class:`Look`.
        environment: see :class:`Environment`.
        advice: by kind of transfer (``grads`` of ``data.grads``), what may help where it is exposed; under ``bytes`` what may help
            where the link is too slow, under an empty key what may help against anything else.
        schedule: see :class:`Scheduled`.
        unchecked: fields of its configuration for a benchmark without transfers, whose numbers are wrong: its checks are off.
    """

    name: str
    section: str
    decide: Decide
    mode_type: type[OverlapMode] | None = None
    look: Look = lambda model, config, roles: None
    environment: Environment = lambda config, capability: ()
    advice: Mapping[str, str] = field(default_factory=dict)
    schedule: Scheduled = lambda config, choices: None
    unchecked: Mapping[str, object] = field(default_factory=dict)

    def advise(self, kind: str) -> str:
        """What may help where a kind of transfer is exposed."""
        fallback = self.advice.get("", "overlap: off, or a larger batch")
        return f"{self.section}: {self.advice.get(kind, fallback)}"


def in_order(modes: Iterable[ModeDescriptor]) -> list[tuple[ModeDescriptor, type[OverlapMode]]]:
    """The modes that can run, with their classes, in the order in which they are applied: from the outside of the model inwards."""
    runnable = [(mode, mode.mode_type) for mode in modes if mode.mode_type is not None]
    return sorted(runnable, key=lambda pair: pair[1].nesting)
