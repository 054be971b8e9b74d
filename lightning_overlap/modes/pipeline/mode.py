"""The pipeline mode: each rank holds the blocks of its stages, and runs the user's training_step per stage and microbatch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import Pass
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.blocks import Blocks
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import LATE_GRADIENT, STAGE, clear_markers
from lightning_overlap.model.snapshots import reachable_objects
from lightning_overlap.model.trees import copied
from lightning_overlap.modes.base import Driver, Holder, Setup, Squares
from lightning_overlap.modes.pipeline.config import PipelineChoices, PipelineParallel
from lightning_overlap.modes.pipeline.division import make_partition
from lightning_overlap.modes.pipeline.evaluation import Evaluation
from lightning_overlap.modes.pipeline.flow import Flow, find_flow
from lightning_overlap.modes.pipeline.misplaced import Misplaced
from lightning_overlap.modes.pipeline.partition import heads
from lightning_overlap.modes.pipeline.runs import Runs
from lightning_overlap.modes.pipeline.stage import StagedModel, Stages
from lightning_overlap.modes.pipeline.state import StageState
from lightning_overlap.modes.pipeline.tied import TiedGradients
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients
from lightning_overlap.modes.pipeline.weights import Weights, weigh
from lightning_overlap.ranks.announcements import in_words, raise_from_words
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.world import all_gather_objects
from lightning_overlap.steps import microbatches
from lightning_overlap.steps.lanes import Lanes
from lightning_overlap.steps.microbatches import Microbatches, shapes_of
from lightning_overlap.steps.random_state import block_seeder, preserve_random_state, seed_all
from lightning_overlap.steps.step import Step


class PipelineMode(Driver, Holder):
    """See the module's docstring."""

    # More than 20 methods: 25 are verbs of the two contracts.

    name = "pipeline"
    nesting = Nesting.STAGES
    announcements = ("pipeline.form",)
    remark = "late peers of a pipeline are its bubble, and stages that take longer than others"

    config: PipelineParallel
    choices: PipelineChoices

    def __init__(self, config: PipelineParallel, choices: PipelineChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self.group: Group = setup.mesh.group("pipeline", setup.timeout)
        self._samples = setup.mesh.group("samples", setup.timeout)
        self.runs = Runs(config, choices, setup.mesh, setup.timeout)
        self._tied: TiedGradients | None = None
        self._stack: BlockStack | None = None
        self._weight_gradients: WeightGradients | None = None
        self._evaluation: Evaluation | None = None
        self._model: StagedModel | None = None
        """None before the first training step."""
        self._batches = 0
        self._lanes: Lanes | None = None
        """None before the second batch: the first one shows whether lanes are safe, see :meth:`_choose_lanes`."""

    @property
    def groups(self) -> tuple[Group, ...]:
        tied = self._tied.groups.values() if self._tied is not None else ()
        return self.group, self._samples, *dict.fromkeys(self.runs.channels.values()), *tied

    # -- set-up ------------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> None:
        config = self.config
        name, blocks, self.partition = make_partition(model, config, self.setup.roles)
        self._state = StageState(self.partition, self.group)
        self._tied = TiedGradients(self.partition, self.mesh.sets("pipeline"), self.group.rank, self.timeout)
        self._mark()
        if not self._state.was_complete:  # each rank has initialised its own copies of tied parameters, and all buffers
            self._tied.share_values()
            self._state.send(self.partition.is_buffer)
        self.partition.drop(self.group.rank)
        self._device = next(model.parameters()).device
        self._module = model
        self._first_stage = self.partition.modules_before(model)
        self._stack = self.setup.boundary.make_stack(blocks, name, has_remote_blocks=config.size > 1)
        self._evaluation = Evaluation(
            self._stack,
            self.partition,
            self.group,
            next(iter(self.runs.channels.values()), self.group),
            on_last_stage=config.evaluation == "last_stage",
            device=self._device,
        )
        self._weight_gradients = self._make_weight_gradients(model, name, blocks)

    def _make_weight_gradients(self, model: nn.Module, name: str, blocks: Blocks) -> WeightGradients | None:
        """Splits the backward of this rank's linear layers, as the schedule and the choices need it."""
        schedule = self.config.plan(self.config.count)
        defers_head = self.choices.defer_embedding_wgrad.value
        if not schedule.splits_backward and not defers_head:
            return None
        stages = schedule.stages_of(self.group.rank)
        modules: list[nn.Module] = []
        if schedule.splits_backward:
            modules += [blocks[number] for stage in stages for number in self.partition.stages[stage]]
        if defers_head and self.config.stages - 1 in stages:
            modules += heads(model, name, blocks)
        return WeightGradients(modules)

    @classmethod
    def holds(cls, model: nn.Module, config: PipelineParallel, roles: Mapping[str, str], mesh: ParallelMesh) -> Callable[[str], bool]:
        if config.size == 1:
            return super().holds(model, config, roles, mesh)
        _, _, partition = make_partition(model, config, roles)
        return lambda name: mesh.index("pipeline") in partition.holders(name)

    def _mark(self) -> None:
        """Tells the other modes the stage of each parameter, and which gradients are complete at the end of backward only."""
        local = [stage for stage, rank in enumerate(self.partition.placement) if rank == self.group.rank]
        for name, stages in self.partition.users.items():
            if not self.partition.is_buffer(name) and (users := [stage for stage in stages if stage in local]):
                setattr(self.partition.parameter(name), STAGE, users[0])
        for name in self.partition.used_by_several(local):  # no stage's last backward shows that all stages have added their part
            setattr(self.partition.parameter(name), LATE_GRADIENT, True)

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        known = {id(p) for p in self.partition.parameters()}
        if any(id(p) not in known for o in optimizers for group in o.param_groups for p in group["params"]):
            raise ConfigError(
                "the optimizer has parameters that are not the module's at setup. Create parameters in __init__ or configure_model, "
                "and give the optimizer only those of self.parameters()."
            )
        self._optimizers = optimizers

    def adopt_parameters(self) -> None:
        """Drops the state of absent parameters, which an optimizer has loaded with that of the unsharded model."""
        for parameter in self.partition.absent_parameters().values():
            for optimizer in self._optimizers:
                optimizer.state.pop(parameter, None)

    # -- training ----------------------------------------------------------------------------------------------------

    def run_step(self, step: Step) -> None:
        # If the first step is compared with that of the unsharded model, or had a finite loss, a NaN loss is the user's.
        is_checked = self.config.size > 1 and not self._batches and not self.setup.first_step_is_verified
        self._batches += 1
        parts, weights = self._split(step)
        if self._batches == 1:
            self._warn_about_microbatches(step.batch, len(parts))
        model = self._model = self._model or self._stage_model(step, parts[0])
        runner, transfers = self.runs.of(len(parts), model.flow, self._device)
        watched = reachable_objects(self._module) if self._batches == 1 and self.choices.lanes.value else ()
        stages = Stages(model, Microbatches(step, parts, weights.loss), runner.actions, check=is_checked, watched=watched)
        assert self._tied is not None, "the model is parallelized before it is trained"
        self._tied.start_step()
        with preserve_random_state(self._device):
            transfers.start_batch([shapes_of(part) for part in parts])
            runner.run(stages, self.timeline, self._lanes)
        stages.finish()
        if watched:
            self._choose_lanes(stages.written)
        step.log(self.with_the_loss(lambda: step.merge_logs(weights.loss, weights.logs)))

    def _choose_lanes(self, written: set[str]) -> None:
        """Turns lanes on after the first batch, which ran without. Collective over the world.

        Args:
            written: attributes that this rank's backwards have written.

        Raises:
            ConfigError: a rank's backwards have written some, and lanes were requested.
        """
        written = set().union(*all_gather_objects(written))
        if not written:
            self._lanes = self.setup.lanes
            return
        message = (
            f"an activation checkpoint writes {', '.join(sorted(written)[:4])} when it runs a block again in backward. In a lane, the "
            "forward of another microbatch would read that. Return such values from the block, or checkpoint a part that writes none"
        )
        if self.choices.lanes.asked is True:
            raise ConfigError(f"pipeline_parallel.lanes: true cannot run here: {message}, or set lanes: false")
        warnings.warn(f"pipeline_parallel.lanes is off: {message} (warned once)", stacklevel=2)

    def _split(self, step: Step) -> tuple[list[Any], Weights]:
        """The microbatches of a step, and their weights."""
        dims = self.config.batch_dims
        size = microbatches.count_samples(step.batch, dims)
        if self._batches <= 1:  # the last batch of an epoch may be smaller
            microbatches.refuse_other_dim(step.batch, size, step.batch_size, dims)
        count = min(self.config.count, size)
        if step.forward_spans_samples:  # ranks with fewer samples would make fewer forwards than those that wait for them
            count = min(self._samples.all_gather_objects(count))
        parts = microbatches.split_batch(step.batch, count, dims)
        sizes = [size // count + (number < size % count) for number in range(count)]
        weights = weigh(parts, sizes, self.config.microbatch_weight, step.weight)
        if 0 in weights.loss and self.mesh.degrees.experts_span_samples:
            raise ConfigError(
                f"pipeline_parallel.microbatch_weight: microbatch {weights.loss.index(0)} of this batch has weight 0, so it has no "
                "backward here, and ranks with other samples wait for its tokens in their experts. Drop samples without labels, use "
                "fewer microbatches, or spread experts only over ranks that share a batch"
            )
        return parts, weights

    def _warn_about_microbatches(self, batch: Any, count: int) -> None:
        if self.group.rank > 0 or self.group.ranks[0] > 0:
            return
        size = microbatches.count_samples(batch, self.config.batch_dims)
        if unsplit := microbatches.unsplit_tensors(batch, self.config.batch_dims):
            tensors = ", ".join(f"{path} {shape}" for path, shape in unsplit.items())
            warnings.warn(
                f"the batch has {size} samples, and each microbatch gets all of {tensors}. If one of these is not a table or mask for "
                "the complete batch, name its dim of samples: pipeline_parallel.batch_dims (warned once)",
                stacklevel=2,
            )
        if count < self.config.count:
            warnings.warn(
                f"a batch of {size} samples is split into {count} microbatches, but the plan has {self.config.count} (warned once)",
                stacklevel=2,
            )

    def _stage_model(self, step: Step, part: Any) -> StagedModel:
        """Finds the tensors that stages send, on one microbatch. Collective."""
        assert self._stack is not None, "the model is parallelized before it is trained"
        flow = self._find_flow(self._stack, step, part)
        return StagedModel(self._stack, flow, self._first_stage, self._weight_gradients, self._sum_tied, self.setup.boundary.forwards)

    def _find_flow(self, stack: BlockStack, step: Step, part: Any) -> Flow:
        stages = self.partition.stages

        def run(stage: int, current_pass: Pass) -> None:
            current_pass.before_block = block_seeder(step.key, 0)
            absent = self.partition.absent_parameters()
            loss: Tensor | None = None
            with step.trial(), preserve_random_state(self._device), Misplaced(absent, current_pass) as misplaced:
                seed_all(*step.key, 0)
                with stack.running(current_pass):
                    loss = step.forward(copied(part), 0)  # a copy: the microbatch is run again
            is_last = stage == len(stages) - 1
            outputs = [x for leaf, x in current_pass.kept.items() if leaf[0] == stages[stage].stop - 1]
            misplaced.refuse([loss] if is_last and loss is not None else outputs, stage, stack.name)

        return find_flow(stages, self.partition.placement, self.group, self._device, run, stack.size)

    def unsharded_microbatches(self, step: Step) -> Iterator[tuple[Any, int, float]]:
        assert self._stack is not None, "the model is parallelized before it is trained"
        parts, weights = self._split(step)
        with preserve_random_state(self._device):
            for number, (part, share) in enumerate(zip(parts, weights.loss, strict=True)):
                seed_all(*step.key, number)
                with self._stack.unsharded(block_seeder(step.key, number)):
                    yield part, number, share

    def trial(self) -> AbstractContextManager[None]:
        return self.runs.trial()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        names = self._state.gather(buffers=False)  # no training step has changed a buffer yet
        try:
            yield
        finally:
            self.partition.drop(self.group.rank, names)

    def local_part(self, name: str, tensor: Tensor) -> Tensor | None:
        return tensor if self.group.rank in self.partition.holders(name) else None

    @property
    def has_the_loss(self) -> bool:
        return self.group.rank == self.partition.placement[-1]

    def with_the_loss(self, compute: Callable[[], Any]) -> Any:
        result: Any = None
        error: Exception | None = None
        if self.has_the_loss:
            try:
                result = compute()
            except Exception as raised:  # the other ranks wait for the result
                error = raised
        result, message = self.group.share_object((result, in_words(error) if error else None), self.partition.placement[-1])
        if error is not None:
            raise error
        if message is not None:
            raise_from_words(message)
        return result

    def finish_backward(self) -> None:
        if not self._holds_gradients and self._tied is not None:
            self._tied.finish()

    def _sum_tied(self) -> None:
        """Posts the sums of tied gradients that are complete after the last backward. Deferred gradients of weights are not."""
        if not self._holds_gradients and self._tied is not None:
            self._tied.post(self._weight_gradients)

    def reduce_norm(self, squares: Squares) -> Squares:
        return Squares(*self.group.all_reduce(torch.stack(squares), label="pipeline.norm").wait())

    # -- evaluation --------------------------------------------------------------------------------------------------

    @property
    def evaluates_loss_on_one_rank(self) -> bool:
        return self._evaluation is not None and self._evaluation.is_on_last_stage

    def error_without_loss(self, message: str | None) -> str | None:
        # Over a channel: ranks that have not failed may be in a transfer of the group.
        messages = next(iter(self.runs.channels.values())).all_gather_objects(message)
        return next(filter(None, messages), None) if messages[self.partition.placement[-1]] is None else None

    def evaluating(self) -> AbstractContextManager[None]:
        if self._evaluation is None:  # after the fit every rank has the unsharded model
            return nullcontext()
        return self._evaluation.step(self._model.flow if self._model is not None else None)

    def start_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.start()

    def finish_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.finish()

    # -- state -------------------------------------------------------------------------------------------------------

    def gather_model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._state.gather_model_state(state)

    def gather_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._state.gather_optimizer_state(state)

    def local_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._state.local_optimizer_state(optimizer, state)

    def layout_of(self, name: str) -> tuple[int, ...]:
        return self.partition.holders(name)

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        assert isinstance(layout, tuple), "the ranks that hold a tensor"
        return () if self.mesh.index("pipeline", rank) in layout else None

    def release(self, *, complete: bool = True) -> None:
        if self._stack is None:
            return
        self._stack.remove()
        self.setup.lanes.close()
        self._stack = self._evaluation = None
        if complete:
            self.runs.finish()
        if self._weight_gradients is not None:
            self._weight_gradients.remove()
        self._state.release(complete=complete)
        for parameter in self.partition.parameters():
            clear_markers(parameter)
        if complete:
            for group in set(self.runs.channels.values()):
                group.stop()
