"""Checks that batches and data loaders agree between ranks."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import all_gather_objects
from lightning_overlap.steps.microbatches import shapes_of

CHECKED_BATCHES = 3
"""How many batches at the start of a fit are compared between the ranks that share them."""
CLOSE = 1e-3
"""Relative difference that rounding may make between two ranks' losses of the same batch."""


def digest(batch: Any) -> Hashable:
    """Identifies a batch by the shapes of its tensors and a hash of their bytes and of plain values: the order of samples counts."""
    content = hashlib.blake2b(digest_size=16)
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            values = leaf.detach().to_dense() if leaf.layout is not torch.strided else leaf.detach()
            content.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, str | int | float | None):
            content.update(repr(leaf).encode())
    return shapes_of(batch), content.hexdigest()


class BatchComparison:
    """Compares the first batches of a fit, and their losses, between the ranks that share each batch.

    Args:
        group: ranks that share each batch.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._remaining = CHECKED_BATCHES

    def next_batch(self, batch: Any) -> bool:
        """Compares a batch, if it is one of the first. Collective.

        Returns:
            Whether it was compared, so that its loss must be compared too.

        Raises:
            ConfigError: on every rank of the group, if ranks loaded different batches.
        """
        if not self._remaining:
            return False
        self._remaining -= 1
        digests = self._group.all_gather_objects(digest(batch))
        if different := [self._group.ranks[r] for r, other in enumerate(digests) if other != digests[0]]:
            raise ConfigError(
                f"ranks {different} loaded a different batch from rank {self._group.ranks[0]}. These ranks share each batch, so a "
                "data loader that shuffles or augments must draw the same random numbers on all of them. Call seed_everything, or "
                "use Lightning's sampler"
            )
        return True

    def loss(self, output: Any) -> None:
        """Compares the loss of a batch. Collective.

        Args:
            output: the output of ``training_step``.

        Raises:
            ConfigError: on every rank of the group, if the losses differ.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else output
        number = float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else None
        losses = self._group.all_gather_objects(number)
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        if finite and max(finite) - min(finite) > CLOSE * max(map(abs, finite)):
            raise ConfigError(
                f"ranks {list(self._group.ranks)} share a batch but computed different losses: {losses}. Either training_step reads "
                "hidden states between blocks, where a rank has only its part of the tokens: set tensor_parallel.sequence_parallel: "
                "false. Or it draws different random numbers on each rank: call seed_everything"
            )


def refuse_empty(dataloader: object, module: LightningModule | None) -> None:
    """Refuses a data loader that is empty on some ranks only. Collective.

    Raises:
        ConfigError: on every rank, if some ranks have no batch and others have.
    """
    counts = all_gather_objects(sized_len(dataloader))
    if 0 in counts and any(counts) and not (module and module.allow_zero_length_dataloader_with_multiple_devices):
        empty = [rank for rank, count in enumerate(counts) if count == 0]
        raise ConfigError(
            f"ranks {empty} have no batch, and other ranks have some. Use fewer ranks or a smaller batch, or set drop_last=False"
        )


def refuse_uneven(batches: Any, purpose: str = "training") -> None:
    """Refuses different numbers of batches, because all ranks communicate in every batch. Collective.

    Args:
        batches: how many this rank has in an epoch; for validation, by data loader.
        purpose: of the batches: ``training`` or ``validation``.

    Raises:
        ConfigError: on every rank, if ranks have different numbers of batches.
    """
    counts = all_gather_objects(batches)
    if any(count != counts[0] for count in counts):
        limit = "train" if purpose == "training" else "val"
        raise ConfigError(
            f"ranks have different numbers of {purpose} batches, {counts} by rank, so some would wait forever. Distribute the data "
            f"evenly (Lightning's sampler does, drop_last=True helps), or set limit_{limit}_batches={min(counts)}"
        )


def refuse_uneven_validation(trainer: Trainer, modes: Iterable[OverlapMode]) -> None:
    """Refuses different numbers of validation batches where a forward waits for ranks with other samples. Collective there.

    Raises:
        ConfigError: on every rank, if ranks have different numbers of batches.
    """
    if any(mode.forward_spans_samples for mode in modes):
        refuse_uneven(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches, "validation")


def seed_workers(dataloader: Any, rank: int) -> None:
    """Seeds the workers of a data loader, if ``seed_everything(workers=True)`` asks for it and the user sets no ``worker_init_fn``.

    Args:
        dataloader: the user's data loader.
        rank: the rank along the data axis, because workers of ranks that share a batch must draw the same random numbers.
    """
    if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", 0) is None:
        dataloader.worker_init_fn = _WorkerSeed(rank)


class _WorkerSeed:
    """Seeds a worker of a data loader. A class, because spawned workers pickle it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, worker: int) -> None:
        pl_worker_init_function(worker, self._rank)
