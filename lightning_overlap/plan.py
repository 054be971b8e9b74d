"""The resolved plan. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_overlap.decision import Decision, settle
from lightning_overlap.modes.context.config import decide as decide_context
from lightning_overlap.modes.data.config import decide as decide_data
from lightning_overlap.modes.expert.config import decide as decide_expert
from lightning_overlap.modes.pipeline.config import decide as decide_pipeline
from lightning_overlap.modes.tensor.config import decide as decide_tensor

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts
    from lightning_overlap.ranks.degrees import Degrees


@dataclass(frozen=True)
class Plan:
    """What runs, and why."""

    degrees: Degrees
    facts: Facts
    decisions: tuple[Decision, ...]

    def choice(self, feature: str) -> str:
        """What runs of a feature; ``off`` where the whole mode is off."""
        return next((d.choice for d in self.decisions if d.feature == feature), "off")

    def explain(self) -> str:
        """The plan as text: a head, then a line for each feature: what was asked, what runs, why."""
        sizes = self.degrees
        facts = self.facts
        head = [
            f"lightning_overlap: {facts.world_size} ranks on {facts.device} with {facts.backend}, {facts.precision}; "
            f"pipeline {sizes.pipeline} x data {sizes.data} x expert {sizes.expert} x context {sizes.context} x tensor {sizes.tensor}",
        ]
        rows = [(d.feature, d.asked, d.choice, d.why) for d in self.decisions]
        table = [("feature", "asked", "runs", "why"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in table]
        return "\n".join(head + ["  " + line for line in lines])


def resolve(config: OverlapConfig, facts: Facts) -> Plan:
    """Decides every feature.

    Raises:
        ConfigError: an explicit request cannot be met.
    """
    degrees = config.degrees(facts.world_size)
    decisions = [
        *decide_pipeline(config.pipeline_parallel, config, facts),
        *decide_tensor(config.tensor_parallel, config, facts),
        *decide_context(config.context_parallel, config, facts),
        *decide_expert(config.expert_parallel, config, facts),
        *decide_data(config.data_parallel, config, facts),
        *_first_step(config, facts, is_cut=degrees.data < facts.world_size),
    ]
    return Plan(degrees, facts, tuple(decisions))


def _first_step(config: OverlapConfig, facts: Facts, *, is_cut: bool) -> list[Decision]:
    """Whether the first step is compared with that of the model whole."""
    if not is_cut:
        return []
    backend = config.tensor_parallel.backend
    return [
        settle(
            "verify_first_step",
            config.verify_first_step,
            best="on",
            because="the first batch is computed twice more, whole and cut: loss, gradients and buffers must be the same; a rank "
            "holds all of the model for that",
            blockers=[
                (facts.deferred, "the model was made on the meta device, and is whole on no rank"),
                (not facts.automatic_optimization, "with manual optimization training_step steps optimizers itself"),
                (facts.compiled, "compiled code would be compiled once more for it"),
                (backend != "p2p", f"tensor_parallel.backend {backend} computes in bf16, and in the shapes of the first step only"),
            ],
        )
    ]
