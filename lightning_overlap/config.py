"""The user's request, and the number of ranks along each axis that follows from it."""

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
    """The user's request: the configurations of all modes, and settings that concern all of them.

    To add a mode from outside the package, list it in ``modes`` of a subclass, with a field for its configuration.

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
        """Returns the configuration of a mode, an object of the mode's class."""
        return getattr(self, mode.section)

    def degrees(self, world_size: int) -> Degrees:
        """Returns the size of each kind of parallelism in a world of ``world_size`` ranks.

        Raises:
            ConfigError: the product of the sizes is not ``world_size``, or the expert size does not divide the ranks of a stage.
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
                f"{named} needs a multiple of {product} ranks, and there are {world_size}. Change devices, num_nodes or a size"
            )
        data = world_size // product
        asked = self.data_parallel.size
        if asked not in ("auto", data):
            raise ConfigError(
                f"data_parallel.size={asked} with {named} (x {product}) needs {int(asked) * product} ranks, and there are "
                f"{world_size}. Start that many, or set data_parallel.size: {data} or auto"
            )
        return Degrees(
            pipeline=self.pipeline_parallel.size,
            data=data,
            context=self.context_parallel.size,
            tensor=self.tensor_parallel.size,
            expert=self.expert_parallel.size,
        )
