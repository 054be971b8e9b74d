"""The tensor mode: each rank has a part of every linear layer in the blocks, of the embedding and of the head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_stack import find_hidden
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, LATE_GRADIENT
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.base import Holder, Nesting, Setup
from lightning_overlap.modes.tensor import symm_mem, userbuffers
from lightning_overlap.modes.tensor.check import BlockCheck, Cutting, structure, whole_copy
from lightning_overlap.modes.tensor.config import TensorChoices, TensorFacts, TensorParallel
from lightning_overlap.modes.tensor.features import gathering, splitting
from lightning_overlap.modes.tensor.gemm import Exchange, shares
from lightning_overlap.modes.tensor.linear import Prepared, Reading, alike, column_forward, matrix, prepare, read, row_product
from lightning_overlap.modes.tensor.partition import Partition, Piece
from lightning_overlap.modes.tensor.patches import Forward, Hook
from lightning_overlap.modes.tensor.plan import Cut, Region, TensorPlan, find
from lightning_overlap.modes.tensor.random_state import CommonNumbers
from lightning_overlap.modes.tensor.sequence import enter, leave, own_tokens
from lightning_overlap.modes.tensor.vocab import Vocabulary, embedding_forward, head_forward
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.shards import Place, is_absent

VOCABULARY = ("vocab_embedding", "vocab_head")


class TensorMode(Holder):
    """See the module's docstring."""

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
        backend = choices.backend.value
        self._fused = symm_mem.operators(self.group) if backend == "symm_mem" else None
        self._engine = userbuffers.Engine(userbuffers.library(), self._exchange) if backend == "userbuffers" else None
        self._undo: list[Callable[[], None]] = []
        self._tokens = 0  # of the sequence that is in the blocks
        self._step = 0
        self._place = ""  # the row layer that was the last one to run
        self._region = ""  # the one that was the last to read
        self._after: dict[str, str] = {}  # by row layer, the region that reads next
        self._prepared: tuple[str, int, Prepared] | None = None
        self._latest: dict[str, tuple[Reading, Tensor]] = {}  # by region, what it has read, until its row layer runs
        self._in_backward = False
        self._inside = False  # whether a forward has entered the blocks and not left them
        self._summed = False  # whether gradients that are there are sums over the ranks already
        self._apart: dict[int, Tensor] = {}  # by parameter, such a gradient, during a backward that adds to it
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
        self._numbers = CommonNumbers(self.group.rank, next(model.parameters()).device)
        self._names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._partition = Partition(cuts, self.group)
        self._counts = found.counts
        checked = self.config.verify_blocks and not self.setup.first_step_is_verified
        self._unchecked = self._checks(blocks, found.blocks) if checked else []
        self._partition.keep()
        self._install = partial(self._patch, model, found, cuts, blocks)
        self._install()

    def _patch(self, model: nn.Module, found: TensorPlan, cuts: Sequence[Cut], blocks: Sequence[nn.Module]) -> None:
        """Has the model compute with this rank's pieces, until :meth:`_uninstall`."""
        masks = ExitStack()
        masks.enter_context(self._numbers.masks())
        self._undo.append(masks.close)
        self._mark(model, found, blocks)
        self._columns = {region.name: [cut.module for cut in region.columns] for region in found.regions}
        for cut in cuts:
            if cut.role == "column" and cut.whole:
                self._replace(cut.module, "forward", gathering(column_forward(cut.module), cut, self.group))
            elif cut.role == "column" and type(cut.module).forward is not nn.Linear.forward:
                self._replace(cut.module, "forward", column_forward(cut.module))
            elif cut.role == "row":
                row = self._row(cut.module, cut.name)
                self._replace(cut.module, "forward", splitting(row, cut, self.group) if cut.whole else row)
            elif cut.role in VOCABULARY:
                vocabulary = Vocabulary(self.group, shares(cut.parts[0], self.group.size), self._exchange.overlapped)
                make = embedding_forward if cut.role == "vocab_embedding" else head_forward
                self._replace(cut.module, "forward", make(cut.module, vocabulary))
        for (owner, name), count in found.counts.items():
            self._replace(model.get_submodule(owner), name, count // self.group.size)
        for region in found.regions:
            self._read_at(region)
        # However it is left: an activation checkpoint ends in the middle of what it runs again.
        direct = {cut.name for cut in cuts}
        for module in (*blocks, *[region.module for region in found.regions if not self._scattered and region.name not in direct]):
            self._hook(module.register_forward_hook, lambda *_: self._numbers.stop(), always_call=True)
        for check in self._unchecked:
            self._hook(check.block.register_forward_pre_hook, partial(self._check, check), with_kwargs=True)
        if self._scattered:
            self._scatter_tokens(blocks, [cut.module for cut in found.cuts if cut.role == "vocab_head"])

    def _uninstall(self) -> None:
        """The model computes as the user wrote it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._numbers.stop()
        self._prepared = None
        self._latest.clear()

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

    @staticmethod
    def _checks(blocks: Sequence[nn.Module], name: str) -> list[BlockCheck]:
        """The first of each kind of block that is on this rank."""
        first: dict[Any, BlockCheck] = {}
        for number, block in enumerate(blocks):
            if not any(map(is_absent, block.parameters())):  # on another stage of a pipeline
                last = number == len(blocks) - 1
                first.setdefault(structure(block), BlockCheck(block, f"{name}.{number}", enters=number == 0, leaves=last))
        return list(first.values())

    def _check(self, check: BlockCheck, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the first training step, whatever mode the block is in."""
        if check not in self._unchecked or self._step == 0:
            return
        self._unchecked.remove(check)
        x = find_hidden(args, kwargs, check.name)[1]
        parted = self._scattered and not check.enters
        tokens = self._tokens_of(x, check.name) if parted else x.shape[-2]

        def piece(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            cut = self._partition.pieces.get(id(parameter))
            return grad if cut is None else cut.of(grad, self.group.rank, self.group.size)

        def complete(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            return self.group.all_reduce(grad.clone(), label="tensor.check").wait() if id(parameter) in self._partial else grad

        cutting = Cutting(
            self.group,
            lambda x: leave(x, tokens, self._exchange) if parted else x,
            lambda y: leave(y, tokens, self._exchange) if self._scattered and not check.leaves else y,
            lambda grad: own_tokens(grad, self._exchange) if parted else grad,
            piece,
            complete,
        )
        # In a pipeline gradients of weights may be put off, by a forward that is not ours.
        forwards = [vars(module).get("forward") for module in block.modules()]
        split = self.mesh.size("pipeline") > 1 and any(forward is not None and type(forward) is not Forward for forward in forwards)
        state = self._place, self._prepared, self._tokens, self._inside
        self._prepared = None
        try:
            check.check(self._whole_block(check), args, kwargs, cutting, backward=not split)
        finally:
            self._place, self._prepared, self._tokens, self._inside = state
            self._latest.clear()

    def _whole_block(self, check: BlockCheck) -> nn.Module:
        """A copy of a block as it would be without tensor parallelism, with present weights. Collective."""
        twin = whole_copy(check.block)
        for (owner, name), count in self._counts.items():
            if f"{owner}.".startswith(f"{check.name}."):
                setattr(twin.get_submodule(owner[len(check.name) + 1 :]), name, count)
        whole: dict[int, Tensor] = {}
        for own, copied in zip(check.block.parameters(), twin.parameters(), strict=True):
            if (piece := self._partition.pieces.get(id(own))) is not None:
                copied.data = whole.setdefault(id(own), self._partition.whole(piece, own.data))
        return twin

    def _mark(self, model: nn.Module, found: TensorPlan, blocks: Sequence[nn.Module]) -> None:
        """Replicated parameters: whose gradients each rank has a summand of, and which rank counts them."""
        inside = [region.module for region in found.regions]
        if self._scattered:
            inside = list(blocks)
        # Where all ranks have all tokens, these are used after the sum, on the same numbers on each.
        after = {id(parameter) for cut in found.cuts if not self._scattered for parameter in cut.after_sum}
        self._partial = {
            id(parameter): parameter
            for module in inside
            for parameter in module.parameters()
            if id(parameter) not in self._partition.pieces and id(parameter) not in after
        }
        for parameter in self._partial.values():
            self._set(parameter, LATE_GRADIENT)
            if parameter.requires_grad:
                self._undo.append(parameter.register_post_accumulate_grad_hook(self._refuse_own_backward).remove)
        for parameter in model.parameters():
            if id(parameter) not in self._partition.pieces and self.group.rank > 0:
                self._set(parameter, COUNTED_ELSEWHERE)

    def _set(self, parameter: nn.Parameter, marker: str) -> None:
        setattr(parameter, marker, True)
        self._undo.append(lambda: vars(parameter).pop(marker, None))

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of a module until the release."""
        before = vars(module).get(name, self)
        setattr(module, name, Forward(module, value) if name == "forward" else value)
        self._undo.append(lambda: delattr(module, name) if before is self else setattr(module, name, before))

    def _hook(self, register: Callable[..., Any], hook: Callable[..., Any], **how: bool) -> None:
        """Registers one until the release."""
        self._undo.append(register(Hook(hook), **how).remove)

    def _row(self, layer: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        around = max((region for region in self._columns if name.startswith(f"{region}.")), key=len, default="")

        def forward(x: Tensor) -> Tensor:
            region = around or self._region
            reading, own = self._latest.pop(region, None) or (None, None)
            if self._fused is not None and symm_mem.fits(x.shape[-2], self._exchange):
                return symm_mem.row_product(x, layer, self._fused)
            if self._engine is not None and self._engine.fits(x.shape[:-1], matrix(layer).shape[0], x, [layer]):
                return self._engine.row_product(x, layer, name, region)
            between = partial(self._prepare_next, name)
            y = row_product(x, layer, self._exchange, name, reading=reading, own=own, between=between)
            if not self._scattered:
                self._numbers.stop()  # from here on all ranks have the same activations again
            return y

        return forward

    def _prepare_next(self, place: str) -> None:
        """Prepares the reading that comes after the entry, or after a row layer: known from the forward before."""
        self._place = place
        region = self._after.get(place)
        if region is not None and self._scattered and self._exchange.overlapped and torch.is_grad_enabled():
            self._prepared = (region, self._step, prepare(self._columns[region], self._exchange, region))

    def _reading(self, region: str) -> Prepared:
        self._after[self._place] = region
        prepared, self._prepared = self._prepared, None
        # Not one that an activation checkpoint has left, which went no further than its block: weights may be others since.
        if prepared is not None and prepared[:2] == (region, self._step) and torch.is_grad_enabled():
            return prepared[2]
        return prepare(self._columns[region], self._exchange, region)

    def start_forward(self) -> None:
        self._step += 1
        self._inside = False

    def _read_at(self, region: Region) -> None:
        columns = self._columns[region.name]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            place, x = find_hidden(args, kwargs, region.name)
            self._refuse_second_input(x, (args, kwargs), f"{region.name} is", "leave it out of the parallel_plan")
            tokens = self._tokens_of(x, region.name)
            self._region = region.name
            if self._fused is not None and symm_mem.fits(tokens, self._exchange):
                return _put(args, kwargs, place, symm_mem.read(x, columns, self._fused, self._exchange, region.name))
            if self._engine is not None and self._step:  # a validation before the first step may have batches of another size
                self._engine.start(x, tokens)
            if self._engine is not None and self._engine.fits((*x.shape[:-2], tokens), x.shape[-1], x, columns):
                return _put(args, kwargs, place, self._engine.read(x, columns, tokens, region.name))
            handle = read(x, columns, self._reading(region.name), tokens)
            again = self._scattered and not self._exchange.keep_gathered and torch.is_grad_enabled()
            if again and any(layer.weight.requires_grad for layer in columns):
                self._latest[region.name] = (handle.reading, handle.gathered.own)
            if not self._scattered and module.training:
                self._numbers.start()
            return _put(args, kwargs, place, handle)

        def after(module: nn.Module, args: Any, result: Any) -> Any:
            if not torch.is_grad_enabled():
                return result
            for part in module.modules():
                left = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
                vars(part).update({name: alike(value, self.group.size) for name, value in left.items()})
            return (result[0], *(alike(x, self.group.size) for x in result[1:])) if isinstance(result, tuple) else result

        self._hook(region.module.register_forward_pre_hook, before, with_kwargs=True)
        self._hook(region.module.register_forward_hook, after)
        # Compiled code has no place for numbers that are on their way: a region of compiled blocks runs as it is.
        self._replace(region.module, "forward", region.module.forward)

    @staticmethod
    def _refuse_second_input(x: Tensor, inputs: Any, who: str, what_to_do: str) -> None:
        for other in leaves(inputs):
            if isinstance(other, Tensor) and other is not x and other.requires_grad:
                raise ConfigError(
                    f"{who} called with a second tensor that gradients flow through (cross-attention, a learned bias or condition, "
                    f"say), of whose gradient a rank would have a part only: {what_to_do}"
                )

    def _tokens_of(self, x: Tensor, name: str) -> int:
        """Number of all tokens, of which a region gets this rank's."""
        if not self._scattered:
            return x.shape[-2]
        if self.mesh.size("pipeline") > 1:  # the blocks of a stage get what another stage has sent
            return x.shape[-2] * self.group.size
        low, high = self._exchange.parts(self._tokens)[self.group.rank : self.group.rank + 2]
        if x.shape[-2] != high - low:
            raise ConfigError(
                f"{name} is called with {x.shape[-2]} tokens, where rank {self.group.rank} has {high - low} of the {self._tokens} "
                "that have entered the blocks: with sequence_parallel blocks run one after the other, from the first one on, on one "
                "sequence. Set tensor_parallel.sequence_parallel: false"
            )
        return self._tokens

    def _scatter_tokens(self, blocks: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            place, x = find_hidden(args, kwargs, "the first block")
            self._tokens, self._inside = x.shape[-2], True
            if self.mesh.size("pipeline") > 1 and self._tokens % self.group.size:
                raise ConfigError(
                    f"a sequence of {self._tokens} tokens is not divisible by tensor_parallel.size={self.group.size}, which it "
                    "must be with sequence_parallel in a pipeline: pad it, or set tensor_parallel.sequence_parallel: false"
                )
            return _put(args, kwargs, place, enter(x, self._exchange, partial(self._prepare_next, "")))

        def leaving(module: nn.Module, args: Any, result: Any) -> Any:
            x = result[0] if isinstance(result, tuple) else result
            tokens = x.shape[-2] * self.group.size if self.mesh.size("pipeline") > 1 else self._tokens
            whole, self._inside = leave(x, tokens, self._exchange), False
            return (whole, *result[1:]) if isinstance(result, tuple) else whole

        def start(module: nn.Module, _: Any) -> None:
            if module.training:
                self._numbers.start()

        def alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = find_hidden(args, kwargs, "a block")[1]
            self._refuse_second_input(x, (args, kwargs), "a block is", "set tensor_parallel.sequence_parallel: false")
            # An activation checkpoint calls blocks in backward, when the forward has left them.
            if module is not blocks[0] and not (self._inside or self._in_backward or self.mesh.size("pipeline") > 1):
                raise _left_out("first")

        def left(*_: Any) -> None:
            if self._inside and self.mesh.size("pipeline") == 1:  # this rank's tokens against all labels would fail in other words
                raise _left_out("last")

        for head in heads:
            self._hook(head.register_forward_pre_hook, left)
        for block in blocks:
            self._hook(block.register_forward_pre_hook, start)
            self._hook(block.register_forward_pre_hook, alone, with_kwargs=True)
        self._hook(blocks[0].register_forward_pre_hook, entering, with_kwargs=True)
        self._hook(blocks[-1].register_forward_hook, leaving)

    # -- training ----------------------------------------------------------------------------------------------------

    def start_backward(self) -> None:
        """What an earlier backward has left (manual optimization does) is kept apart, and not summed once more."""
        self._in_backward = True
        if self._inside and self.mesh.size("pipeline") == 1:
            raise _left_out("last")
        for number, parameter in self._partial.items() if self._summed else ():
            if parameter.grad is not None:
                self._apart[number] = parameter.grad.clone()  # it may be a view of a bucket, which is written over
                parameter.grad = None

    def _refuse_own_backward(self, parameter: nn.Parameter) -> None:
        if not self._in_backward:
            raise ConfigError(
                "loss.backward() gives a rank its part of some gradients, which nobody would sum with those of the other ranks of "
                "tensor_parallel: call self.manual_backward(loss)"
            )

    def finish_backward(self) -> None:
        """Gradients of replicated parameters that the ranks have summands of are summed, all in one transfer."""
        self._in_backward = False
        self._inside = False  # what activation checkpoints have run again
        self._summed = not self._held
        if self._held:
            return
        trained = [p for p in self._partial.values() if p.requires_grad]
        for dtype in sorted({p.dtype for p in trained}, key=str):
            together = [p for p in trained if p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in together]
            sizes = [*(grad.numel() for grad in grads), len(grads)]
            found = grads[0].new_ones(len(together))
            for number, p in enumerate(together):
                if p.grad is None:
                    found[number] = 0  # a fill, which waits for nothing, as a copy from the host would
            flat = self.group.all_reduce(torch.cat([*(grad.flatten() for grad in grads), found]), label="tensor.replicated").wait()
            *totals, found = flat.split(sizes)
            for number, (parameter, grad, total) in enumerate(zip(together, grads, totals, strict=True)):
                before = self._apart.pop(id(parameter), None)
                if parameter.grad is None and not found[number]:  # nobody has one
                    parameter.grad = before
                    continue
                grad.copy_(total.view(grad.shape))
                parameter.grad = grad if before is None else grad.add_(before)

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

    def part_of(self, name: str, rank: int) -> Hashable:
        return self.mesh.index("tensor", rank) if self._piece(name) is not None else ()

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
            self.group.rest()


def _left_out(which: str) -> ConfigError:
    return ConfigError(
        f"the {which} block was left out in this step, and with sequence_parallel it is where a rank takes, or gives back, its part "
        f"of the tokens: run the {which} block always, or set tensor_parallel.sequence_parallel: false"
    )


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, x: Tensor) -> tuple[Any, Any]:
    """Arguments with ``x`` in the place of the hidden states."""
    return (args, {**kwargs, place: x}) if isinstance(place, str) else ((x, *args[1:]), kwargs)


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
