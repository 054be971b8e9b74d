"""OverlapStrategy: Lightning's strategy hooks, which call each mode in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_stack import without_nested_tensors
from lightning_overlap.model.first_blocks import FirstBlocks
from lightning_overlap.model.materialize import is_deferred, move_absent_to_meta
from lightning_overlap.modes.base import Driver, Holder, OverlapMode, Setup, hold_gradient_syncs
from lightning_overlap.modes.context.config import ContextParallel
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.descriptor import in_order
from lightning_overlap.modes.expert.config import ExpertParallel
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.modes.tensor.config import TensorParallel
from lightning_overlap.plan import Plan, resolve
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import batch_norms_over, share
from lightning_overlap.ranks.world import WORLD, backend, world_size
from lightning_overlap.state.checkpoint import AtomicCheckpointIO
from lightning_overlap.strategy.agreement import describe_optimizers, refuse_differences
from lightning_overlap.strategy.batches import refuse_uneven, refuse_uneven_validation
from lightning_overlap.strategy.checkpoints import Checkpoints
from lightning_overlap.strategy.evaluation import Mirror, metrics_over, mirrored_step
from lightning_overlap.strategy.first_step import first_step
from lightning_overlap.strategy.gradients import clip_by_norm, stepped_parameters
from lightning_overlap.strategy.mesh_strategy import MeshStrategy
from lightning_overlap.strategy.probe import examine
from lightning_overlap.strategy.seams import (
    adapt_precision,
    after_closure,
    facts_of,
    warn_of_gradient_parts,
    zeroing_first,
)
from lightning_overlap.strategy.setup import SharedRun, give_memory, print_memory, print_plan, share_weights
from lightning_overlap.strategy.state_guard import StateGuard
from lightning_overlap.strategy.step import DrivenStep


class OverlapStrategy(MeshStrategy):
    """Shards training over the ranks and hides the communication behind compute.

    The module is not wrapped: names and ``state_dict`` keys stay. The class has more than 20 methods, as Lightning's hooks are many.

    Args:
        data_parallel: ranks along the data axis, or :class:`DataParallel`.
        tensor_parallel: ranks along the tensor axis, or :class:`TensorParallel`.
        pipeline_parallel: ranks along the pipeline axis, or :class:`PipelineParallel`.
        context_parallel: ranks along the context axis, or :class:`ContextParallel`.
        expert_parallel: ranks along the expert axis, or :class:`ExpertParallel`.
        overlap: ``"off"`` keeps the layout and turns every overlap off.
        parallel_plan: roles of the model's parts by name, where they are not found automatically: ``{"model.layers": "blocks"}``.
        verify_first_step: compare loss, gradients and buffers of a fit's first batch between the sharded and the unsharded model.
            ``"auto"``: if a mode shards the model, and ranks can assemble the unsharded one.
        state_dict_type: ``"full"``: a checkpoint is one file in Lightning's format, which loads anywhere. ``"sharded"``: a folder
            in which each rank writes its part, and which loads into any number of ranks. Both types load under either setting.
        async_save: write checkpoints while training continues; costs a copy of the state in CPU memory.
        accelerator: as in ``DDPStrategy``.
        parallel_devices: as in ``DDPStrategy``.
        cluster_environment: as in ``DDPStrategy``.
        checkpoint_io: as in ``DDPStrategy``.
        precision_plugin: as in ``DDPStrategy``.
        process_group_backend: ``"gloo"`` or ``"nccl"``; by default the device's.
        timeout: how long a transfer may take before the rank raises an error that names it.
        meeting_timeout: how long ranks wait for each other at start, and to make groups.
        start_method: how Lightning starts processes, as in ``DDPStrategy``.

    Raises:
        ConfigError: a request cannot be met; raised when the strategy is made, or before the first step.
    """

    def __init__(  # noqa: PLR0913  # users' arguments are spelled out, so that YAML and editors know them
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

        def sized(value: Any, kind: Any) -> Any:
            return value if isinstance(value, kind) else kind(size=value)

        config = OverlapConfig(
            data_parallel=sized(data_parallel, DataParallel),
            tensor_parallel=sized(tensor_parallel, TensorParallel),
            pipeline_parallel=sized(pipeline_parallel, PipelineParallel),
            context_parallel=sized(context_parallel, ContextParallel),
            expert_parallel=sized(expert_parallel, ExpertParallel),
            overlap=overlap,
            parallel_plan=parallel_plan or {},
            verify_first_step=verify_first_step,
        )
        super().__init__(
            config,
            meeting_timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.checkpoints = Checkpoints(state_dict_type, async_save, self.time_limit)
        self.modes: list[OverlapMode] = []
        self._plan: Plan | None = None
        self._mirror: Mirror | None = None
        self._verifies_first_step = self._was_deferred = self._fitting = False
        self._first_blocks: FirstBlocks | None = None

    @property
    def plan(self) -> Plan:
        """The resolved plan. It exists from ``setup`` of a fit on.

        Raises:
            ConfigError: no fit has been set up.
        """
        if self._plan is None:
            raise ConfigError("there is no plan before trainer.fit. The command `lightning-overlap plan` prints one without a fit")
        return self._plan

    # -- launch ------------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = plugin
        if plugin is not None:
            adapt_precision(plugin, self._stepped_parameters, self._clip_by_norm, self._run_backward)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None, "Lightning connects the module"
        return self.lightning_module

    # -- setup -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None, "Lightning sets the accelerator"
        assert isinstance(self.model, LightningModule), "Lightning connects the module"
        self.accelerator.setup(trainer)
        self._fitting = fitting = trainer.state.fn == TrainerFn.FITTING
        self.model = self.precision_plugin.convert_module(self.model)
        if fitting and self._layer_sync is not None:
            self.model = self._layer_sync.apply(self.model)
        move_absent_to_meta(self.model)
        self._mesh = ParallelMesh(self.mesh.degrees, self.global_rank)  # an earlier run's modes keep its groups
        self._agree(trainer, state_dict_type=self.checkpoints.layout, async_save=self.checkpoints.in_background)
        self.checkpoints.use(self.modes, self.mesh)
        self._was_deferred = is_deferred(self.model)
        if self._was_deferred:
            self._materialize(fitting)
        else:
            self.model_to_device()
            if world_size() > 1:
                share_weights(self.model, self.time_limit)
        if world_size() > 1:
            self._run = SharedRun(self.mesh, self.time_limit)
            self._until_teardown.enter_context(batch_norms_over(self.model, self._run.samples))
            self._until_teardown.enter_context(metrics_over(self._run.samples))
        if fitting:
            self.setup_optimizers(trainer)
            self._setup_fit(trainer)
        self.setup_precision_plugin()

    def _setup_fit(self, trainer: Trainer) -> None:
        """Sets up a fit after the modes have sharded the model."""
        module = trainer.lightning_module
        print_memory(module, self.optimizers, self.modes, self.plan)
        if any(isinstance(mode, Holder) for mode in self.modes):
            self.checkpoints.state_guard = StateGuard(module)
            self._until_teardown.callback(self.checkpoints.state_guard.remove)
        if self._run is not None:
            self._run.start_fit(trainer, module, self.root_device)
            if self._driver is not None:
                self._mirror = Mirror(module, self._driver)
                self._until_teardown.callback(self._mirror.remove)

    def _materialize(self, fitting: bool) -> None:
        """Gives memory to this rank's part of a model on the meta device; outside of a fit to the unsharded model."""
        module = self._module
        roles, modes = self.config.parallel_plan, in_order(self.config.modes) if fitting else ()
        tests = [kind.holds(module, self.config.of(mode), roles, self.mesh) for mode, kind in modes if issubclass(kind, Holder)]

        def holds(name: str) -> bool:
            return all(test(name) for test in tests)

        # All ranks of a stage hold the same part: other modes shard the model later.
        same_parts = self.mesh.sets("stage" if fitting else "world")
        load = partial(self.checkpoints.load_deferred, module, holds)
        give_memory(module, self.root_device, holds, load, same_parts, self.time_limit)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        model = self._module
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
        # Ranks may differ in callbacks, clipping or optimizers, and would hang with different plans.
        plan_inputs = {field.name: repr(getattr(facts, field.name)) for field in fields(facts)}
        refuse_differences({**plan_inputs, **describe_optimizers(self.optimizers, model)})
        self._plan = resolve(self.config, facts)
        print_plan(self._plan)
        if self.mesh.size("batch") > 1:
            self._until_teardown.enter_context(without_nested_tensors(model))
            warn_of_gradient_parts(facts)
        self._verifies_first_step = self._plan.verify_first_step.value
        earlier = self.modes
        setup = Setup(self.mesh, self.time_limit, self.config.parallel_plan, first_step_is_verified=self._verifies_first_step)
        self._first_blocks = setup.first_blocks
        self.modes = [
            kind(self.config.of(mode), self._plan.choices[mode.name], setup)
            for mode, kind in in_order(self.config.modes)
            if mode.name in self._plan.choices
        ]
        self.checkpoints.use(self.modes, self.mesh)
        for mode in self.modes:
            mode.refuse(model)
        for mode in self.modes:
            mode.parallelize(model)
        for mode in self.modes:
            mode.prepare_optimizers(self.optimizers)
        if self._driver is not None:
            self._until_teardown.enter_context(zeroing_first(trainer))
        for mode in earlier:  # they have given an optimizer that is used again its state
            mode.close()

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._run.step() if self._run is not None else contextlib.nullcontext():
            return self._training_step(*args, **kwargs)

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        batch, *rest = [*args, *kwargs.values()]
        comparison = self._run.comparison if self._run is not None else None
        is_compared = comparison is not None and comparison.next_batch(batch)
        if self._verifies_first_step:
            self._verifies_first_step = not self._verify_first_step(batch, rest)
        if self._first_blocks is not None:
            self._first_blocks.start_training()
        for mode in self.modes:
            mode.start_forward()
        if self._driver is None:
            try:
                output = super().training_step(*args, **kwargs)
            except Exception as error:
                if not isinstance(error, ConfigError | TransferError):
                    for mode in self.modes:
                        mode.raise_cause(error)
                raise
            if comparison is not None and is_compared:
                comparison.loss(output)
            return output
        module = self._module
        step = DrivenStep(self, self.modes, module, batch, rest, self._step_key)
        if self._mirror is not None:
            self._mirror.add_metrics()
        with self._user_step():
            self._driver.run_step(step)
        return step.output

    def stop_comparing(self) -> None:
        """Compares no more batches and losses between ranks: a benchmark without transfers has wrong losses."""
        if self._run is not None:
            self._run.comparison = None

    def _user_step(self) -> contextlib.AbstractContextManager[None]:
        """Encloses calls that run the user's steps."""
        return contextlib.nullcontext() if self._mirror is None else self._mirror.step()

    def _verify_first_step(self, batch: Any, rest: Any) -> bool:
        """Compares the first step with that of the unsharded model; False if the batch has no loss to compare."""
        with self._user_step():
            is_over = (step := first_step(self, self.modes, self._module, batch, rest, self._step_key)).verify()
        if step.is_compared:  # else blocks are compared by themselves
            self._first_blocks = None
        return is_over

    @property
    def _step_key(self) -> tuple[int, ...]:
        """Identifies the step in the run."""
        trainer = self._module.trainer
        # Not from the arguments: a training_step may take no batch number.
        return self._seed or 0, self.mesh.index("samples"), trainer.current_epoch, trainer.fit_loop.batch_idx

    @property
    def _driver(self) -> Driver | None:
        """The mode that runs steps in microbatches, backward included; None if there is none."""
        return next((mode for mode in self.modes if isinstance(mode, Driver)), None)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._mirror is not None:
            self._mirror.add_metrics()
        driver, module = self._driver, self._module
        if driver is not None and driver.evaluates_loss_on_one_rank:
            with self._user_step():
                return mirrored_step(self, module, driver, partial(super().validation_step, *args, **kwargs))
        with driver.evaluating() if driver is not None else contextlib.nullcontext():
            return super().validation_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        for mode in self.modes if self._driver is None else ():
            mode.start_backward()

    def _run_backward(self, backward: Callable[[], None]) -> None:
        """Runs the precision plugin's backward, and completes the gradients. A driver has done both already."""
        if self._driver is None:
            backward()
            for mode in self.modes:
                mode.finish_backward()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Runs backward, then hooks and clipping, then the step. (Lightning runs backward inside ``optimizer.step``.)"""
        if not self.modes:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        result = closure()
        after_closure(self.precision_plugin, self._module, optimizer)
        optimizer.step(**kwargs)
        return result

    def _stepped_parameters(self, optimizer: Optimizer) -> Iterable[Tensor]:
        return stepped_parameters(getattr(optimizer, "optimizer", optimizer), self.modes)

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_norm(self._stepped_parameters(optimizer), self.modes, clip_val, self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with hold_gradient_syncs(self.modes):
            yield

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _complete_weights(self) -> None:
        for mode in self.modes:
            mode.sync_parameters()
        if self.lightning_module is not None:
            # Buffers of the first rank, as with DDP's broadcast_buffers; outside of a fit they are equal.
            share(self._module.buffers(), self._samples if self._in_shared_fit else None)

    def on_validation_start(self) -> None:
        self._complete_weights()
        if self._fitting:
            refuse_uneven_validation(self._module.trainer, self.modes)
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
        """Checks that ranks have as many batches, because all ranks communicate in every batch (ConfigError on every rank)."""
        if self.world_size > 1:
            refuse_uneven(self._module.trainer.num_training_batches)
        self.checkpoints.training = True

    def on_train_end(self) -> None:
        self.checkpoints.training = False
        for mode in self.modes:
            mode.sync_parameters()
        if self._run is not None and self._run.preemption is not None:
            self._run.preemption.finish()
        self.checkpoints.wait()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(getattr(type(self._checkpoint_io), "checkpoint_io", None), property):
            # A plugin around another IO; its setter keeps an IO that the user has given it.
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # type: ignore[attr-defined]
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns ``module.state_dict()``: unsharded on rank 0; a rank's part with ``state_dict_type="sharded"``. Collective."""
        return self.checkpoints.model_state(self._module, self._samples)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns ``optimizer.state_dict()``: unsharded on rank 0; a rank's part with ``state_dict_type="sharded"``. Collective."""
        plain = getattr(optimizer, "optimizer", optimizer)
        return self.checkpoints.optimizer_state(self._module, plain, partial(super().optimizer_state, optimizer))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.checkpoints.load_model(checkpoint["state_dict"], self._module, strict=strict, in_fit=self._in_shared_fit)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        self.checkpoints.load_optimizers(checkpoint["optimizer_states"], self._module, self.optimizers)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves as ``Strategy.save_checkpoint`` does. Collective.

        Raises:
            CheckpointError: on every rank, if one failed; with ``async_save``, at the next save.
        """
        path = self.broadcast(filepath)  # file names hold metrics, which ranks may format differently
        self.checkpoints.save(checkpoint, path, self.checkpoint_io, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        self.checkpoints.remove(partial(super().remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, a file or a folder, written by any number of ranks. Collective.

        Raises:
            CheckpointError: it is incomplete or damaged; or it holds objects whose loading may run code, and ``weights_only`` is not
                False.
        """
        return self.checkpoints.load(
            self.broadcast(checkpoint_path),
            self._module,
            self.checkpoint_io,
            weights_only=weights_only is not False,
            in_fit=self._in_shared_fit,
            first_on_machine=self.local_rank == 0,
        )

    # -- end ---------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        self._until_teardown.close()
        if self._run is not None:
            self._run.close(complete=not self.failed)
        self._run = self._mirror = self.checkpoints.state_guard = None
        for mode in reversed(self.modes):
            mode.release(complete=not self.failed)
        if self.failed and self.modes and self._fitting:
            rank_zero_warn("training failed during a step, and weights may be incomplete. Load a checkpoint before you use them")
            self.modes = []
            self.checkpoints.use((), self.mesh)
        if self.failed:
            WORLD.abandon()  # their transfers may never complete
        self.checkpoints.close(complete=not self.failed)
        self.failed = False
        if self.launched:
            WORLD.announcements.end()
            self.launched = False
        super().teardown()
