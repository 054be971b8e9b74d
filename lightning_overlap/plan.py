"""The resolved plan: what runs in every mode, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import Choice, Choices, settle
from lightning_overlap.facts import Facts
from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.tables import WIDTH, as_text


@dataclass(frozen=True)
class Plan:
    """What runs, and why.

    Attributes:
        degrees: ranks along each axis.
        facts: what the plan was made from, besides the configuration.
        modes: descriptors of all modes, also of those that are off.
        choices: what was decided for each mode that runs, by the mode's name.
        verify_first_step: whether the first step is compared with that of the unsharded model.
    """

    degrees: Degrees
    facts: Facts
    modes: tuple[ModeDescriptor, ...]
    choices: Mapping[str, Choices]
    verify_first_step: Choice[bool]

    def features(self) -> dict[str, Choice[object]]:
        """All choices by feature, named as in the configuration: ``data_parallel.bucket_size``."""
        return {
            f"{mode.section}.{feature}": choice
            for mode in self.modes
            if mode.name in self.choices
            for feature, choice in self.choices[mode.name].features().items()
        }

    def explain(self) -> str:
        """The plan as text: a head, then a line for each feature: what was asked for, what runs, and why."""
        running = [mode for mode in self.modes if mode.name in self.choices]
        off = [mode.section for mode in self.modes if mode.name not in self.choices]
        axes = " x ".join(f"{mode.name} {self.choices[mode.name].size.value}" for mode in running) or "nothing to shard"
        facts = self.facts
        ranks = "1 rank" if facts.world_size == 1 else f"{facts.world_size} ranks"
        head = f"lightning_overlap: {ranks} on {facts.device} with {facts.backend}, precision {facts.precision}: {axes}"
        rows = []
        for mode in running:
            for feature, choice in self.choices[mode.name].features().items():
                rows.append(_row(mode.section if feature == "size" else f"  {feature}", choice))
        if self.verify_first_step.why:
            rows.append(_row("verify_first_step", self.verify_first_step))
        lines = textwrap.wrap(head, WIDTH)
        if off:
            lines += textwrap.wrap(f"off, with a size of 1: {', '.join(off)}", WIDTH)
        if rows:
            lines += ["", as_text(("feature", "asked", "runs", "why"), rows)]
        return "\n".join(lines)


def _row(name: str, choice: Choice[object]) -> tuple[str, str, str, str]:
    return name, _words(choice.asked), _words(choice.value), choice.why


def _words(value: object) -> str:
    """A value as the plan prints it, and as the configuration takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def resolve(config: OverlapConfig, facts: Facts) -> Plan:
    """Decides every feature.

    Raises:
        ConfigError: an explicit request cannot be met.
    """
    degrees = config.degrees(facts.world_size)
    overlap = config.overlap != "off"
    decided = {mode.name: mode.decide(config.of(mode), degrees, facts, overlap=overlap) for mode in config.modes}
    choices = {name: each for name, each in decided.items() if each is not None}
    return Plan(degrees, facts, config.modes, choices, _first_step(config, facts, choices, is_sharded=degrees.data < facts.world_size))


def _first_step(config: OverlapConfig, facts: Facts, choices: Mapping[str, Choices], *, is_sharded: bool) -> Choice[bool]:
    """Whether the first step is compared with that of the unsharded model; without a reason where nothing shards the model."""
    if not is_sharded:
        return Choice(False, config.verify_first_step, "")
    return settle(
        "verify_first_step",
        config.verify_first_step,
        best=True,
        otherwise=False,
        because="the first batch is computed twice more, by the unsharded and the sharded model: loss, gradients and buffers must be "
        "the same; each rank holds the whole model for that time",
        blockers=[
            (facts.deferred, "the model was made on the meta device, and is whole on no rank"),
            (not facts.automatic_optimization, "with manual optimization training_step steps optimizers itself"),
            (facts.compiled, "compiled code would be compiled once more for it"),
            *((bool(mode.first_step_blocker), mode.first_step_blocker) for mode in choices.values()),
        ],
    )
