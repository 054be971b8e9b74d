"""Prepares a run before its first step: environment, groups, memory for a deferred model, equal random states."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.optim import Optimizer

from lightning_overlap import environment
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import Facts
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.model.materialize import initialize, materialize, no_values_error
from lightning_overlap.model.trees import bytes_by_storage
from lightning_overlap.modes.base import OptimizerHolder, OverlapMode
from lightning_overlap.plan import Plan, resolve
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import SharedBuffers, share
from lightning_overlap.ranks.world import WORLD, all_gather_objects, has_nccl, make_group, world_size
from lightning_overlap.strategy.batches import BatchComparison
from lightning_overlap.strategy.seams import Preemption
from lightning_overlap.tables import in_megabytes
from lightning_overlap.torch_seams import tree_leaves


def prepare_launch(config: OverlapConfig, ranks: int, device: torch.device, precision: str, backend: str | None) -> None:
    """Refuses requests that cannot be met, and sets the environment that CUDA reads at its start. Called before processes start.

    Args:
        config: the request.
        ranks: number of ranks.
        device: of this rank.
        precision: Lightning's name of it.
        backend: ``"gloo"``, ``"nccl"``, or None for the device's default.

    Raises:
        ConfigError: a request cannot be met.
    """
    if backend == "nccl" and (device.type != "cuda" or not has_nccl()):
        raise ConfigError(
            f"process_group_backend='nccl' needs CUDA and a torch with NCCL, and the device is {device.type}. Remove it, or set 'gloo'"
        )
    resolve(config, Facts(world_size=ranks, device=device.type, precision=precision))
    if device.type == "cuda":
        settings = environment.settings_for(config, environment.capability())
        for line in environment.apply(settings, os.environ, started=torch.cuda.is_initialized()):
            log_on_rank_zero(f"lightning_overlap: {line}")


@rank_zero_only  # to format a plan takes as long as a small step
def print_plan(plan: Plan) -> None:
    """Prints a plan, unless it is the one that this process printed last: a fit that resumes has the plan of the one before."""
    _print_once("plan", plan.explain())


def _print_once(topic: str, text: str) -> None:
    if WORLD.printed.get(topic) != text:
        log_on_rank_zero(text)
        WORLD.printed[topic] = text


class SharedRun:
    """Groups and shared state of the ranks while a Trainer runs. Every rank makes it, in the same order.

    Args:
        mesh: the ranks.
        timeout: how long a transfer may take.

    Attributes:
        samples: the ranks that hold the same parameters and see different data.
        buffers: in a fit: keeps the model's buffers equal on all ranks.
        preemption: in a fit: makes signals act on all ranks at the same batch.
        comparison: in a fit: compares batches between ranks that share them; None if no ranks do.
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
        """Makes the state of a fit, and gives ranks that share a batch the same random state. Collective."""
        # A separate group, because each batch waits for the transfer that the batch before has posted.
        world = [range(world_size())]
        signals = make_group(world, "signals", self._timeout, backend="gloo", gathers=False, threads=False)
        self.preemption = Preemption(trainer, signals)
        self.buffers = SharedBuffers(model, self.samples, signals)
        self._batch = self._mesh.group("batch", self._timeout)
        if self._batch.size > 1:
            self.comparison = BatchComparison(self._batch)
            share_random_state(self._batch, device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Encloses each training step."""
        if self.buffers is None:
            yield
            return
        self.buffers.before_forward()
        yield
        self.buffers.after_forward()

    def close(self, *, complete: bool) -> None:
        """Closes the groups and restores the Trainer's methods.

        Args:
            complete: wait for transfers under way; False after a failure, when they may never complete.
        """
        if self.buffers is not None and complete:
            self.buffers.finish()
        if self.preemption is not None:
            self.preemption.close(complete=complete)
        for group in (self.samples, self._batch):
            if group is not None and complete:
                group.close()


def print_memory(module: nn.Module, optimizers: Sequence[Optimizer], modes: Sequence[OverlapMode], plan: Plan) -> None:
    """Prints what the rank with the most weights holds, after the modes have sharded the model. As :func:`print_plan`. Collective."""
    held = bytes_by_storage([*module.parameters(), *module.buffers()])
    weights = sum(held.values())
    gradients = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in module.parameters() if p.requires_grad and not p.is_meta)
    state, unknown, about = 0.0, "", ""
    for optimizer, facts in zip(optimizers, plan.facts.optimizers or (), strict=True):
        shards = [mode.stepped_parameters(optimizer) for mode in modes if isinstance(mode, OptimizerHolder)]
        stepped = next(filter(None, shards), None) or [p for group in optimizer.param_groups for p in group["params"]]
        copies = bytes_by_storage(stepped)
        state += sum(size for storage, size in copies.items() if storage not in held)  # fp32 copies of weights
        state += sum(bytes_by_storage(tree_leaves(list(optimizer.state.values()))).values())
        stateless = [p for p in stepped if p.requires_grad and not p.is_meta and not optimizer.state.get(p)]
        if stateless and facts.state is None:
            unknown = f" (without the state of {facts.name}, which is not known)"
        elif stateless and facts.state is not None and any(facts.state):
            about = "about "  # if it keeps as much of them as of small matrices
            state += sum(p.numel() * facts.state.of(p.element_size()) for p in stateless)
    mine = [weights, gradients, int(state)]
    weights, gradients, updates = max(all_gather_objects(mine))
    _print_once(
        "memory",
        f"memory of a rank: weights {in_megabytes(weights)}, gradients {in_megabytes(gradients)}, optimizer "
        f"{about}{in_megabytes(updates)}{unknown}, and activations (lightning-overlap plan --memory)",
    )


def share_random_state(group: Group, device: torch.device) -> None:
    """Gives all ranks of a group the random states of its first rank: torch's, NumPy's and Python's. Collective.

    Ranks that share a batch need the same dropout masks where the model is unsharded, for example.
    """
    cuda = device.type == "cuda"
    mine = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
    (cpu_state, device_state), numpy_state, python_state = group.share_object((mine, numpy.random.get_state(), random.getstate()))
    numpy.random.set_state(numpy_state)
    random.setstate(python_state)
    torch.set_rng_state(cpu_state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state, device)


def share_weights(module: nn.Module, timeout: timedelta) -> None:
    """Broadcasts the parameters and buffers of rank 0, over the device's backend. Collective."""
    # Made for this broadcast only: no mode has a group of all ranks on the device's backend.
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
    """Gives memory and values to this rank's part of a model on the meta device. Collective.

    Args:
        module: the user's module.
        device: of this rank.
        holds: whether this rank holds a parameter or buffer, by name.
        load: loads a checkpoint, if there is one, after the modules have initialized themselves.
        same_parts: the sets of ranks that hold the same part. Each rank draws its own initial values, and gets those of the first.
        timeout: how long a transfer may take.

    Raises:
        ConfigError: on every rank, if a parameter or buffer gets no values.
    """
    made = materialize(module, device, holds)
    empty = initialize(module, made, load)
    if names := next(filter(None, all_gather_objects(empty) if world_size() > 1 else [empty]), None):
        raise no_values_error(names)  # the same on every rank
    # Made for this broadcast only: which ranks hold the same parts depends on all modes together, so no mode declares it.
    group = make_group(same_parts, "made", timeout, gathers=False, threads=False)
    share([tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if holds(name)], group)
    group.close()
    log_on_rank_zero(
        f"lightning_overlap: rank 0 made {len(made)} parameters and buffers of the model on the meta device; other ranks hold the rest"
    )
