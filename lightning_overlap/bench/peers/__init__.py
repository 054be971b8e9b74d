"""What else can train the same module, with the settings that suit it best: a file for each mode that has peers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from lightning_overlap.config import OverlapConfig
from lightning_overlap.plan import Plan

Peer = tuple[Callable[[], Strategy], Callable[[LightningModule], LightningModule]]
"""A maker of the strategy, and what has to be done to the module first."""


def find_peers(plan: Plan, config: OverlapConfig, backend: str) -> dict[str, Peer]:
    """Gives the peers by name: those of the one mode that has all the ranks. Mixtures have none.

    A mode's peers are made by ``peers(config, ranks, backend)`` of the module here that has the mode's name. Those of another mode
    would train on another batch a step.

    Args:
        plan: of the run that they are compared with.
        config: what it was asked for.
        backend: of the process group, the same for all.
    """
    sharding = [mode for mode in plan.modes if mode.name in plan.choices and plan.choices[mode.name].size.value > 1]
    if len(sharding) != 1 or find_spec(f"{__name__}.{sharding[0].name}") is None:
        return {}
    module = import_module(f"{__name__}.{sharding[0].name}")
    return module.peers(config, plan.facts.world_size, backend)
