"""What a run needs before its first step: environment, groups, memory for a deferred model, the same random numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_overlap import environment
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import Facts
from lightning_overlap.model.materialize import initialize, materialize, no_values_error
from lightning_overlap.plan import resolve
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import SharedBuffers, share
from lightning_overlap.ranks.world import all_gather_objects, has_nccl, make_group, world_size
from lightning_overlap.strategy.batches import BatchComparison
from lightning_overlap.strategy.seams import Preemption


def prepare_launch(config: OverlapConfig, ranks: int, device: torch.device, precision: str, backend: str | None) -> None:
    """Refuses what cannot run, and sets the environment that CUDA reads when it starts. Before any process is started.

    Args:
        config: what was asked for.
        ranks: of the whole run.
        device: this rank's.
        precision: Lightning's name of it.
        backend: ``"gloo"``, ``"nccl"``, or None for the device's.

    Raises:
        ConfigError: a request that cannot be met.
    """
    if backend == "nccl" and (device.type != "cuda" or not has_nccl()):
        raise ConfigError(
            f"process_group_backend='nccl' needs CUDA, and a torch with NCCL; this is {device.type}: leave it out, or use 'gloo'"
        )
    resolve(config, Facts(world_size=ranks, device=device.type, precision=precision))
    if device.type == "cuda":
        settings = environment.wanted(config, environment.capability())
        for line in environment.apply(settings, os.environ, started=torch.cuda.is_initialized()):
            rank_zero_info(f"lightning_overlap: {line}")


class SharedRun:
    """What ranks share while a Trainer runs. Made on every rank, in the same order.

    Args:
        mesh: the ranks.
        timeout: how long a transfer may take.

    Attributes:
        samples: ranks that hold the same of the model and see different data.
        buffers: in a fit: the buffers that training writes.
        preemption: in a fit: signals, which act on all ranks at the same batch.
        comparison: in a fit: of the batches of ranks that share them; None where no ranks do.
    """

    def __init__(self, mesh: ParallelMesh, timeout: timedelta) -> None:
        self._mesh = mesh
        self._timeout = timeout
        self.samples = mesh.group("samples", timeout)
        self.buffers: SharedBuffers | None = None
        self.preemption: Preemption | None = None
        self.comparison: BatchComparison | None = None
        self._batch: Group | None = None

    def start_fit(self, trainer: Trainer, model: nn.Module, device: torch.device) -> None:
        """Makes what a fit needs, and gives ranks that share a batch the same random numbers. Collective."""
        # A group of its own: what a batch posts is read a batch later, when ranks may stand elsewhere.
        everyone = [range(world_size())]
        signals = make_group(everyone, "signals", self._timeout, backend="gloo", gathers=False, threads=False)
        self.preemption = Preemption(trainer, signals)
        self.buffers = SharedBuffers(model, self.samples, signals)
        self._batch = self._mesh.group("batch", self._timeout)
        if self._batch.size > 1:
            self.comparison = BatchComparison(self._batch)
            share_random_state(self._batch, device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each training step."""
        if self.buffers is None:
            yield
            return
        self.buffers.before_forward()
        yield
        self.buffers.after_forward()

    def close(self, *, complete: bool) -> None:
        """Ends the groups, and gives the Trainer its own methods back.

        Args:
            complete: wait for what is in flight; False after a failure, when it may never come.
        """
        if self.buffers is not None and complete:
            self.buffers.finish()
        if self.preemption is not None:
            self.preemption.close(complete=complete)
        for group in (self.samples, self._batch):
            if group is not None and complete:
                group.close()


def share_random_state(group: Group, device: torch.device) -> None:
    """Ranks of a group draw the same random numbers from here on: torch's, NumPy's and Python's. Collective.

    Ranks that share a batch need the same masks of dropout where the model is not cut, for example.
    """
    cuda = device.type == "cuda"
    mine = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
    (of_cpu, of_device), of_numpy, of_python = group.share_object((mine, numpy.random.get_state(), random.getstate()))
    numpy.random.set_state(of_numpy)
    random.setstate(of_python)
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)


def share_weights(module: nn.Module, timeout: timedelta) -> None:
    """Every rank gets the parameters and buffers of rank 0, by the device's backend. Collective."""
    group = make_group([range(world_size())], "weights", timeout, gathers=False, threads=False)
    share([*module.parameters(), *module.buffers()], group)
    group.close()


def give_memory(
    module: LightningModule,
    device: torch.device,
    holds: Callable[[str], bool],
    load: Callable[[], None],
    same_parts: list[list[int]],
    timeout: timedelta,
) -> None:
    """Gives memory and values to what this rank holds of a model on the meta device. Collective.

    Args:
        module: the user's.
        device: this rank's.
        holds: whether this rank holds a parameter or buffer, by name.
        load: loads a checkpoint, if there is one, once modules have initialised themselves.
        same_parts: the sets of ranks that hold the same: each has drawn its own numbers, and gets the first one's.
        timeout: how long a transfer may take.

    Raises:
        ConfigError: on every rank, if something gets no values.
    """
    made = materialize(module, device, holds)
    empty = initialize(module, made, load)
    if names := next(filter(None, all_gather_objects(empty) if world_size() > 1 else [empty]), None):
        raise no_values_error(names)  # the same on every rank
    group = make_group(same_parts, "made", timeout, gathers=False, threads=False)
    share([tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if holds(name)], group)
    group.close()
    rank_zero_info(
        f"lightning_overlap: {len(made)} parameters and buffers were on the meta device and are rank 0's; the rest is not here"
    )
