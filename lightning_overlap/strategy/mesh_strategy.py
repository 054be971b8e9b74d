"""A DDPStrategy over a mesh of ranks: how they start, meet and agree, and over which of them Lightning sums, gathers and samples."""

from __future__ import annotations

import atexit
import contextlib
import os
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.meeting import keep_store_alive, start_world
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.world import WORLD, agree, backend, broadcast_object, end_world, everyone, is_everyone, world_size
from lightning_overlap.strategy.agreement import model_in_words, refuse_differences, trainer_in_words
from lightning_overlap.strategy.batches import refuse_empty, seed_workers
from lightning_overlap.strategy.launching import ProcessLauncher, ScriptLauncher, check_limit, saving_in_step_only
from lightning_overlap.strategy.setup import SharedRun, prepare_launch


class MeshStrategy(DDPStrategy):
    """Starts the ranks of a mesh, and lets Lightning's own collectives run over the ranks that see different data.

    A subclass of ``DDPStrategy``, because Lightning decides about samplers, ``sync_dist`` and compilation by that type.

    Args:
        config: what was asked for.
        meeting_timeout: how long ranks wait for each other to start, and to make groups.
        arguments: those of ``DDPStrategy``.

    Attributes:
        attempting: whether a function of the trainer's has been called since the last teardown.
        failed: whether one has failed: transfers may never complete.
    """

    def __init__(self, config: OverlapConfig, meeting_timeout: timedelta, **arguments: Any) -> None:
        check_limit("timeout", arguments["timeout"])
        check_limit("meeting_timeout", meeting_timeout)
        if (kind := arguments["process_group_backend"]) not in (None, "gloo", "nccl"):
            raise ConfigError(f"process_group_backend={kind!r}: it is 'gloo', 'nccl', or None for the device's")
        super().__init__(**arguments)
        self.config = config
        self.attempting = self.failed = False
        self._meeting_timeout = meeting_timeout
        self._seed: int | None = None
        self._mesh = ParallelMesh(Degrees(), 0)
        self._run: SharedRun | None = None
        """From setup to teardown, with more than one rank."""
        self._until_teardown = contextlib.ExitStack()

    @property
    def time_limit(self) -> timedelta:
        """How long a transfer may take."""
        return self._timeout or timedelta(minutes=30)  # Lightning's type admits None

    @property
    def backend_name(self) -> str:
        """The backend of the process groups: what was asked for, or the device's."""
        return self._get_process_group_backend()

    # -- start ---------------------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        # The first place where the number of ranks is known, and before any process is started.
        ranks, precision = self.num_nodes * self.num_processes, str(self.precision_plugin.precision)
        prepare_launch(self.config, ranks, self.root_device, precision, self.process_group_backend)
        if self._start_method == "popen":
            assert self.cluster_environment is not None, "Lightning sets it"
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self)
        else:
            self._launcher = ProcessLauncher(self, self._start_method)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        if backend() == "none":
            assert self.cluster_environment is not None, "Lightning sets it"
            start_world(self.cluster_environment, self.backend_name, self._meeting_timeout, self.time_limit, self.root_device)
            rank_zero_info(f"lightning_overlap: {world_size()} ranks have met, {self.backend_name}")
        super().setup_distributed()
        WORLD.assemble(self.time_limit, self._meeting_timeout)
        keep_store_alive()  # the connection that announcements have made for themselves included
        atexit.unregister(end_world)
        atexit.register(end_world)

    @property
    def mesh(self) -> ParallelMesh:
        """The ranks of this run, with the groups that it has made: none yet when Lightning asks for samplers."""
        degrees = self.config.degrees(self.num_nodes * self.num_processes)
        if (self._mesh.degrees, self._mesh.rank) != (degrees, self.global_rank):
            self._mesh = ParallelMesh(degrees, self.global_rank)
        return self._mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Ranks may have seeded themselves differently, and shares of different permutations would overlap.
        seed = {} if self._seed is None else {"seed": self._seed}
        return {"num_replicas": self.mesh.size("samples"), "rank": self.mesh.index("samples"), **seed}

    def process_dataloader(self, dataloader: object) -> object:
        """Seeds the workers, and has all ranks know of one that has nothing to read.

        Raises:
            ConfigError: on every rank, if some have no batch.
        """
        if world_size() > 1:
            refuse_empty(dataloader, self.lightning_module)
        seed_workers(dataloader, self.mesh.index("samples"))
        return dataloader

    def _agree(self, trainer: Trainer, *arguments: Any) -> None:
        """All ranks have the same request, Trainer, versions and parameters; samplers draw with rank 0's seed."""
        if world_size() == 1:
            return
        assert self.model is not None, "Lightning connects the module"
        self._seed = broadcast_object(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        mine = {"strategy arguments": repr((self.config, *arguments)), "versions": repr(Facts(world_size=1).versions)}
        refuse_differences({**mine, **trainer_in_words(trainer), **model_in_words(self.model)})

    def has_failed(self, trainer: Trainer | None) -> None:
        """Transfers may never complete from now on, so nobody waits for them any more."""
        self.failed = True
        if trainer is not None:
            self._until_teardown.enter_context(saving_in_step_only(trainer))

    # -- all ranks ---------------------------------------------------------------------------------------------------
    # None of these stands where it hears nothing of another rank's error.

    @property
    def _samples(self) -> Group | None:
        """Ranks that see different data, from setup to teardown."""
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
        """As ``DDPStrategy.reduce``, over the ranks that see different data."""
        if group is not None or not isinstance(tensor, Tensor) or world_size() == 1:
            return super().reduce(tensor, group, reduce_op)
        ranks = self._samples or everyone()
        if ranks.size == 1:
            return tensor
        if not ranks.can_transfer(tensor):  # of a device, over gloo
            return super().reduce(tensor, self._samples and self._samples.process_group, reduce_op)
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        total = ranks.sum(tensor, "sum" if mean else reduce_op)
        if not mean:
            return total
        return total.div_(ranks.size) if total.is_floating_point() else total.copy_(total / ranks.size)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As ``DDPStrategy.all_gather``, over the ranks that see different data: their number is the first dim."""
        if not is_everyone(group) or world_size() == 1:
            return super().all_gather(tensor, group, sync_grads)
        ranks = self._samples or everyone()
        if ranks.size == 1:
            return tensor.unsqueeze(0)
        if sync_grads or not ranks.can_transfer(tensor):  # backward through it, or of a device, over gloo
            return super().all_gather(tensor, self._samples and self._samples.process_group, sync_grads)
        return torch.stack(ranks.all_gather_alike(tensor.detach()))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Stopping and saving are agreed by the world, whatever ``reduce`` reduces over.
        return agree(decision, by_all=all)
