"""Configuration and gates of context parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_overlap.decision import ConfigError, Decision, check_count

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """Context parallelism. Only ``size=1`` is possible in this version."""

    size: int = 1
    """Ranks along the axis."""

    def __post_init__(self) -> None:
        check_count("context_parallel.size", self.size)


def decide(own: ContextParallel, whole: OverlapConfig, facts: Facts) -> list[Decision]:
    """The home of this mode's gates."""
    if own.size > 1:
        raise ConfigError(f"context_parallel.size={own.size}: context parallelism is not in this version; set context_parallel: 1")
    return [Decision("context_parallel", "1", "off", "its size is 1")]
