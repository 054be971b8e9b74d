"""A DDPStrategy over a mesh of ranks: it starts and connects them, and runs Lightning's collectives over the right ranks."""

from __future__ import annotations

import atexit
import contextlib
import os
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import versions
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.meeting import keep_store_alive, start_world
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.world import WORLD, agree, backend, broadcast_object, end_world, everyone, is_everyone, world_size
from lightning_overlap.strategy.agreement import describe_model, describe_settings, describe_trainer, refuse_differences
from lightning_overlap.strategy.batches import refuse_empty, seed_workers
from lightning_overlap.strategy.launching import (
    ProcessLauncher,
    ScriptLauncher,
    check_limit,
    refuse_scripts_of_notebook,
    saving_in_step_only,
)
from lightning_overlap.strategy.seams import hide_deprecation
from lightning_overlap.strategy.setup import SharedRun, prepare_launch


class MeshStrategy(DDPStrategy):
    """Starts the ranks of a mesh, and runs Lightning's collectives over the ranks that see different data.

    A subclass of ``DDPStrategy``, because Lightning decides about samplers, ``sync_dist`` and compilation by that type.

    Args:
        config: the request.
        meeting_timeout: how long ranks wait for each other at start, and to make groups.
        arguments: of ``DDPStrategy``.

    Attributes:
        launched: whether a launched function (``fit``, ...) has been called since the last teardown.
        failed: whether one has failed, so that transfers may never complete.
    """

    def __init__(self, config: OverlapConfig, meeting_timeout: timedelta, **arguments: Any) -> None:
        check_limit("timeout", arguments["timeout"])
        check_limit("meeting_timeout", meeting_timeout)
        if (kind := arguments["process_group_backend"]) not in (None, "gloo", "nccl"):
            raise ConfigError(f"process_group_backend must be gloo, nccl or None (the device's default), got {kind!r}")
        super().__init__(**arguments)
        self.config = config
        self.launched = self.failed = False
        self._meeting_timeout = meeting_timeout
        self._seed: int | None = None
        self._mesh = ParallelMesh(Degrees(), 0)
        self._run: SharedRun | None = None
        """From setup to teardown, with more than one rank."""
        self._until_teardown = contextlib.ExitStack()

    def __repr__(self) -> str:
        # Fabric's error for a strategy that it does not know consists of this.
        return f"<{type(self).__name__}: for lightning.pytorch.Trainer, not for Fabric>"

    @property
    def time_limit(self) -> timedelta:
        """How long a transfer may take."""
        return self._timeout or timedelta(minutes=30)  # Lightning's type admits None

    @property
    def backend_name(self) -> str:
        """The backend of the process groups: the requested one, or the device's default."""
        return self._get_process_group_backend()

    # -- start ---------------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        if self.local_rank >= self.num_processes:
            raise ConfigError(
                f"this process has the local rank {self.local_rank}, and the Trainer has devices={self.num_processes}. Set devices to "
                "the number of processes that are started on each node"
            )
        hide_deprecation()
        # The number of ranks is known from here on, and no process has started.
        ranks, precision = self.num_nodes * self.num_processes, str(self.precision_plugin.precision)
        prepare_launch(self.config, ranks, self.root_device, precision, self.process_group_backend)
        if self._start_method == "popen":
            refuse_scripts_of_notebook(self.num_processes)
            assert self.cluster_environment is not None, "Lightning sets it"
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self)
        else:
            self._launcher = ProcessLauncher(self, self._start_method)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        if backend() == "none":
            cluster = self.cluster_environment
            assert cluster is not None, "Lightning sets it"
            address, size = f"{cluster.main_address}:{cluster.main_port}", cluster.world_size()
            if size > 1:
                log_on_rank_zero(
                    f"lightning_overlap: {size} ranks meet at {address}, within {self._meeting_timeout} (meeting_timeout)"
                )
            start_world(cluster, self.backend_name, self._meeting_timeout, self.time_limit, self.root_device)
            log_on_rank_zero(f"lightning_overlap: {world_size()} ranks are connected, {self.backend_name}")
        super().setup_distributed()
        WORLD.assemble(self.time_limit, self._meeting_timeout)
        keep_store_alive()  # includes the connection of the announcements
        atexit.unregister(end_world)
        atexit.register(end_world)

    @property
    def mesh(self) -> ParallelMesh:
        """The ranks of this run and its groups, of which there are none when Lightning asks for samplers."""
        degrees = self.config.degrees(self.num_nodes * self.num_processes)
        if (self._mesh.degrees, self._mesh.rank) != (degrees, self.global_rank):
            self._mesh = ParallelMesh(degrees, self.global_rank)
        return self._mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Ranks may have different seeds, and then their permutations and their samples would overlap.
        seed = {} if self._seed is None else {"seed": self._seed}
        return {"num_replicas": self.mesh.size("samples"), "rank": self.mesh.index("samples"), **seed}

    def process_dataloader(self, dataloader: object) -> object:
        """Seeds the workers, and refuses a data loader that is empty on some ranks only. Collective.

        Raises:
            ConfigError: on every rank, if some ranks have no batch and others have.
        """
        if world_size() > 1:
            refuse_empty(dataloader, self.lightning_module)
        seed_workers(dataloader, self.mesh.index("samples"))
        return dataloader

    def _agree(self, trainer: Trainer, **arguments: Any) -> None:
        """Checks that all ranks have the same request, Trainer, versions and parameters, and gives samplers the seed of rank 0."""
        if world_size() == 1:
            return
        assert self.model is not None, "Lightning connects the module"
        self._seed = broadcast_object(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        mine = {**describe_settings(self.config), **describe_settings(arguments), **describe_settings(versions(), "versions")}
        refuse_differences({**mine, **describe_trainer(trainer), **describe_model(self.model)})

    def note_failure(self, trainer: Trainer | None) -> None:
        """Notes a failure: transfers may never complete, so teardown does not wait for them."""
        self.failed = True
        if trainer is not None:
            self._until_teardown.enter_context(saving_in_step_only(trainer))

    # -- all ranks ---------------------------------------------------------------------------------------------------
    # While a rank waits in one of these, another rank's error reaches it.

    @property
    def _samples(self) -> Group | None:
        """The ranks that see different data; None outside of setup and teardown, or with one rank."""
        return self._run.samples if self._run is not None else None

    @property
    def _in_shared_fit(self) -> bool:
        """Whether a fit is set up, with more than one rank."""
        return self._run is not None and self._run.preemption is not None

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if world_size() > 1:
            everyone().barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast_object(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces as ``DDPStrategy.reduce`` does, over the ranks that see different data. Collective."""
        if group is not None or not isinstance(tensor, Tensor) or world_size() == 1:
            return super().reduce(tensor, group, reduce_op)
        ranks = self._samples or everyone()
        if ranks.size == 1:
            return tensor
        if not ranks.can_transfer(tensor):  # a device's tensor over gloo
            return super().reduce(tensor, self._samples and self._samples.process_group, reduce_op)
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        total = ranks.sum(tensor, "sum" if mean else reduce_op)
        if not mean:
            return total
        return total.div_(ranks.size) if total.is_floating_point() else total.copy_(total / ranks.size)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gathers as ``DDPStrategy.all_gather`` does, over the ranks that see different data: they are the first dim. Collective."""
        if not is_everyone(group) or world_size() == 1:
            return super().all_gather(tensor, group, sync_grads)
        ranks = self._samples or everyone()
        if ranks.size == 1:
            return tensor.unsqueeze(0)
        if sync_grads or not ranks.can_transfer(tensor):  # with gradients, or a device's tensor over gloo
            return super().all_gather(tensor, self._samples and self._samples.process_group, sync_grads)
        return torch.stack(ranks.all_gather_alike(tensor.detach()))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Over the world, because all ranks must agree to stop and to save.
        return agree(decision, by_all=all)
