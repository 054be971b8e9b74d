"""The tensor mode: shards the linear layers of the blocks, the embedding and the head over the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, LATE_GRADIENT
from lightning_overlap.modes.base import Holder, Setup
from lightning_overlap.modes.tensor import symm_mem, userbuffers
from lightning_overlap.modes.tensor.config import TensorChoices, TensorFacts, TensorParallel
from lightning_overlap.modes.tensor.features import gathering_forward, splitting_forward
from lightning_overlap.modes.tensor.first_blocks import FirstBlocks, first_of_each_kind
from lightning_overlap.modes.tensor.gemm import Exchange, shares
from lightning_overlap.modes.tensor.linear import column_forward
from lightning_overlap.modes.tensor.partition import Partition, Piece
from lightning_overlap.modes.tensor.patches import Patches
from lightning_overlap.modes.tensor.plan import ShardedLayer, TensorPlan, find_plan
from lightning_overlap.modes.tensor.random_state import CommonNumbers
from lightning_overlap.modes.tensor.regions import Regions, SequenceCut
from lightning_overlap.modes.tensor.replicated import ReplicatedGradients
from lightning_overlap.modes.tensor.vocab import Vocabulary, embedding_forward, head_forward
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.absent import is_absent
from lightning_overlap.state.shards import Place

VOCABULARY = ("vocab_embedding", "vocab_head")


class TensorMode(Holder):
    """See the module's docstring."""

    # More than 20 methods: 18 are verbs of the contract.

    name = "tensor"
    nesting = Nesting.LAYERS
    keeps_bits = False

    config: TensorParallel
    choices: TensorChoices

    def __init__(self, config: TensorParallel, choices: TensorChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self.group: Group = self.mesh.group("tensor", self.timeout, "tensor")
        self.group.before_wait = setup.lanes.hand_over
        self._sharded = choices.sequence_parallel.value
        self._exchange = Exchange(
            self.group,
            sharded=self._sharded,
            overlapped=choices.overlap.value,
            splits=None if config.splits == "auto" else config.splits,
            keep_gathered=config.keep_gathered_input,
            methods=config.methods,
        )
        self._engine: userbuffers.UserbuffersLayers | None = None
        if choices.backend.value == "userbuffers":
            self._engine = userbuffers.UserbuffersLayers(userbuffers.library(), self._exchange)
        self._patches = Patches()
        self._first_rank = self.mesh.index("gradients") == 0

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def refuse(self, model: nn.Module) -> None:
        shared = find_plan(model, self.setup.roles, self.group.size).shared_by_regions
        if shared and not self._sharded:
            raise ConfigError(
                f"shared between an attention or mlp and another module: {', '.join(shared[:3])}. Without sequence_parallel a rank "
                "has only a part of its gradient. Set tensor_parallel.sequence_parallel: true, or use separate parameters"
            )

    def parallelize(self, model: nn.Module) -> None:
        plan = find_plan(model, self.setup.roles, self.group.size)
        layers = [layer for layer in plan.layers if layer.role not in VOCABULARY or self.choices.vocab_parallel.value]
        blocks = list(model.get_submodule(plan.blocks).children())
        self._numbers = CommonNumbers(self.group.rank, next(model.parameters()).device, self.setup.boundary.forwards)
        fused = symm_mem.operators(self.group) if self.choices.backend.value == "symm_mem" else None
        self._regions = Regions(self._exchange, self.setup.boundary, self._numbers, fused, self._engine)
        self._names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._partition = Partition(layers, self.group)
        self._replicated = ReplicatedGradients(
            self._summands(plan, blocks), self.group, lambda: self.setup.boundary.forwards.current.in_backward
        )
        is_checked = self.config.verify_blocks and not self.setup.first_step_is_verified
        self._first_blocks = FirstBlocks(
            first_of_each_kind(blocks, plan.blocks) if is_checked else [],
            self._regions,
            self._partition,
            self._replicated,
            plan.counts,
        )
        self._partition.shard()
        self._install = partial(self._patch, model, plan, layers, blocks)
        self._install()

    def _patch(self, model: nn.Module, plan: TensorPlan, layers: Sequence[ShardedLayer], blocks: Sequence[nn.Module]) -> None:
        """Makes the model compute with this rank's pieces, until :meth:`_uninstall`."""
        patches = self._patches
        masks = ExitStack()
        masks.enter_context(self._numbers.masks())
        patches.add(masks.close)
        self._mark(model)
        self._regions.columns = {region.name: [layer.module for layer in region.columns] for region in plan.regions}
        for layer in layers:
            self._patch_layer(layer)
        for (owner, name), count in plan.counts.items():
            patches.replace(model.get_submodule(owner), name, count // self.group.size)
        for region in plan.regions:
            gather_input = partial(self._regions.before_region, region.name)
            patches.hook(region.module.register_forward_pre_hook, gather_input, with_kwargs=True)
            patches.hook(region.module.register_forward_hook, self._regions.after_region)
            # Compiled code cannot read a PendingInput: the regions of a compiled block run without compilation.
            patches.replace(region.module, "forward", region.module.forward)
        # Also called after an error: an activation checkpoint ends its second forward in the middle.
        names = {layer.name for layer in layers}
        for module in (*blocks, *[region.module for region in plan.regions if not self._sharded and region.name not in names]):
            patches.hook(module.register_forward_hook, lambda *_: self._numbers.stop(), always_call=True)
        for check in self._first_blocks.waiting:  # before the boundary's hooks: the check gets the block's arguments unchanged
            patches.hook(check.block.register_forward_pre_hook, partial(self._first_blocks.check, check), with_kwargs=True)
        if self._sharded:
            for layer in plan.layers:
                if layer.role == "vocab_head":  # refused here: later, this rank's tokens against all labels fail with another error
                    patches.hook(layer.module.register_forward_pre_hook, lambda *_: self.setup.boundary.require_outside())
            patches.add(self.setup.boundary.register(blocks, SequenceCut(self._regions, self._numbers)))

    def _patch_layer(self, layer: ShardedLayer) -> None:
        """Replaces the forward of a sharded layer, if it must communicate."""
        forward: Callable[..., Any]
        if layer.role == "column" and layer.has_all_features:
            forward = gathering_forward(column_forward(layer.module), layer, self.group)
        elif layer.role == "column" and type(layer.module).forward is not nn.Linear.forward:
            forward = column_forward(layer.module)
        elif layer.role == "row":
            forward = self._regions.row_forward(layer.module, layer.name)
            forward = splitting_forward(forward, layer, self.group) if layer.has_all_features else forward
        elif layer.role in VOCABULARY:
            vocabulary = Vocabulary(self.group, shares(layer.parts[0], self.group.size), self._exchange.overlapped)
            make = embedding_forward if layer.role == "vocab_embedding" else head_forward
            forward = make(layer.module, vocabulary)
        else:
            return
        self._patches.replace(layer.module, "forward", forward)

    def _uninstall(self) -> None:
        """Makes the model compute as the user wrote it."""
        self._patches.undo()
        self._numbers.stop()
        self.setup.boundary.start_forward()  # forgets inputs that were prepared for the sharded model

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        pieces = [(parameter, parameter.data) for parameter in self._partition.parameters.values()]
        try:
            self._uninstall()
            self._partition.restore(complete=True)
            yield
        finally:
            for parameter, data in pieces:
                parameter.data = data
            self._install()

    @contextmanager
    def trial(self) -> Iterator[None]:
        self._numbers.without_masks = True
        try:
            yield
        finally:
            self._numbers.without_masks = False

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        piece = self._piece(name)
        return tensor if piece is None else piece.of(tensor, self.group.rank, self.group.size)

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Shards the state that an optimizer creates in its constructor (Adagrad), like its parameter."""
        for optimizer in optimizers:
            for parameter, values in optimizer.state.items():
                if (piece := self._partition.pieces.get(id(parameter))) is None:
                    continue
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == piece.shape:
                        values[key] = piece.of(value, self.group.rank, self.group.size).clone()

    def _summands(self, plan: TensorPlan, blocks: Sequence[nn.Module]) -> dict[int, nn.Parameter]:
        """Replicated parameters of whose gradient each rank has a summand, by id."""
        inside = list(blocks) if self._sharded else [region.module for region in plan.regions]
        # If tokens are not sharded, these are used after the sum: their gradients are the same on all ranks.
        after = {id(parameter) for layer in plan.layers if not self._sharded for parameter in layer.after_sum}
        return {
            id(parameter): parameter
            for module in inside
            for parameter in module.parameters()
            if id(parameter) not in self._partition.pieces and id(parameter) not in after
        }

    def _mark(self, model: nn.Module) -> None:
        """Tells the other modes which gradients are complete at the end of backward only, and which are counted on another rank."""
        for parameter in self._replicated.parameters.values():
            self._patches.mark(parameter, LATE_GRADIENT)
        self._patches.add(*self._replicated.guard())
        for parameter in model.parameters():
            if id(parameter) not in self._partition.pieces and self.group.rank > 0:
                self._patches.mark(parameter, COUNTED_ELSEWHERE)

    # -- training ----------------------------------------------------------------------------------------------------

    def start_forward(self) -> None:
        self._regions.has_trained = True
        self.setup.boundary.start_forward()

    def explain_failure(self, error: Exception) -> None:
        self.setup.boundary.explain_failure(error)

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()
        self._replicated.start_backward()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        self._replicated.finish_backward(held=self._held)

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        return self.group.all_reduce(sum_of_squares, label="tensor.norm").wait()

    # -- weights are read --------------------------------------------------------------------------------------------

    def gather_model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self._patches or not self._first_rank:
            return state
        unsharded: dict[str, Any] = {}
        gathered: dict[int, Tensor] = {}
        for name, value in state.items():
            piece = self._piece(name)
            if piece is not None and not is_absent(value):
                if id(piece) not in gathered:
                    gathered[id(piece)] = self._partition.gather(piece, value)
                value = gathered[id(piece)] if self.group.rank == 0 else value
            unsharded[name] = value
        return unsharded

    def gather_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not self._first_rank:
            return state
        return self._change_state(optimizer, state, lambda piece, value: self._partition.gather(piece, value).cpu(), is_sharded=True)

    def local_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        rank, size = self.group.rank, self.group.size
        return self._change_state(optimizer, state, lambda piece, value: piece.of(value, rank, size).clone(), is_sharded=False)

    def _change_state(
        self, optimizer: Optimizer, state: dict[str, Any], change: Callable[[Piece, Tensor], Tensor], *, is_sharded: bool
    ) -> dict[str, Any]:
        """Applies ``change`` to the tensors of a state dict that have the shape of a sharded parameter.

        Args:
            optimizer: whose state it is.
            state: its ``state_dict()``.
            change: gets the parameter's piece and the tensor.
            is_sharded: whether these tensors have the piece's shape or the unsharded shape.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changed: dict[int, dict[str, Any]] = {}
        for number in sorted(state["state"]):
            values = state["state"][number]
            if number < len(parameters) and (piece := self._partition.pieces.get(id(parameters[number]))) is not None:
                shape = piece.shape_of(self.group.rank, self.group.size) if is_sharded else piece.shape
                values = {
                    key: change(piece, value) if isinstance(value, Tensor) and value.shape == shape else value
                    for key, value in values.items()
                }
            changed[number] = values
        return {**state, "state": changed}

    def _piece(self, name: str) -> Piece | None:
        return self._partition.pieces.get(self._names.get(name, 0))

    def layout_of(self, name: str) -> bool:
        """Whether the tensor is sharded."""
        return self._piece(name) is not None

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        return self.mesh.index("tensor", rank) if layout else ()

    def place_of(self, name: str) -> Place | None:
        piece = self._piece(name)
        return None if piece is None else piece.place(self.group.rank, self.group.size)

    def release(self, *, complete: bool = True) -> None:
        if not self._patches:
            return
        self._uninstall()
        if self._engine is not None and complete:
            self._engine.close()
        self._partition.restore(complete=complete)
        if complete:
            self.group.stop()


def look(model: nn.Module, config: TensorParallel, roles: Mapping[str, str]) -> TensorFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    plan = find_plan(model, roles, config.size)
    counts = Counter(layer.role for layer in plan.layers)
    modules = ", ".join(f"{n} {role}" for role, n in sorted(counts.items()))
    entries = max((layer.parts[0] for layer in plan.layers if layer.role in VOCABULARY), default=0)
    linears = [layer for layer in plan.layers if layer.role not in VOCABULARY]
    transposed = tuple(layer.name for layer in linears if not isinstance(layer.module, nn.Linear))
    return TensorFacts(f"{plan.source}: {modules}", plan.loose, entries, transposed, plan.shared_by_blocks)
