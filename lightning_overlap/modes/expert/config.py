"""Configuration and gates of expert parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_overlap.decision import ConfigError, check_count
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Expert parallelism. Only ``size=1`` is possible in this version."""

    size: int = 1
    """Ranks along the axis."""

    def __post_init__(self) -> None:
        check_count("expert_parallel.size", self.size)


def decide(config: ExpertParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> None:
    """Refuses more than one rank.

    Raises:
        ConfigError: the size is more than 1.
    """
    if config.size > 1:
        raise ConfigError(f"expert_parallel.size={config.size}: expert parallelism is not in this version; set expert_parallel: 1")
