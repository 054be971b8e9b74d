"""Configuration and gates of pipeline parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_overlap.decision import ConfigError, Decision

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts


@dataclass(frozen=True, kw_only=True)
class PipelineParallel:
    """Pipeline parallelism. Only ``size=1`` is possible in this version."""

    size: int = 1
    """Ranks along the axis."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"pipeline_parallel.size must be at least 1, got {self.size}")


def decide(own: PipelineParallel, whole: OverlapConfig, facts: Facts) -> list[Decision]:
    """The home of this mode's gates."""
    if own.size > 1:
        raise ConfigError(f"pipeline_parallel.size={own.size}: pipeline parallelism is not in this version; set pipeline_parallel: 1")
    return [Decision("pipeline_parallel", "1", "off", "its size is 1")]
