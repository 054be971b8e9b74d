"""The tensor mode: shards the linear layers of the blocks, the embedding and the head over the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.expert_layers import find_experts
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, LATE_GRADIENT
from lightning_overlap.modes.base import Setup, Squares
from lightning_overlap.modes.piece_holder import PieceHolder
from lightning_overlap.modes.tensor import symm_mem, userbuffers
from lightning_overlap.modes.tensor.block_shards import TensorShards
from lightning_overlap.modes.tensor.config import TensorChoices, TensorFacts, TensorParallel
from lightning_overlap.modes.tensor.features import gathering_forward, splitting_forward
from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.modes.tensor.linear import column_forward
from lightning_overlap.modes.tensor.patches import Patches
from lightning_overlap.modes.tensor.plan import ShardedLayer, TensorPlan, find_plan, pieces_of
from lightning_overlap.modes.tensor.random_state import CommonNumbers
from lightning_overlap.modes.tensor.regions import Regions, SequenceCut
from lightning_overlap.modes.tensor.replicated import ReplicatedGradients
from lightning_overlap.modes.tensor.vocab import Vocabulary, embedding_forward, head_forward
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.pieces import Partition, shares

VOCABULARY = ("vocab_embedding", "vocab_head")


class TensorMode(PieceHolder):
    """See the module's docstring."""

    # More than 20 methods: 18 are verbs of the contract.

    name = "tensor"
    nesting = Nesting.LAYERS
    holders = "tensor"
    replicas = "gradients"
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

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,)

    @property
    def uncounted_products(self) -> str:
        backend = self.choices.backend.value
        return f"tensor_parallel.backend {backend} multiplies matrices in kernels of its own" if backend != "p2p" else ""

    @property
    def uncounted_transfers(self) -> str:
        backend = self.choices.backend.value
        if backend == "p2p":
            return ""
        return f"tensor_parallel.backend {backend} sends in kernels of its own, unseen; with backend: p2p, all transfers are seen"

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
        self.partition = Partition(model, pieces_of(layers, plan.per_head.values()), self.group, "tensor.whole")
        spread = find_experts(model, self.setup.roles, experts)[1] if (experts := self.mesh.size("experts")) > 1 else ()
        self._experts = {id(parameter) for layer in spread for parameter in layer.spread_parameters}
        self._replicated = ReplicatedGradients(
            self._summands(plan, blocks), self.group, lambda: self.setup.boundary.forwards.current.in_backward
        )
        self.partition.shard()
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
        shards = TensorShards(self._regions, self.partition, self._replicated, plan.counts)
        patches.add(self.setup.first_blocks.register(blocks, plan.blocks, shards, verify=self.config.verify_blocks))
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
    def trial(self) -> Iterator[None]:
        self._numbers.without_masks = True
        try:
            yield
        finally:
            self._numbers.without_masks = False

    def _summands(self, plan: TensorPlan, blocks: Sequence[nn.Module]) -> dict[int, nn.Parameter]:
        """Replicated parameters of whose gradient each rank has a summand, by id."""
        inside = list(blocks) if self._sharded else [region.module for region in plan.regions]
        # If tokens are not sharded, these are used after the sum: their gradients are the same on all ranks.
        after = {id(parameter) for layer in plan.layers if not self._sharded for parameter in layer.after_sum}
        return {
            id(parameter): parameter
            for module in inside
            for parameter in module.parameters()
            if id(parameter) not in self.partition.pieces.keys() | after | self._experts
        }

    def _mark(self, model: nn.Module) -> None:
        """Tells the other modes which gradients are complete at the end of backward only, and which are counted on another rank."""
        for parameter in self._replicated.parameters.values():
            self._patches.mark(parameter, LATE_GRADIENT)
        self._patches.add(*self._replicated.guard())
        for parameter in model.parameters():
            if id(parameter) not in self.partition.pieces.keys() | self._experts and self.group.rank > 0:
                self._patches.mark(parameter, COUNTED_ELSEWHERE)

    # -- training ----------------------------------------------------------------------------------------------------

    def start_forward(self) -> None:
        self._regions.has_trained = True
        self.setup.boundary.start_forward()

    def raise_cause(self, error: Exception) -> None:
        self.setup.boundary.raise_if_between_blocks(error)

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()
        self._replicated.start_backward()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        self._replicated.finish_backward(held=self._holds_gradients)

    def reduce_norm(self, squares: Squares) -> Squares:
        return squares._replace(dense=self.group.all_reduce(squares.dense, label="tensor.norm").wait())

    def release(self, *, complete: bool = True) -> None:
        if not self._patches:
            return
        self._uninstall()
        if self._engine is not None and complete:
            self._engine.close()
        self.partition.restore(complete=complete)
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
