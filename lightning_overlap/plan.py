"""The resolved plan: the decisions for every mode, with their reasons."""

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
    """The decisions for a run.

    Attributes:
        degrees: ranks along each axis.
        facts: with the configuration, the input of the plan.
        modes: descriptors of all modes, also of those that are off.
        choices: by the name of each mode that runs, its decisions.
        verify_first_step: whether the first step is compared with that of the unsharded model.
    """

    degrees: Degrees
    facts: Facts
    modes: tuple[ModeDescriptor, ...]
    choices: Mapping[str, Choices]
    verify_first_step: Choice[bool]

    def features(self) -> dict[str, Choice[object]]:
        """Returns all choices by feature, named as in the configuration: ``data_parallel.bucket_size``."""
        return {
            f"{mode.section}.{feature}": choice
            for mode in self.modes
            if mode.name in self.choices
            for feature, choice in self.choices[mode.name].features().items()
        }

    def explain(self) -> str:
        """Formats the plan: a head, then a line for each feature with the configured value, the decision and the reason."""
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
    """Formats a value as the plan prints it and the configuration accepts it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def resolve(config: OverlapConfig, facts: Facts) -> Plan:
    """Decides every feature.

    Args:
        config: the request.
        facts: about the run.

    Raises:
        ConfigError: an explicit request cannot be met.
    """
    degrees = config.degrees(facts.world_size)
    overlap = config.overlap != "off"
    decided = {mode.name: mode.decide(config.of(mode), degrees, facts, overlap=overlap) for mode in config.modes}
    choices = {name: each for name, each in decided.items() if each is not None}
    is_sharded = degrees.data < facts.world_size or degrees.expert > 1
    return Plan(degrees, facts, config.modes, choices, _first_step(config, facts, choices, is_sharded=is_sharded))


def _first_step(config: OverlapConfig, facts: Facts, choices: Mapping[str, Choices], *, is_sharded: bool) -> Choice[bool]:
    """Decides whether the first step is compared with that of the unsharded model. No mode shards the model: no reason is printed."""
    if not is_sharded:
        return Choice(False, config.verify_first_step, "")
    return settle(
        "verify_first_step",
        config.verify_first_step,
        best=True,
        otherwise=False,
        because="the first batch is computed twice before training, by the unsharded and the sharded model: loss, gradients and "
        "buffers must be equal; each rank holds the unsharded model for that time",
        blockers=[
            (facts.deferred, "the model was made on the meta device, so no rank has the unsharded model"),
            (not facts.automatic_optimization, "with manual optimization training_step would update the parameters"),
            (facts.compiled, "the compiled model would be compiled a second time for it"),
            *((bool(mode.first_step_blocker), mode.first_step_blocker) for mode in choices.values()),
        ],
    )
