"""What is known of a batch without knowing what it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import leaves
from lightning_overlap.ranks.group import Group
from lightning_overlap.steps.microbatches import shapes_of

CLOSE = 1e-3
"""Relative difference that rounding may make in a loss that is computed alike."""


def digest(batch: Any) -> Hashable:
    """Tells batches apart, also those that have the same samples in another order: a hash of all bytes, and of plain values."""
    content = hashlib.blake2b(digest_size=16)
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            values = leaf.detach().to_dense() if leaf.layout is not torch.strided else leaf.detach()
            content.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | int | float | None):
            content.update(repr(leaf).encode())
    return shapes_of(batch), content.hexdigest()


def refuse_different(batch: Any, group: Group) -> None:
    """Ranks that share a batch and see different ones would train on nothing. Collective.

    Raises:
        ConfigError: on every rank of the group.
    """
    everyone = group.all_gather_objects(digest(batch))
    if different := [group.ranks[r] for r, said in enumerate(everyone) if said != everyone[0]]:
        raise ConfigError(
            f"ranks {different} have read another batch than rank {group.ranks[0]}, with which they share each batch: a data loader "
            "that shuffles or augments on its own must draw the same on all ranks (seed_everything, or Lightning's sampler)"
        )


def refuse_other_loss(output: Any, group: Group) -> None:
    """Ranks that share a batch come to the same loss, or one of them trains on something else. Collective.

    Args:
        output: of ``training_step``.
        group: the ranks.

    Raises:
        ConfigError: on every rank of the group.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    mine = float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else None
    everyone = group.all_gather_objects(mine)
    told = [loss for loss in everyone if loss is not None and math.isfinite(loss)]
    if told and max(told) - min(told) > CLOSE * max(map(abs, told)):
        raise ConfigError(
            f"ranks {list(group.ranks)} share a batch and come to the losses {everyone}: something in training_step differs between "
            "them. It may read hidden states between blocks, of which a rank has its part of the tokens (set "
            "tensor_parallel.sequence_parallel: false), or draw other random numbers (call seed_everything)"
        )
