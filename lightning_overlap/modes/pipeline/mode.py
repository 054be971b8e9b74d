"""The pipeline mode: each rank keeps the blocks of its stages, and runs the user's training_step once a microbatch and stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import Pass
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.blocks import Blocks, find_blocks
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import LATE_GRADIENT, STAGE, clear_markers
from lightning_overlap.model.trees import copied
from lightning_overlap.modes.base import Driver, Holder, Setup
from lightning_overlap.modes.pipeline import layout
from lightning_overlap.modes.pipeline.config import PipelineChoices, PipelineFacts, PipelineParallel, scheduled
from lightning_overlap.modes.pipeline.evaluation import Evaluation
from lightning_overlap.modes.pipeline.flow import Flow, rehearse
from lightning_overlap.modes.pipeline.misplaced import Misplaced
from lightning_overlap.modes.pipeline.partition import Partition, heads, work
from lightning_overlap.modes.pipeline.stage import StagedModel, Stages
from lightning_overlap.modes.pipeline.tied import TiedGradients
from lightning_overlap.modes.pipeline.transfers import KnownForms, PipelineTransfers, channel_kinds, hops, lane
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients, what_splits
from lightning_overlap.modes.pipeline.weights import Weights, weigh
from lightning_overlap.ranks.announcements import in_words, raise_from_words
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import share
from lightning_overlap.ranks.world import backend
from lightning_overlap.steps import microbatches
from lightning_overlap.steps.microbatches import Microbatches, shapes_of
from lightning_overlap.steps.random_state import block_seeder, preserve_random_state, seed_all
from lightning_overlap.steps.runner import Runner
from lightning_overlap.steps.step import Step
from lightning_overlap.torch_seams import parameters_of


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
        mesh, timeout = setup.mesh, setup.timeout
        self._rank = mesh.index("pipeline")
        self._placement = config.plan(config.count).placement
        self.group: Group = mesh.group("pipeline", timeout)
        lanes = {kind: lane(kind, backend()) for kind in channel_kinds(self._placement)}
        made = {name: mesh.group("pipeline", timeout, f"pipeline.{name}", gathers=False) for name in sorted(set(lanes.values()))}
        self.channels = {kind: made[name] for kind, name in lanes.items()}
        for way in sorted(self.channels):
            self.channels[way].connect(hops(self._placement, way))
        self._prefetch = config.p2p_prefetch if choices.overlap_p2p.value else None
        self._known = KnownForms()
        self._tied: TiedGradients | None = None
        self._stack: BlockStack | None = None
        self._weight_gradients: WeightGradients | None = None
        self._model: StagedModel | None = None
        """Known from the first training step on."""
        self._runs: dict[int, tuple[Runner, PipelineTransfers]] = {}
        """By number of microbatches."""
        self._checked = 0
        self._lent: list[str] = []

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.group, *dict.fromkeys(self.channels.values()), *(self._tied.groups.values() if self._tied is not None else ())

    # -- set-up ------------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> None:
        own = self.config
        name, blocks, self._stages = _cut(model, own, self.setup.roles)
        self.partition = Partition(model, name, blocks, self._stages, self._placement, own.held_by_all)
        self._whole = all(self.group.all_gather_objects(self.partition.is_whole))
        self._tied = TiedGradients(self.partition, self.mesh.sets("pipeline"), self._rank, self.timeout)
        self._mark()
        if not self._whole:  # each has made those of its own stages, and goes through what is around the blocks of all
            self._tied.share_values()
            self._share(self.partition.is_buffer)
        self.partition.keep(self._rank)
        self._device = next(model.parameters()).device
        self._before = self.partition.before(model)
        self._stack = self.setup.boundary.make_stack(blocks, name, has_remote_blocks=own.size > 1)
        deferring = self.choices.defer_embedding_wgrad.value
        if own.plan(own.count).splits_backward or deferring:
            mine = own.plan(own.count).stages_of(self._rank)
            modules: list[nn.Module] = []
            if own.plan(own.count).splits_backward:
                modules += [blocks[number] for stage in mine for number in self._stages[stage]]
            if deferring and own.stages - 1 in mine:
                modules += heads(model, name, blocks)
            self._weight_gradients = WeightGradients(modules)

    @classmethod
    def holds(cls, model: nn.Module, config: PipelineParallel, roles: Mapping[str, str], mesh: ParallelMesh) -> Callable[[str], bool]:
        if config.size == 1:
            return super().holds(model, config, roles, mesh)
        name, blocks, stages = _cut(model, config, roles)
        partition = Partition(model, name, blocks, stages, config.plan(config.count).placement, config.held_by_all)
        return lambda name: mesh.index("pipeline") in partition.holders(name)

    def _mark(self) -> None:
        """Tells the other modes the stage of each parameter, and which parameters are complete at the end of backward only."""
        local = [stage for stage, rank in enumerate(self._placement) if rank == self._rank]
        for name, stages in self.partition.users.items():
            if not self.partition.is_buffer(name) and (chosen := [stage for stage in stages if stage in local]):
                setattr(self.partition.parameter(name), STAGE, chosen[0])
        for name in self.partition.repeated(local):  # each stage has a last backward, and none tells whether it is the last of all
            setattr(self.partition.parameter(name), LATE_GRADIENT, True)

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        everything = {id(p) for p in self.partition.parameters()}
        if any(id(p) not in everything for o in optimizers for group in o.param_groups for p in group["params"]):
            raise ConfigError(
                "the optimizer has parameters that are not the module's at setup. Create parameters in __init__ or configure_model, "
                "and give the optimizer only those of self.parameters()."
            )

        self._optimizers = optimizers

    def adopt_parameters(self) -> None:
        """An optimizer that has loaded the state of the whole model keeps this rank's."""
        for held in self.partition.foreign.values():
            for optimizer in self._optimizers:
                optimizer.state.pop(held.parameter, None)

    # -- training ----------------------------------------------------------------------------------------------------

    def run_step(self, step: Step) -> None:
        # Where the first step is compared with that of the model whole, or has had a loss, a later NaN is the user's.
        checking = not self._checked and not self.setup.first_step_is_verified
        self._checked += 1
        parts, weights = self._parts(step)
        if self._checked == 1:
            self._tell_how_it_is_cut(step.batch, len(parts))
        model = self._model = self._model or self._stage_model(step, parts[0])
        runner, transfers = self._run_of(len(parts), model.flow)
        stages = Stages(model, Microbatches(step, parts, weights.loss), runner.actions, check=checking)
        assert self._tied is not None, "the model is parallelized before it is trained"
        self._tied.start_step()
        with preserve_random_state(self._device):
            transfers.start_batch([shapes_of(part) for part in parts])
            runner.run(stages, self.timeline)
        stages.finish()
        step.log(self.with_the_loss(lambda: step.merge_logs(weights.loss, weights.logs)))

    def _run_of(self, count: int, flow: Flow) -> tuple[Runner, PipelineTransfers]:
        """The schedule of a batch of ``count`` microbatches, ready to run."""
        if count not in self._runs:
            schedule = scheduled(self.config, self.choices, count)
            counts = [len(flow.after(stage)) for stage in range(len(self._stages))]
            transfers = PipelineTransfers(schedule, self._rank, self.channels, self._known, self._device, self._prefetch, counts)
            self._runs[count] = Runner(schedule, self._rank, transfers), transfers
        return self._runs[count]

    def _stage_model(self, step: Step, part: Any) -> StagedModel:
        """Finds what goes from stage to stage, on one microbatch. Collective."""
        assert self._stack is not None, "the model is parallelized before it is trained"
        flow = self._rehearse(self._stack, step, part)
        return StagedModel(self._stack, flow, self._before, self._weight_gradients, self._sum_tied, self.setup.boundary.forwards)

    def _tell_how_it_is_cut(self, batch: Any, count: int) -> None:
        if self._rank > 0 or self.group.ranks[0] > 0:
            return
        size = microbatches.count_samples(batch, self.config.batch_dims)
        if whole := microbatches.unsplit_tensors(batch, self.config.batch_dims):
            said = ", ".join(f"{path} {shape}" for path, shape in whole.items())
            warnings.warn(
                f"the batch has {size} samples, and each microbatch has all of {said}. If that is no table or mask of the whole "
                "batch, say what is cut along which dim: pipeline_parallel.batch_dims (said once)",
                stacklevel=2,
            )
        if count < self.config.count:
            warnings.warn(
                f"a batch of {size} samples is cut into {count} microbatches, and the plan says {self.config.count} (said once)",
                stacklevel=2,
            )

    def _rehearse(self, stack: BlockStack, step: Step, part: Any) -> Flow:
        def run(stage: int, current_pass: Pass) -> None:
            current_pass.before_block = block_seeder(step.key, 0)
            absent = {name: held.parameter for name, held in self.partition.foreign.items()}
            loss: Tensor | None = None
            with step.trial(), preserve_random_state(self._device), Misplaced(absent, current_pass) as misplaced:
                seed_all(*step.key, 0)
                with stack.running(current_pass):
                    loss = step.forward(copied(part), 0)  # which is run again
            last = stage == len(self._stages) - 1
            made = [x for leaf, x in current_pass.kept.items() if leaf[0] == self._stages[stage].stop - 1]
            misplaced.refuse([loss] if last and loss is not None else made, stage, stack.name)

        return rehearse(self._stages, self._placement, self.group, self._device, run, stack.size)

    def whole_parts(self, step: Step) -> Iterator[tuple[Any, int, float]]:
        assert self._stack is not None, "the model is parallelized before it is trained"
        parts, weights = self._parts(step)
        with preserve_random_state(self._device):
            for number, (part, share) in enumerate(zip(parts, weights.loss, strict=True)):
                seed_all(*step.key, number)
                with self._stack.unsharded(block_seeder(step.key, number)):
                    yield part, number, share

    @contextmanager
    def trial(self) -> Iterator[None]:
        try:
            with self._known.preserved():  # in another precision, activations of the same batch have another dtype
                yield
        finally:
            for _, transfers in self._runs.values():  # and other kernels, which have not run yet
                transfers.forget_kinds()

    @contextmanager
    def whole(self) -> Iterator[None]:
        taken = self._gather(buffers=False)  # which no training step has changed yet
        try:
            yield
        finally:
            self.partition.keep(self._rank, taken)

    def local_part(self, name: str, tensor: Tensor) -> Tensor | None:
        return tensor if self._rank in self.partition.holders(name) else None

    def _parts(self, step: Step) -> tuple[list[Any], Weights]:
        """The microbatches of a step, and what each one counts."""
        dims = self.config.batch_dims
        size = microbatches.count_samples(step.batch, dims)
        if self._checked <= 1:  # the last batch of an epoch may be smaller
            microbatches.refuse_other_dim(step.batch, size, step.batch_size, dims)
        count = min(self.config.count, size)
        parts = microbatches.split_batch(step.batch, count, dims)
        sizes = [size // count + (number < size % count) for number in range(count)]
        return parts, weigh(parts, sizes, self.config.microbatch_weight, step.weight)

    def _gather(self, *, buffers: bool) -> list[str]:
        """Every rank gets the whole model; the names of the parameters that it had not."""
        taken = self.partition.take_back()
        self._share(lambda name: buffers or not self.partition.is_buffer(name))
        return taken

    def _share(self, wanted: Callable[[str], bool]) -> None:
        """Every rank gets what another one holds, of the parameters and buffers that are wanted."""
        for rank in range(self.group.size):
            share([self.partition.tensor(name) for name in self.partition.owned(rank) if wanted(name)], self.group, rank)

    @property
    def has_the_loss(self) -> bool:
        return self._rank == self._placement[-1]

    def with_the_loss(self, compute: Callable[[], Any]) -> Any:
        found: Any = None
        failed: Exception | None = None
        if self.has_the_loss:
            try:
                found = compute()
            except Exception as error:  # the others wait for an answer
                failed = error
        found, words = self.group.share_object((found, in_words(failed) if failed else None), self._placement[-1])
        if failed is not None:
            raise failed
        if words is not None:
            raise_from_words(words)
        return found

    def finish_backward(self) -> None:
        if not self._held and self._tied is not None:
            self._tied.finish()

    def _sum_tied(self) -> None:
        """Sums the tied gradients that are complete after the last backward; gradients of weights may be left of it."""
        if not self._held and self._tied is not None:
            self._tied.post(self._weight_gradients)

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        return self.group.all_reduce(sum_of_squares, label="pipeline.norm").wait()

    # -- evaluation --------------------------------------------------------------------------------------------------

    @property
    def mirrors_evaluation(self) -> bool:
        return self._stack is not None and self.config.evaluation == "mirror" and self.group.size > 1

    @property
    def _hops(self) -> Group:
        # Threads wait for its transfers, so that who waits learns of another rank's error.
        return next(iter(self.channels.values()))

    def failed_without_loss(self, message: str | None) -> str | None:
        # On connections of their own: where this was not reached, others may be in the middle of something on the group's.
        everyone = self._hops.all_gather_objects(message)
        return next(filter(None, everyone), None) if everyone[self._placement[-1]] is None else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hidden states go from stage to stage; the last ones to all ranks, or to the one with the loss, and the others leave."""
        if self._stack is None or self.group.size == 1:  # after a fit, when every rank has the whole model, or with one rank
            yield
            return
        mirrored = self.mirrors_evaluation
        again = self._refuse_to_go_again if mirrored else None
        flow = self._model.flow if self._model is not None else None
        plan = Evaluation(self._stages, self._placement, flow, self._hops, self._device)
        current_pass = plan.make_pass(self._stack.size, self._placement[-1] if mirrored else None, again)
        try:
            with self._stack.running(current_pass):
                yield
        finally:
            current_pass.release()

    @staticmethod
    def _refuse_to_go_again() -> None:
        raise ConfigError(
            "validation_step calls the model a second time, and with pipeline_parallel.evaluation='mirror' the other stages have left "
            "it: set evaluation='replicate'"
        )

    def start_evaluation(self) -> None:
        """Every rank gets what comes after the blocks, until :meth:`finish_evaluation`; not if one alone goes on."""
        if self._stack is None or self.mirrors_evaluation:
            return
        self._lent = self.partition.take_back(self.partition.tail)
        with torch.no_grad():
            share([self.partition.tensor(name) for name in self.partition.tail], self.group, self._placement[-1])

    def finish_evaluation(self) -> None:
        if self._stack is None:
            return
        self.partition.keep(self._rank, self._lent)
        self._lent = []

    # -- weights are read --------------------------------------------------------------------------------------------

    def whole_model(self, state: dict[str, Any]) -> dict[str, Any]:
        """The module's ``state_dict`` with every stage's values, on the pipeline's first rank; elsewhere this rank's alone."""
        if self.group.ranks[0] != 0:
            return state  # a replica of the pipeline that has rank 0, which saves
        mine = set(self.partition.owned(self._rank))
        parts = self.group.gather_objects({name: state[name].cpu() for name in mine if name in state and self._rank > 0})
        found = {name: value for part in parts for name, value in part.items()}
        return {name: found.get(self.partition.first_names.get(name, name), value) for name, value in state.items()}

    def whole_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's ``state_dict()`` with every stage's values, on the pipeline's first rank."""
        if self.group.ranks[0] != 0:
            return state
        parts = self.group.gather_objects(state["state"])
        return {**state, "state": {number: value for part in reversed(parts) for number, value in part.items()}}

    def local_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Without the state of other stages, so that it is never on this rank's device."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        foreign = {id(held.parameter) for held in self.partition.foreign.values()}
        absent = {number for number, parameter in enumerate(parameters) if id(parameter) in foreign}
        return {**state, "state": {number: values for number, values in state["state"].items() if number not in absent}}

    def layout_of(self, name: str) -> tuple[int, ...]:
        return self.partition.holders(name)

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        assert isinstance(layout, tuple), "the holders of a tensor"
        return () if self.mesh.index("pipeline", rank) in layout else None

    def release(self, *, complete: bool = True) -> None:
        """The model is whole again on every rank, if it was."""
        if self._stack is None:
            return
        self._stack.remove()
        self._stack = None
        for _, transfers in self._runs.values() if complete else ():
            transfers.finish()
        if self._weight_gradients is not None:
            self._weight_gradients.remove()
        if complete and self._whole:
            self._gather(buffers=True)
        else:
            self.partition.take_back(room=self._whole)
            if complete:  # other stages' weights are nowhere here, but buffers are
                self._share(self.partition.is_buffer)
        for parameter in self.partition.parameters():
            clear_markers(parameter)
        if complete:
            for group in set(self.channels.values()):
                group.stop()


def look(model: nn.Module, config: PipelineParallel, roles: Mapping[str, str]) -> PipelineFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    name, blocks, stages = _cut(model, config, roles)
    costs = [work(block) for block in blocks]
    head = sum(layer.weight.numel() for layer in heads(model, name, blocks))
    by_stage = [sum(costs[number] for number in numbers) for numbers in stages]
    counts = tuple(map(len, stages))
    return PipelineFacts(name, counts, (*by_stage[:-1], by_stage[-1] + head), head, *what_splits(blocks))


def _cut(model: nn.Module, config: PipelineParallel, roles: Mapping[str, str]) -> tuple[str, Blocks, layout.Layout]:
    """Gives the name of the list of blocks, the blocks, and the numbers of each stage's blocks."""
    named = {role: name for name, role in roles.items()}
    given = config.layout is not None or config.layers_per_stage is not None  # which may leave stages without blocks
    name, blocks = find_blocks(model, named.get("blocks"), 1 if given else config.stages)
    return name, blocks, _lay_out(config, model, name, list(blocks))


def _lay_out(config: PipelineParallel, model: nn.Module, name: str, blocks: Sequence[nn.Module]) -> layout.Layout:
    if config.layout is not None:
        return layout.parse(config.layout, len(blocks), config.stages)
    if config.layers_per_stage is not None:
        return layout.counted(config.layers_per_stage, len(blocks), config.stages)
    costs = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outside = {True: 0, False: 0}  # whether before the blocks
    before = True
    for path, module in model.named_modules():
        inside = path == name or path.startswith(f"{name}.")
        before = before and not inside
        if not inside:
            outside[before] += sum(p.numel() for p in parameters_of(module).values() if p is not None)
    return layout.balanced(costs, config.stages, first=outside[True], last=outside[False])
