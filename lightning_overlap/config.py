"""What the user asks for, and the arithmetic of degrees. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.roles import parse_role
from lightning_overlap.modes.context.config import ContextParallel
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.expert.config import ExpertParallel
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.modes.tensor.config import TensorParallel
from lightning_overlap.ranks.degrees import Degrees


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """The five modes' configurations, the switch over all overlaps, and the roles of the model's parts by name."""

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
        if self.overlap not in ("auto", "off"):
            raise ConfigError(f"overlap must be auto or off, got {self.overlap!r}")
        if self.verify_first_step not in (True, False, "auto"):
            raise ConfigError(f"verify_first_step must be true, false or auto, got {self.verify_first_step!r}")

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
