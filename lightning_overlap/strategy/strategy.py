"""OverlapStrategy: Lightning's hooks, handed to each mode in turn."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap import environment
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import Facts
from lightning_overlap.model.block_stack import without_nested_tensors
from lightning_overlap.model.markers import is_counted_elsewhere
from lightning_overlap.model.materialize import forget, initialize, is_deferred, materialize, without_values
from lightning_overlap.modes.base import Driver, Holder, OptimizerHolder, OverlapMode, Setup, hold_gradient_syncs
from lightning_overlap.modes.context.config import ContextParallel
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.descriptor import in_order
from lightning_overlap.modes.expert.config import ExpertParallel
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.modes.tensor.config import TensorParallel
from lightning_overlap.plan import Plan, resolve
from lightning_overlap.ranks import announcements
from lightning_overlap.ranks.group import (
    Group,
    abandon_groups,
    agree,
    all_gather_objects,
    assemble,
    backend,
    broadcast_object,
    end_world,
    everyone,
    has_nccl,
    is_everyone,
    make_group,
    world_size,
)
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import SharedBuffers, batch_norms_over, share
from lightning_overlap.state.checkpoint import (
    AtomicCheckpointIO,
    Saves,
    compact,
    in_place,
    is_local,
    load_file,
    load_lazily,
    refuse_damaged,
)
from lightning_overlap.state.parts import Parts
from lightning_overlap.state.sharded import Folders, SavedOptimizer, describe, is_folder, names_of
from lightning_overlap.strategy.agreement import model_in_words, optimizers_in_words, trainer_in_words
from lightning_overlap.strategy.batches import refuse_different, refuse_other_loss
from lightning_overlap.strategy.evaluation import Mirror, metrics_over, mirrored_step
from lightning_overlap.strategy.first_step import first_step
from lightning_overlap.strategy.launching import (
    ProcessLauncher,
    ScriptLauncher,
    check_limit,
    keep_store_alive,
    saving_in_step_only,
    start_world,
)
from lightning_overlap.strategy.probe import examine
from lightning_overlap.strategy.seams import (
    Preemption,
    adapt_precision,
    after_closure,
    backward_then,
    facts_of,
    warn_of_parts,
    zeroing_first,
)
from lightning_overlap.strategy.step import DrivenStep
from lightning_overlap.strategy.whole_state import WholeStateOnly

CHECKED_BATCHES = 3
"""Batches at the start of a fit that are compared between the ranks that share them."""


class OverlapStrategy(DDPStrategy):
    """Shards training over the ranks and hides the communication that it costs.

    The module is not wrapped: names and ``state_dict`` keys stay. A subclass of ``DDPStrategy``, because Lightning decides
    about samplers, ``sync_dist`` and compilation by that type.

    Args:
        data_parallel: ranks along the data axis, or :class:`DataParallel`.
        tensor_parallel: ranks along the tensor axis, or :class:`TensorParallel`.
        pipeline_parallel: ranks along the pipeline axis, or :class:`PipelineParallel`.
        context_parallel: ranks along the context axis, or :class:`ContextParallel`.
        expert_parallel: ranks along the expert axis, or :class:`ExpertParallel`.
        overlap: ``"off"`` keeps the layout and turns every overlap off.
        parallel_plan: roles of the model's parts by name, where they are not found: ``{"model.layers": "blocks"}``.
        verify_first_step: compare the loss and the gradients of a fit's first batch, as the ranks compute them, with those of the
            model whole. ``"auto"``: where something of the model is cut, and a rank has had the model whole.
        state_dict_type: ``"full"``: a checkpoint is one file in Lightning's format, which loads anywhere. ``"sharded"``: a folder
            that all ranks write their share of, and that loads into any number of ranks. Either loads, whatever is saved.
        async_save: write checkpoints while training goes on; at the price of a copy of the state, in the CPU's memory.
        accelerator: as in ``DDPStrategy``.
        parallel_devices: as in ``DDPStrategy``.
        cluster_environment: as in ``DDPStrategy``.
        checkpoint_io: as in ``DDPStrategy``.
        precision_plugin: as in ``DDPStrategy``.
        process_group_backend: ``"gloo"`` or ``"nccl"``; by default the device's.
        timeout: how long a transfer may take before this rank gives up, naming it.
        meeting_timeout: how long ranks wait for each other to start, and to make groups.
        start_method: how Lightning starts processes, as in ``DDPStrategy``.

    Raises:
        ConfigError: a request that cannot be met; when the strategy is made, or before the first step.
    """

    def __init__(
        self,
        data_parallel: int | Literal["auto"] | DataParallel = "auto",
        tensor_parallel: int | TensorParallel = 1,
        pipeline_parallel: int | PipelineParallel = 1,
        context_parallel: int | ContextParallel = 1,
        expert_parallel: int | ExpertParallel = 1,
        overlap: Literal["auto", "off"] = "auto",
        parallel_plan: dict[str, str] | None = None,
        verify_first_step: bool | Literal["auto"] = "auto",
        state_dict_type: Literal["full", "sharded"] = "full",
        async_save: bool = False,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        meeting_timeout: timedelta = timedelta(minutes=5),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        check_limit("timeout", timeout)
        check_limit("meeting_timeout", meeting_timeout)
        if process_group_backend not in (None, "gloo", "nccl"):
            raise ConfigError(f"process_group_backend={process_group_backend!r}: it is 'gloo', 'nccl', or None for the device's")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

        def sized(value: Any, kind: Any) -> Any:
            return value if isinstance(value, kind) else kind(size=value)

        self.config = OverlapConfig(
            data_parallel=sized(data_parallel, DataParallel),
            tensor_parallel=sized(tensor_parallel, TensorParallel),
            pipeline_parallel=sized(pipeline_parallel, PipelineParallel),
            context_parallel=sized(context_parallel, ContextParallel),
            expert_parallel=sized(expert_parallel, ExpertParallel),
            overlap=overlap,
            parallel_plan=parallel_plan or {},
            verify_first_step=verify_first_step,
        )
        if state_dict_type not in ("full", "sharded"):
            raise ConfigError(f"state_dict_type={state_dict_type!r}: it is 'full' or 'sharded'")
        self._state_dict_type = state_dict_type
        self._async_save = async_save
        self._meeting_timeout = meeting_timeout
        self._saves = Saves()
        self._folders = Folders(self.time_limit)
        self._training = False
        self.modes: list[OverlapMode] = []
        self._plan: Plan | None = None
        self.attempting = self.failed = False
        self._seed: int | None = None
        self._preemption: Preemption | None = None
        self._waiting: dict[str, Any] | None = None
        """A model's part of a checkpoint, until there is memory for it."""
        self._buffers: SharedBuffers | None = None
        self._alike: Group | None = None
        """Until the teardown: ranks that hold the same of the model and see different data."""
        self._mirror: Mirror | None = None
        self._sharing: Group | None = None
        """While fitting: ranks that see the same data."""
        self._unchecked = CHECKED_BATCHES
        self._unproven = self._was_deferred = self._fitting = False
        self._until_teardown = contextlib.ExitStack()
        self._whole_state: WholeStateOnly | None = None

    @property
    def plan(self) -> Plan:
        """The resolved plan, from ``setup`` of a fit on."""
        if self._plan is None:
            raise ConfigError("the plan is resolved when fit sets up; `lightning-overlap plan` resolves one before")
        return self._plan

    @property
    def time_limit(self) -> timedelta:
        """How long a transfer may take."""
        return self._timeout or timedelta(minutes=30)  # Lightning's type admits None

    # -- launch ------------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = plugin
        if plugin is not None:
            adapt_precision(plugin, self.stepped_parameters, self.clip_gradients_by_norm)

    def _configure_launcher(self) -> None:
        # The first place where the number of ranks is known, and before any process is started.
        if self._process_group_backend == "nccl" and (self.root_device.type != "cuda" or not has_nccl()):
            raise ConfigError(
                f"process_group_backend='nccl' needs CUDA, and a torch with NCCL; this is {self.root_device.type}: leave it out, or "
                "use 'gloo'"
            )
        ranks, device, precision = self.num_nodes * self.num_processes, self.root_device.type, str(self.precision_plugin.precision)
        resolve(self.config, Facts(world_size=ranks, device=device, precision=precision))
        if self.root_device.type == "cuda":
            settings = environment.wanted(self.config, environment.capability())
            for line in environment.apply(settings, os.environ, started=torch.cuda.is_initialized()):
                rank_zero_info(f"lightning_overlap: {line}")
        self._launcher = ScriptLauncher(self) if self._start_method == "popen" else ProcessLauncher(self, self._start_method)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        if backend() == "none":
            assert self.cluster_environment is not None, "Lightning sets it"
            kind = self._get_process_group_backend()
            start_world(self.cluster_environment, kind, self._meeting_timeout, self.time_limit, self.root_device)
        super().setup_distributed()
        assemble(self.time_limit, self._meeting_timeout)
        keep_store_alive()  # the connection that announcements have made for themselves included
        atexit.unregister(end_world)
        atexit.register(end_world)

    @property
    def mesh(self) -> ParallelMesh:
        """The mesh by arithmetic: Lightning asks for samplers before there are process groups."""
        return ParallelMesh(self.config.degrees(self.num_nodes * self.num_processes), self.global_rank)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Ranks may have seeded themselves differently, and shares of different permutations would overlap.
        seed = {} if self._seed is None else {"seed": self._seed}
        return {"num_replicas": self.mesh.sizes["dp"], "rank": self.mesh.coordinates()["dp"], **seed}

    def process_dataloader(self, dataloader: object) -> object:
        """Seeds the workers, and has all ranks know of one that has nothing to read.

        Raises:
            ConfigError: on every rank, if some have no batch.
        """
        if world_size() > 1:
            counts = all_gather_objects(sized_len(dataloader))
            module = self.lightning_module
            if 0 in counts and any(counts) and not (module and module.allow_zero_length_dataloader_with_multiple_devices):
                empty = [rank for rank, count in enumerate(counts) if count == 0]
                raise ConfigError(
                    f"ranks {empty} have no batch to read, and others have: use fewer ranks or a smaller batch, or leave drop_last off"
                )
        # Workers of ranks that share a batch must draw the same random numbers.
        if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", 0) is None:
            rank = self.mesh.coordinates()["dp"]
            dataloader.worker_init_fn = _WorkerSeed(rank)  # type: ignore[attr-defined]
        return dataloader

    # -- setup -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None, "Lightning sets the accelerator"
        assert isinstance(self.model, LightningModule), "Lightning connects the module"
        self.accelerator.setup(trainer)
        self._fitting = fitting = trainer.state.fn == TrainerFn.FITTING
        self.model = self.precision_plugin.convert_module(self.model)  # type: ignore[assignment]
        if fitting and self._layer_sync is not None:
            self.model = self._layer_sync.apply(self.model)
        forget(self.model)
        self._agree(trainer)
        self._was_deferred = is_deferred(self.model)
        if self._was_deferred:
            self._materialize(fitting)
        else:
            self.model_to_device()
            if world_size() > 1:  # by the device's backend: the world's group of ours is the host's
                group = make_group([range(world_size())], "weights", self.time_limit, gathers=False, threads=False)
                share([*self.model.parameters(), *self.model.buffers()], group)
                group.close()
        if world_size() > 1:
            self._alike = make_group(self.mesh.groups("dp"), "alike", self.time_limit, gathers=False, threads=False)
            self._until_teardown.enter_context(batch_norms_over(self.model, self._alike))
            self._until_teardown.enter_context(metrics_over(self._alike))
        if fitting:
            self.setup_optimizers(trainer)
            if self._holders:
                self._whole_state = WholeStateOnly(self.lightning_module)  # type: ignore[arg-type]
                self._until_teardown.callback(self._whole_state.remove)
            if self._alike is not None:
                # A group of its own: what a batch posts is read a batch later, when ranks may stand elsewhere.
                ranks = [range(self.world_size)]
                signals = make_group(ranks, "signals", self.time_limit, backend="gloo", gathers=False, threads=False)
                self._preemption = Preemption(trainer, signals)
                self._buffers = SharedBuffers(self.model, self._alike, signals)
                sharing = self.mesh.groups(*(axis for axis in self.mesh.sizes if axis != "dp"))
                self._sharing = make_group(sharing, "batch", self.time_limit, gathers=False, threads=False)
                self._unchecked = CHECKED_BATCHES
                self._share_random_state(self._sharing)
                if self._driver is not None:
                    self._mirror = Mirror(trainer.lightning_module, self._driver)
                    self._until_teardown.callback(self._mirror.remove)
        self.setup_precision_plugin()

    def _share_random_state(self, group: Group) -> None:
        """Ranks that share a batch draw the same random numbers, torch's, NumPy's and Python's: masks of dropout outside of what is
        cut, say."""
        if group.size > 1:
            cuda = self.root_device.type == "cuda"
            mine = torch.get_rng_state(), torch.cuda.get_rng_state(self.root_device) if cuda else None
            (cpu, device), of_numpy, of_python = group.share_object((mine, numpy.random.get_state(), random.getstate()))
            numpy.random.set_state(of_numpy)
            random.setstate(of_python)
            torch.set_rng_state(cpu)
            if device is not None:
                torch.cuda.set_rng_state(device, self.root_device)

    def _materialize(self, fitting: bool) -> None:
        """Gives memory to what this rank will hold of a model on the meta device; all of it, if there is nothing to fit."""
        module = self.lightning_module
        assert module is not None, "Lightning connects the module"
        roles, modes = self.config.parallel_plan, in_order(self.config.modes) if fitting else ()
        held = [kind.holds(module, self.config.of(mode), roles, self.mesh) for mode, kind in modes if issubclass(kind, Holder)]

        def holds(name: str) -> bool:
            return all(has(name) for has in held)

        made = materialize(module, self.root_device, holds)
        empty = initialize(module, made, partial(self._load_what_waits, holds))
        if said := next(filter(None, all_gather_objects(empty) if world_size() > 1 else [empty]), None):
            raise without_values(said)  # the same on every rank
        # Each has drawn its own numbers. Of one stage, all ranks hold the same.
        alike = self.mesh.groups(*(axis for axis in self.mesh.sizes if axis != "pp" or not fitting))
        group = make_group(alike, "made", self.time_limit, gathers=False, threads=False)
        share([tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if holds(name)], group)
        group.close()
        rank_zero_info(
            f"lightning_overlap: {len(made)} parameters and buffers were on the meta device and are rank 0's; the rest is not here"
        )

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        model = self.lightning_module
        assert model is not None, "Lightning connects the module"
        facts = facts_of(
            trainer,
            model,
            self.config,
            world_size=self.world_size,
            device=self.root_device.type,
            backend=backend(),
            optimizers=tuple(examine(optimizer) for optimizer in self.optimizers),
            deferred=self._was_deferred,
        )
        # What the plan is made from (callbacks, clipping, optimizers) may differ between ranks, and plans that differ hang.
        plan_inputs = {field.name: repr(getattr(facts, field.name)) for field in fields(facts)}
        self._same_everywhere({**plan_inputs, **optimizers_in_words(self.optimizers, model)})
        self._plan = resolve(self.config, facts)
        rank_zero_info(self._plan.explain())
        if self.mesh.sizes["tp"] * self.mesh.sizes["pp"] > 1:
            self._until_teardown.enter_context(without_nested_tensors(model))
            warn_of_parts(facts)
        self._unproven = self._plan.verify_first_step.value
        earlier = self.modes
        setup = Setup(self.mesh, self.time_limit, self.config.parallel_plan, first_step_is_verified=self._unproven)
        self.modes = [
            kind(self.config.of(mode), self._plan.choices[mode.name], setup)
            for mode, kind in in_order(self.config.modes)
            if mode.name in self._plan.choices
        ]
        for mode in self.modes:
            mode.refuse(model)
        for mode in self.modes:
            mode.parallelize(model)
        for mode in self.modes:
            mode.prepare_optimizers(self.optimizers)
        if self._driver is not None:
            self._until_teardown.enter_context(zeroing_first(trainer))
        for mode in earlier:  # an optimizer that is used again has got its state from them
            mode.close()

    def _agree(self, trainer: Trainer) -> None:
        """All ranks have the same request, Trainer, versions and parameters; samplers draw with rank 0's seed."""
        if world_size() == 1:
            return
        assert self.model is not None, "Lightning connects the module"
        self._seed = broadcast_object(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        arguments = repr((self.config, self._state_dict_type, self._async_save))
        mine: dict[str, str] = {"strategy arguments": arguments, "versions": repr(Facts(world_size=1).versions)}
        self._same_everywhere({**mine, **trainer_in_words(trainer), **model_in_words(self.model)})

    @staticmethod
    def _same_everywhere(mine: dict[str, str]) -> None:
        """Compares what ranks say of themselves.

        Raises:
            ConfigError: on every rank, naming what differs.
        """
        everyone = all_gather_objects(mine) if world_size() > 1 else [mine]
        for rank, other in enumerate(everyone):
            for what in {**everyone[0], **other}:
                first, there = everyone[0].get(what, "absent"), other.get(what, "absent")
                if first != there:
                    raise ConfigError(
                        f"ranks disagree about {what}: rank 0 has {first}, rank {rank} has {there}. "
                        "Start the same script with the same arguments and packages on every rank."
                    )

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._buffers is not None:
            self._buffers.before_forward()
        output = self._training_step(*args, **kwargs)
        if self._buffers is not None:
            self._buffers.after_forward()
        return output

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        batch, *rest = [*args, *kwargs.values()]
        checked = self._sharing if self._sharing is not None and self._sharing.size > 1 and self._unchecked else None
        if checked is not None:
            self._unchecked -= 1
            refuse_different(batch, checked)
        if self._unproven:
            self._unproven = not self._prove(batch, rest)
        for mode in self.modes:
            mode.start_forward()
        if self._driver is None:
            output = super().training_step(*args, **kwargs)
            if checked is not None:
                refuse_other_loss(output, checked)
            return output
        module = self.lightning_module
        assert module is not None, "Lightning connects the module"
        step = DrivenStep(self, self.modes, module, batch, rest, self._place_of_step)
        if self._mirror is not None:
            self._mirror.add_metrics()
        with self._user_step():
            self._driver.run_step(step)
        return step.output

    def _user_step(self) -> contextlib.AbstractContextManager[None]:
        """Around what runs steps of the user's."""
        return contextlib.nullcontext() if self._mirror is None else self._mirror.step()

    def _prove(self, batch: Any, rest: Any) -> bool:
        """Compares the first step with that of the model whole; whether there was something to compare."""
        assert self.lightning_module is not None, "Lightning connects the module"
        with self._user_step():
            return first_step(self, self.modes, self.lightning_module, batch, rest, self._place_of_step).prove()

    @property
    def _place_of_step(self) -> tuple[int, ...]:
        """Tells the step from all others of the run."""
        assert self.lightning_module is not None, "Lightning connects the module"
        trainer = self.lightning_module.trainer
        # Not the arguments, of which a training_step may leave out the batch's number.
        return self._seed or 0, self.mesh.coordinates()["dp"], trainer.current_epoch, trainer.fit_loop.batch_idx

    @property
    def _driver(self) -> Driver | None:
        """The mode that runs steps in parts, backward included."""
        return next((mode for mode in self.modes if isinstance(mode, Driver)), None)

    @property
    def _holders(self) -> list[Holder]:
        """The modes under which a rank holds a part of the model."""
        return [mode for mode in self.modes if isinstance(mode, Holder)]

    @property
    def _optimizer_holders(self) -> list[OptimizerHolder]:
        """The modes under which a rank holds a part of the optimizer's state."""
        return [mode for mode in self.modes if isinstance(mode, OptimizerHolder)]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._mirror is not None:
            self._mirror.add_metrics()
        driver, module = self._driver, self.lightning_module
        if driver is not None and driver.mirrors_evaluation:
            assert module is not None, "Lightning connects the module"
            with self._user_step():
                return mirrored_step(self, module, driver, partial(super().validation_step, *args, **kwargs))
        with contextlib.nullcontext() if driver is None else driver.evaluating():
            return super().validation_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        for mode in self.modes if self._driver is None else ():
            mode.start_backward()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """As ``Strategy.backward``, but for the modes' part, which is over before ``on_after_backward`` is called."""

        def finish() -> None:
            for mode in self.modes if self._driver is None else ():
                mode.finish_backward()

        # With a driver backward has been, and only the hooks are left.
        with backward_then(self.precision_plugin, finish, left_out=self._driver is not None):
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Lightning runs backward inside ``optimizer.step``. Here it runs first, then hooks and clipping, then the step."""
        if not self.modes:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        result = closure()
        assert self.lightning_module is not None, "Lightning connects the module"
        after_closure(self.precision_plugin, self.lightning_module, optimizer)
        optimizer.step(**kwargs)
        return result

    def stepped_parameters(self, optimizer: Optimizer) -> Iterable[Tensor]:
        """The parameters that a step updates on this rank: shards with the gradients of shards, or the user's."""
        plain = getattr(optimizer, "optimizer", optimizer)
        for mode in self._optimizer_holders:
            if (parameters := mode.stepped_parameters(plain)) is not None:
                return parameters
        return [parameter for group in plain.param_groups for parameter in group["params"]]

    def clip_gradients_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clips by the norm over all ranks' shards."""
        stepped = [(p, p.grad) for p in self.stepped_parameters(optimizer) if p.grad is not None]
        counted = [_sum_of_squares(grad) for p, grad in stepped if not is_counted_elsewhere(p)]
        squares = torch.zeros((), dtype=torch.float64, device=self.root_device)
        if counted:
            squares += torch.stack(counted).sum()
        for mode in self.modes:
            squares = mode.reduce_norm(squares)
        # As torch.nn.utils.clip_grad_norm_: a tensor, so that nothing waits for the device.
        scale = (clip_val / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for _, grad in stepped:
            grad.mul_(scale)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with hold_gradient_syncs(self.modes):
            yield

    # -- all ranks ---------------------------------------------------------------------------------------------------
    # None of these stands where it hears nothing of another rank's error.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if world_size() > 1:
            everyone().barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast_object(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As ``DDPStrategy.reduce``, over the ranks that see different data."""
        if group is not None or not isinstance(tensor, Tensor) or world_size() == 1:
            return super().reduce(tensor, group, reduce_op)
        ranks = self._alike or everyone()
        if ranks.size == 1:
            return tensor
        if tensor.device.type != "cpu" and ranks.device is None:  # gloo's connections
            return super().reduce(tensor, self._alike and self._alike.reduces, reduce_op)
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        total = ranks.sum(tensor, "sum" if mean else reduce_op)
        if not mean:
            return total
        return total.div_(ranks.size) if total.is_floating_point() else total.copy_(total / ranks.size)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As ``DDPStrategy.all_gather``, over the ranks that see different data: their number is the first dim."""
        if not is_everyone(group) or world_size() == 1:
            return super().all_gather(tensor, group, sync_grads)
        ranks = self._alike or everyone()
        if ranks.size == 1:
            return tensor.unsqueeze(0)
        if sync_grads or (tensor.device.type != "cpu" and ranks.device is None):  # backward through it, or gloo's connections
            return super().all_gather(tensor, self._alike and self._alike.reduces, sync_grads)
        return torch.stack(ranks.all_gather_alike(tensor.detach()))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Stopping and saving are agreed by the world, whatever ``reduce`` reduces over.
        return agree(decision, by_all=all)

    # -- weights are read --------------------------------------------------------------------------------------------

    def _complete_weights(self) -> None:
        for mode in self.modes:
            mode.sync_parameters()
        if self.lightning_module is not None:
            # Running statistics are the first rank's, as DDP's broadcast_buffers makes them; outside of a fit all hold the same.
            share(self.lightning_module.buffers(), self._alike if self._preemption is not None else None)

    def on_validation_start(self) -> None:
        self._complete_weights()
        if self._driver is not None:
            self._driver.start_evaluation()

    def on_validation_end(self) -> None:
        if self._driver is not None:
            self._driver.finish_evaluation()

    def on_test_start(self) -> None:
        self._complete_weights()

    def on_predict_start(self) -> None:
        self._complete_weights()

    def on_train_start(self) -> None:
        """Every batch is a meeting of all ranks.

        Raises:
            ConfigError: on every rank, if ranks have different numbers of batches.
        """
        if self.world_size > 1:
            assert self.lightning_module is not None, "Lightning connects the module"
            counts = all_gather_objects(self.lightning_module.trainer.num_training_batches)
            if len(set(counts)) > 1:
                raise ConfigError(
                    f"ranks have different numbers of training batches, {counts} by rank, and would wait for each other. Deal the "
                    f"data out evenly (Lightning's sampler does, drop_last=True helps), or set limit_train_batches={min(counts)}."
                )

        self._training = True

    def on_train_end(self) -> None:
        self._training = False
        for mode in self.modes:
            mode.sync_parameters()
        if self._preemption is not None:
            self._preemption.finish()
        self._saves.wait()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(getattr(type(self._checkpoint_io), "checkpoint_io", None), property):
            # A plugin that wraps another one, which takes it only where the user gave it none.
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # type: ignore[attr-defined]
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def _reading_state(self) -> contextlib.AbstractContextManager[None]:
        """Around each ``state_dict()`` of the strategy's own."""
        return self._whole_state.allowed() if self._whole_state is not None else contextlib.nullcontext()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        for mode in self.modes:
            mode.sync_parameters()
        if self._state_dict_type == "sharded" and self.lightning_module is not None:
            share(self.lightning_module.buffers(), self._alike)  # every rank writes a part of them
        with self._reading_state():
            state = super().lightning_module_state_dict()
        if self._state_dict_type == "full":
            for mode in reversed(self._holders):  # put together in the reverse of the order in which it was cut
                state = mode.whole_model(state)
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = getattr(optimizer, "optimizer", optimizer)
        if self._state_dict_type == "sharded":
            return describe(plain, self._optimizer_shards(plain), self._parameter_names(), self._parts)
        found = (state for mode in self._optimizer_holders if (state := mode.optimizer_state(plain)) is not None)
        whole = next(found, None) or super().optimizer_state(optimizer)
        for mode in reversed(self._holders):
            whole = mode.whole_optimizer(plain, whole)
        return whole

    def _optimizer_shards(self, optimizer: Optimizer, saved: Any = None) -> dict[str, dict[str, Any]] | None:
        for mode in self._optimizer_holders:
            if (shards := mode.optimizer_shards(optimizer, saved)) is not None:
                return shards
        return None

    @property
    def _parts(self) -> Parts:
        return Parts(self._holders, self.mesh)

    def _parameter_names(self) -> dict[int, str]:
        assert self.lightning_module is not None, "Lightning connects the module"
        return names_of(self.lightning_module)

    # Checkpoints are loaded before setup, Lightning's default: after it, Lightning would forget the user's weights_only.

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        for mode in self.modes:
            mode.sync_parameters()
        assert self.lightning_module is not None, "Lightning connects the module"
        with self._reading_state():
            own = self.lightning_module.state_dict() if self._preemption is not None else {}
        cut = any(name in own and own[name].shape != value.shape for name, value in checkpoint["state_dict"].items())
        if self._preemption is not None and (cut or is_deferred(self.lightning_module)):
            raise ConfigError(
                "weights are loaded in the middle of a fit (a Tuner does, after lr_find or scale_batch_size), when this rank has its "
                "part of them only: find these values in a run of one process, or load by trainer.fit(..., ckpt_path=...)"
            )
        with warnings.catch_warnings():
            if is_deferred(self.lightning_module):  # names are checked here, values loaded once there is memory for them
                warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
                self._waiting = checkpoint["state_dict"]
            super().load_model_state_dict(checkpoint, strict=strict)
        for mode in self.modes:
            mode.adopt_parameters()

    def _load_what_waits(self, holds: Callable[[str], bool]) -> None:
        """Loads what this rank holds of a checkpoint whose model had no memory yet. Collective."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        module = self.lightning_module
        assert module is not None, "Lightning connects the module"
        mine = {name: value for name, value in waiting.items() if holds(name)}
        own = module.state_dict()
        on_disk = {name for name, value in mine.items() if isinstance(value, Tensor) and value.is_meta}
        self._folders.read({name: own[name] for name in on_disk})
        module.load_state_dict({name: value for name, value in mine.items() if name not in on_disk}, strict=False)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if len(states := checkpoint["optimizer_states"]) < len(self.optimizers):
            rank_zero_warn(
                f"the checkpoint has the state of {len(states)} optimizers, and the module has {len(self.optimizers)}: those without "
                "go on as new ones, without the moments that they had"
            )
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            if isinstance(state, SavedOptimizer):
                shards = partial(self._optimizer_shards, optimizer)
                self._folders.load_optimizer(state, optimizer, self._parameter_names(), self._parts, shards)
                continue
            for holder in self._holders:
                state = holder.local_optimizer(optimizer, state)
            if not any(mode.load_optimizer_state(optimizer, state) for mode in self._optimizer_holders):
                optimizer.load_state_dict(state)
        for mode in self.modes:
            mode.adopt_parameters()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As ``Strategy.save_checkpoint``; what fails on one rank is an error on all. With ``async_save``, at the next save."""
        if storage_options is not None and (self._state_dict_type == "sharded" or type(self.checkpoint_io) is AtomicCheckpointIO):
            raise TypeError("storage_options are for a CheckpointIO of your own, and `storage_options` arg is not supported here")
        filepath = self.broadcast(filepath)  # names hold metrics, which a rank may format otherwise
        background = self._async_save and self._training

        def prepare() -> Callable[[], None]:
            if is_local(filepath):
                # Not with the rest on a thread: ModelCheckpoint may put a link beside the checkpoint at once.
                Path(filepath).parent.mkdir(parents=True, exist_ok=True)
            if self._state_dict_type == "sharded":
                return self._folders.save(checkpoint, Path(filepath), self._parts, copy=background)
            if not self.is_global_zero:
                return lambda: None
            ready = compact(checkpoint, copy=background)
            return partial(self.checkpoint_io.save_checkpoint, ready, filepath, storage_options=storage_options)

        self._saves.run(prepare, filepath, background=background)

    def remove_checkpoint(self, filepath: Any) -> None:
        # ModelCheckpoint removes the last one as soon as the next is being saved.
        self._saves.then(partial(super().remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As ``Strategy.load_checkpoint``, from one file or from a folder, by whichever number of ranks it was written.

        Raises:
            CheckpointError: it is not complete, or holds objects whose loading may run code, and ``weights_only`` is not False.
        """
        self._saves.wait()
        safe = weights_only is not False
        path = self.broadcast(checkpoint_path)
        assert self.lightning_module is not None, "Lightning connects the module"
        if self._preemption is None:  # nothing is being fitted
            forget(self.lightning_module)
        if is_local(path):
            path = in_place(Path(path))
            if is_folder(path):
                for mode in self.modes:
                    mode.sync_parameters()
                with self._reading_state():
                    own = self.lightning_module.state_dict()
                return self._folders.load(path, own, weights_only=safe)
            refuse_damaged(path, read_here=self.local_rank == 0)
            if is_deferred(self.lightning_module) and type(self.checkpoint_io) is AtomicCheckpointIO:
                return load_lazily(path, weights_only=safe)
        return load_file(self.checkpoint_io, path, weights_only=safe)

    # -- end ---------------------------------------------------------------------------------------------------------

    def has_failed(self, trainer: Trainer | None) -> None:
        """Transfers may never complete from now on, so nobody waits for them any more."""
        self.failed = True
        if trainer is not None:
            self._until_teardown.enter_context(saving_in_step_only(trainer))

    def teardown(self) -> None:
        self._until_teardown.close()
        if self._buffers is not None and not self.failed:
            self._buffers.finish()
        if self._preemption is not None:
            self._preemption.close(complete=not self.failed)
            self._preemption = self._buffers = None
        self._waiting = None
        for group in (self._alike, self._sharing):
            if group is not None and not self.failed:
                group.close()
        self._alike = self._sharing = self._mirror = None
        for mode in reversed(self.modes):
            mode.release(complete=not self.failed)
        if self.failed and self.modes and self._fitting:
            rank_zero_warn("training failed in the middle of a step: load a checkpoint before using the module's weights")
            self.modes = []
        if self.failed:
            abandon_groups()  # whoever waits for their transfers waits for what never comes
        self._saves.close()
        self._folders.close(complete=not self.failed)
        self.failed = self._training = False
        if self.attempting:
            announcements.end()
            self.attempting = False
        super().teardown()


def _sum_of_squares(grad: Tensor) -> Tensor:
    """Of the absolute values of a gradient, in fp64: a scalar in which neither squares nor their sum overflow."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    values = torch.view_as_real(values) if values.is_complex() else values
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return norm.double() ** 2


class _WorkerSeed:
    """Seeds a data loader's worker by the data rank. A class, since workers may be spawned and so pickle it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, worker: int) -> None:
        pl_worker_init_function(worker, self._rank)
