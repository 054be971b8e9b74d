"""What the user asks for, and the number of ranks along each axis that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lightning_overlap.decision import ConfigError, check_switch, check_word
from lightning_overlap.model.roles import parse_role
from lightning_overlap.modes import MODES
from lightning_overlap.modes.context.config import ContextParallel
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.expert.config import ExpertParallel
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.modes.tensor.config import TensorParallel
from lightning_overlap.ranks.degrees import Degrees


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """What the user asks for: the five modes' configurations, and what concerns all of them.

    A mode from outside of the package takes part by a subclass that lists it in ``modes`` and has a field for its configuration.

    Attributes:
        modes: descriptors of all modes.
        overlap: ``"off"`` keeps the layout and turns every overlap off.
        parallel_plan: roles of the model's parts, by name.
        verify_first_step: compare the first step with that of the unsharded model.
    """

    modes: ClassVar[tuple[ModeDescriptor, ...]] = MODES

    data_parallel: DataParallel = field(default_factory=DataParallel)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    pipeline_parallel: PipelineParallel = field(default_factory=PipelineParallel)
    context_parallel: ContextParallel = field(default_factory=ContextParallel)
    expert_parallel: ExpertParallel = field(default_factory=ExpertParallel)
    overlap: Literal["auto", "off"] = "auto"
    parallel_plan: dict[str, str] = field(default_factory=dict)
    verify_first_step: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for role in self.parallel_plan.values():
            parse_role(role)
        check_word("overlap", self.overlap, ("auto", "off"))
        check_switch("verify_first_step", self.verify_first_step)

    def of(self, mode: ModeDescriptor) -> Any:
        """The configuration of a mode, an object of the mode's class."""
        return getattr(self, mode.section)

    def degrees(self, world_size: int) -> Degrees:
        """The size of each kind of parallelism, in a world of so many ranks.

        Raises:
            ConfigError: the sizes do not multiply to ``world_size``, or that of the experts does not divide the ranks of a stage.
        """
        others = {
            "pipeline_parallel": self.pipeline_parallel.size,
            "context_parallel": self.context_parallel.size,
            "tensor_parallel": self.tensor_parallel.size,
        }
        product = math.prod(others.values())
        named = " x ".join(f"{name}={size}" for name, size in others.items() if size > 1) or "the other axes"
        if world_size % product:
            raise ConfigError(
                f"{named} need a multiple of {product} ranks, and there are {world_size}: change devices, num_nodes or a size"
            )
        left = world_size // product
        asked = self.data_parallel.size
        if asked not in ("auto", left):
            raise ConfigError(
                f"data_parallel.size={asked} with {named} (x {product}) needs {int(asked) * product} ranks, and there are "
                f"{world_size}: start that many, or set data_parallel.size: {left} or auto"
            )
        return Degrees(
            pipeline=self.pipeline_parallel.size,
            data=left,
            context=self.context_parallel.size,
            tensor=self.tensor_parallel.size,
            expert=self.expert_parallel.size,
        )
