"""Other strategies that can train the same module, each with its best settings: a file for each mode that has such peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.plan import Plan
from lightning_overlap.ranks.world import all_gather_objects

T = TypeVar("T")
Peer = tuple[Callable[[], Strategy], Callable[[LightningModule], LightningModule]]
"""Two functions: one makes the strategy, one prepares the module."""


def find_peers(plan: Plan, config: OverlapConfig, backend: str) -> dict[str, Peer]:
    """Returns the peers by name, if each mode that runs has all the ranks. Other mixtures of modes have none.

    The function ``peers(config, ranks, backend)`` of the module with the mode's name makes them. Experts are spread over
    ranks of other modes: their function makes none where its peer would train on another batch a step.

    Args:
        plan: of the measured run.
        config: of the measured run.
        backend: of the process group.
    """
    sizes = {mode.name: plan.choices[mode.name].size.value for mode in plan.modes if mode.name in plan.choices}
    ranks = plan.facts.world_size
    if any(size not in (1, ranks) for size in sizes.values()):
        return {}
    names = [f"{__name__}.{name}" for name, size in sizes.items() if size > 1]
    peers: dict[str, Peer] = {}
    for name in names:
        if find_spec(name) is not None:
            peers |= import_module(name).peers(config, ranks, backend)
    return peers


def sharded_when_configured(module: LightningModule, shard: Callable[[Any], None]) -> LightningModule:
    """Returns a copy of a module that is sharded at the end of its ``configure_model``, where strategies have connected the ranks.

    Args:
        module: the user's.
        shard: shards the copy.
    """

    def configure_model(self: Any) -> None:
        type(module).configure_model(self)
        shard(self)

    copied = copy.copy(module)
    copied.__class__ = type(type(module).__name__, (type(module),), {"configure_model": configure_model})
    return copied


def made_by_all(make: Callable[[], T]) -> T:
    """Makes something on all ranks. Collective over the world.

    Raises:
        ConfigError: on every rank, if one of them could not make it: the others would wait for it.
    """
    reason = made = None
    try:
        made = make()
    except Exception as error:  # of any kind: another library's
        reason = f"{error}"
    if reasons := [each for each in all_gather_objects(reason) if each is not None]:
        raise ConfigError(reasons[0])
    assert made is not None, "what cannot be made raises an error"
    return made
