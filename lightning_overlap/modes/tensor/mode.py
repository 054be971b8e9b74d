"""The tensor mode: each rank has a part of every linear layer in the blocks, of the embedding and of the head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, LATE_GRADIENT
from lightning_overlap.model.patches import Hook, ReplacedForward
from lightning_overlap.modes.base import Holder, Setup
from lightning_overlap.modes.tensor import symm_mem, userbuffers
from lightning_overlap.modes.tensor.config import TensorChoices, TensorFacts, TensorParallel
from lightning_overlap.modes.tensor.features import gathering, splitting
from lightning_overlap.modes.tensor.first_blocks import FirstBlocks, first_of_each_kind
from lightning_overlap.modes.tensor.gemm import Exchange, shares
from lightning_overlap.modes.tensor.linear import column_forward
from lightning_overlap.modes.tensor.partition import Partition, Piece
from lightning_overlap.modes.tensor.plan import Cut, TensorPlan, find
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
        self._scattered = choices.sequence_parallel.value
        self._exchange = Exchange(
            self.group,
            scattered=self._scattered,
            overlapped=choices.overlap.value,
            splits=None if config.splits == "auto" else config.splits,
            keep_gathered=config.keep_gathered_input,
            methods=config.methods,
        )
        self._engine: userbuffers.UserbuffersLayers | None = None
        if choices.backend.value == "userbuffers":
            self._engine = userbuffers.UserbuffersLayers(userbuffers.library(), self._exchange)
        self._undo: list[Callable[[], None]] = []
        self._first_rank = self.mesh.index("gradients") == 0

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def refuse(self, model: nn.Module) -> None:
        shared = find(model, self.setup.roles, self.group.size).shared_by_regions
        if shared and not self._scattered:
            raise ConfigError(
                f"{', '.join(shared[:3])} belongs to an attention or mlp, where a rank has a part of its gradient, and to something "
                "else: with tensor_parallel.sequence_parallel off a parameter must be in one of the two only"
            )

    def parallelize(self, model: nn.Module) -> None:
        found = find(model, self.setup.roles, self.group.size)
        cuts = [cut for cut in found.cuts if cut.role not in VOCABULARY or self.choices.vocab_parallel.value]
        blocks = list(model.get_submodule(found.blocks).children())
        self._numbers = CommonNumbers(self.group.rank, next(model.parameters()).device, self.setup.boundary.forwards)
        fused = symm_mem.operators(self.group) if self.choices.backend.value == "symm_mem" else None
        self._regions = Regions(self._exchange, self.setup.boundary, self._numbers, fused, self._engine)
        self._names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._partition = Partition(cuts, self.group)
        self._replicated = ReplicatedGradients(
            self._summands(found, blocks), self.group, lambda: self.setup.boundary.forwards.current.in_backward
        )
        checked = self.config.verify_blocks and not self.setup.first_step_is_verified
        self._first_blocks = FirstBlocks(
            first_of_each_kind(blocks, found.blocks) if checked else [], self._regions, self._partition, self._replicated, found.counts
        )
        self._partition.keep()
        self._install = partial(self._patch, model, found, cuts, blocks)
        self._install()

    def _patch(self, model: nn.Module, found: TensorPlan, cuts: Sequence[Cut], blocks: Sequence[nn.Module]) -> None:
        """Has the model compute with this rank's pieces, until :meth:`_uninstall`."""
        masks = ExitStack()
        masks.enter_context(self._numbers.masks())
        self._undo.append(masks.close)
        self._mark(model)
        self._regions.columns = {region.name: [cut.module for cut in region.columns] for region in found.regions}
        for cut in cuts:
            if cut.role == "column" and cut.whole:
                self._replace(cut.module, "forward", gathering(column_forward(cut.module), cut, self.group))
            elif cut.role == "column" and type(cut.module).forward is not nn.Linear.forward:
                self._replace(cut.module, "forward", column_forward(cut.module))
            elif cut.role == "row":
                row = self._regions.row_forward(cut.module, cut.name)
                self._replace(cut.module, "forward", splitting(row, cut, self.group) if cut.whole else row)
            elif cut.role in VOCABULARY:
                vocabulary = Vocabulary(self.group, shares(cut.parts[0], self.group.size), self._exchange.overlapped)
                make = embedding_forward if cut.role == "vocab_embedding" else head_forward
                self._replace(cut.module, "forward", make(cut.module, vocabulary))
        for (owner, name), count in found.counts.items():
            self._replace(model.get_submodule(owner), name, count // self.group.size)
        for region in found.regions:
            self._hook(region.module.register_forward_pre_hook, partial(self._regions.before_region, region.name), with_kwargs=True)
            self._hook(region.module.register_forward_hook, self._regions.after_region)
            # Compiled code has no place for numbers that are on their way: a region of compiled blocks runs as it is.
            self._replace(region.module, "forward", region.module.forward)
        # However it is left: an activation checkpoint ends in the middle of what it runs again.
        direct = {cut.name for cut in cuts}
        for module in (*blocks, *[region.module for region in found.regions if not self._scattered and region.name not in direct]):
            self._hook(module.register_forward_hook, lambda *_: self._numbers.stop(), always_call=True)
        for check in self._first_blocks.waiting:  # before the boundary's hooks: the check is given what the block is called with
            self._hook(check.block.register_forward_pre_hook, partial(self._first_blocks.check, check), with_kwargs=True)
        if self._scattered:
            for cut in found.cuts:
                if cut.role == "vocab_head":  # this rank's tokens against all labels would fail in other words
                    self._hook(cut.module.register_forward_pre_hook, lambda *_: self.setup.boundary.require_outside())
            sequence = SequenceCut(self._regions, self._numbers)
            self._undo.append(self.setup.boundary.register(blocks, sequence))

    def _uninstall(self) -> None:
        """The model computes as the user wrote it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._numbers.stop()
        self.setup.boundary.start_forward()  # what was prepared is of the cut model

    @contextmanager
    def whole(self) -> Iterator[None]:
        pieces = [(parameter, parameter.data) for parameter in self._partition.parameters.values()]
        try:
            self._uninstall()
            self._partition.give_back(complete=True)
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
        """State that is made with the optimizer (Adagrad's) is cut like its parameter."""
        for optimizer in optimizers:
            for parameter, values in optimizer.state.items():
                if (piece := self._partition.pieces.get(id(parameter))) is None:
                    continue
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == piece.shape:
                        values[key] = piece.of(value, self.group.rank, self.group.size).clone()

    def _summands(self, found: TensorPlan, blocks: Sequence[nn.Module]) -> dict[int, nn.Parameter]:
        """Replicated parameters of whose gradients each rank has a summand, by id."""
        inside = list(blocks) if self._scattered else [region.module for region in found.regions]
        # Where all ranks have all tokens, these are used after the sum, on the same numbers on each.
        after = {id(parameter) for cut in found.cuts if not self._scattered for parameter in cut.after_sum}
        return {
            id(parameter): parameter
            for module in inside
            for parameter in module.parameters()
            if id(parameter) not in self._partition.pieces and id(parameter) not in after
        }

    def _mark(self, model: nn.Module) -> None:
        for parameter in self._replicated.parameters.values():
            self._set(parameter, LATE_GRADIENT)
        self._undo += self._replicated.guard()
        for parameter in model.parameters():
            if id(parameter) not in self._partition.pieces and self.group.rank > 0:
                self._set(parameter, COUNTED_ELSEWHERE)

    def _set(self, parameter: nn.Parameter, marker: str) -> None:
        setattr(parameter, marker, True)
        self._undo.append(lambda: vars(parameter).pop(marker, None))

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of a module until the release."""
        before = vars(module).get(name, self)
        setattr(module, name, ReplacedForward(module, value) if name == "forward" else value)
        self._undo.append(lambda: delattr(module, name) if before is self else setattr(module, name, before))

    def _hook(self, register: Callable[..., Any], hook: Callable[..., Any], **how: bool) -> None:
        """Registers one until the release."""
        self._undo.append(register(Hook(hook), **how).remove)

    # -- training ----------------------------------------------------------------------------------------------------

    def start_forward(self) -> None:
        self._regions.has_trained = True
        self.setup.boundary.start_forward()

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()
        self._replicated.start_backward()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        self._replicated.finish_backward(held=self._held)

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        return self.group.all_reduce(sum_of_squares, label="tensor.norm").wait()

    # -- weights are read --------------------------------------------------------------------------------------------

    def whole_model(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self._undo or not self._first_rank:
            return state
        whole: dict[str, Any] = {}
        names = {name: self._partition.pieces[number] for name, number in self._names.items() if number in self._partition.pieces}
        done: dict[int, Tensor] = {}
        for name, value in state.items():
            piece = names.get(name)
            if piece is not None and not is_absent(value):
                if id(piece) not in done:
                    done[id(piece)] = self._partition.whole(piece, value)
                value = done[id(piece)] if self.group.rank == 0 else value
            whole[name] = value
        return whole

    def whole_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not self._first_rank:
            return state
        return self._each(optimizer, state, lambda piece, value: self._partition.whole(piece, value).cpu(), cut=True)

    def local_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        rank, size = self.group.rank, self.group.size
        return self._each(optimizer, state, lambda piece, value: piece.of(value, rank, size).clone(), cut=False)

    def _each(
        self, optimizer: Optimizer, state: dict[str, Any], change: Callable[[Any, Tensor], Tensor], *, cut: bool
    ) -> dict[str, Any]:
        """The state with what is cut, or is to be cut, like its parameter changed."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changed: dict[int, dict[str, Any]] = {}
        for number in sorted(state["state"]):
            values = state["state"][number]
            if number < len(parameters) and (piece := self._partition.pieces.get(id(parameters[number]))) is not None:
                shape = piece.shape_of(self.group.rank, self.group.size) if cut else piece.shape
                values = {
                    key: change(piece, value) if isinstance(value, Tensor) and value.shape == shape else value
                    for key, value in values.items()
                }
            changed[number] = values
        return {**state, "state": changed}

    def _piece(self, name: str) -> Piece | None:
        return self._partition.pieces.get(self._names.get(name, 0))

    def layout_of(self, name: str) -> bool:
        """Whether the tensor is cut."""
        return self._piece(name) is not None

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        return self.mesh.index("tensor", rank) if layout else ()

    def place_of(self, name: str) -> Place | None:
        piece = self._piece(name)
        return None if piece is None else piece.place(self.group.rank, self.group.size)

    def release(self, *, complete: bool = True) -> None:
        """The model is whole again on every rank."""
        if not self._undo:
            return
        self._uninstall()
        if self._engine is not None and complete:
            self._engine.close()
        self._partition.give_back(complete=complete)
        if complete:
            self.group.stop()


def look(model: nn.Module, config: TensorParallel, roles: Mapping[str, str]) -> TensorFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    plan = find(model, roles, config.size)
    counts: dict[str, int] = {}
    for cut in plan.cuts:
        counts[cut.role] = counts.get(cut.role, 0) + 1
    modules = ", ".join(f"{n} {role}" for role, n in sorted(counts.items()))
    entries = max((cut.parts[0] for cut in plan.cuts if cut.role in VOCABULARY), default=0)
    layers = [cut for cut in plan.cuts if cut.role not in VOCABULARY]
    transposed = tuple(cut.name for cut in layers if not isinstance(cut.module, nn.Linear))
    return TensorFacts(f"{plan.source}: {modules}", plan.loose, entries, transposed, plan.shared_by_blocks)
