"""The context mode: each rank has some tokens of every sequence, and attention sees those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import blocks_by_role, is_from_transformers, names_by_role
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import is_expert
from lightning_overlap.model.patches import replace_method
from lightning_overlap.modes.base import Setup, Sharder
from lightning_overlap.modes.context import seam
from lightning_overlap.modes.context.arguments import token_table_forward
from lightning_overlap.modes.context.attention import UnshardedAttention
from lightning_overlap.modes.context.block_shards import ContextShards
from lightning_overlap.modes.context.config import ContextChoices, ContextFacts, ContextParallel
from lightning_overlap.modes.context.cut import ContextCut, ContextState
from lightning_overlap.modes.context.deferred import value_layers
from lightning_overlap.modes.context.embeddings import embedding_forward, find_embeddings
from lightning_overlap.modes.context.exchange import Chain
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.methods import AttentionByMask
from lightning_overlap.modes.context.options import AttentionOptions
from lightning_overlap.modes.context.refusals import find_mixers
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import is_compiled, is_guard_failure


class ContextMode(Sharder):
    """See the module's docstring.

    Gradients inside the blocks are ``size`` times those of one process, since the gradients of parameters are averaged over the ranks
    of this axis, too: by the data mode, together with those of other samples.
    """

    name = "context"
    nesting = Nesting.TOKENS
    keeps_bits = False

    config: ContextParallel
    choices: ContextChoices

    def __init__(self, config: ContextParallel, choices: ContextChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self.group: Group = self.mesh.group("context", self.timeout, "context")
        self.group.before_wait = setup.lanes.hand_over
        sizes = config.hierarchical_sizes
        self._attention = AttentionByMask(
            self.group,
            choices.methods,
            pieces=config.pieces,
            overlapped=choices.overlap.value,
            hierarchical_sizes=None if sizes is None else (sizes[0], sizes[1]),
            chain=lambda: setup.boundary.forwards.current.of(Chain),
        )
        self._unsharded_attention = UnshardedAttention(self.group)
        self._undo: list[Callable[[], None]] = []
        self._model: nn.Module | None = None
        self._in_trial = False

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> None:
        name, blocks = blocks_by_role(model, self.setup.roles, 1)
        self._model = model
        self._install = partial(self._patch, model, name, list(blocks.children()))
        self._install()

    def _patch(self, model: nn.Module, name: str, blocks: Sequence[nn.Module]) -> None:
        boundary = self.setup.boundary

        def local() -> LocalTokens | None:
            return boundary.forwards.current.of(ContextState).local

        for path in names_by_role(model, self.setup.roles, "token_table"):
            module = model.get_submodule(path)
            self._undo.append(replace_method(module, "forward", token_table_forward(module.forward, local)))
        named = {f"{name}.{number}": block for number, block in enumerate(blocks)}
        attentionless = frozenset(names_by_role(model, self.setup.roles, "token_wise")) & named.keys()
        # Only an exchange of heads has something that travels before the values are there.
        by_heads = self.choices.overlap.value and any(method not in ("p2p", "all_gather") for method in self.choices.methods.values())
        deferred = [layer for block in blocks for layer in value_layers(block)] if by_heads else []
        self._undo.append(seam.install(named, self._attend, local, attentionless=attentionless, deferred=deferred))
        cut = ContextCut(
            self.group,
            boundary,
            self.choices.order.value,
            self.choices.boundary.value,
            is_unsharded=self._switch_hugging_face(model, blocks),
            needs_tokens=any(map(is_from_transformers, blocks)),
        )
        self._undo.append(boundary.register(blocks, cut))
        if self.choices.boundary.value == "batch":
            for path in find_embeddings(model, name, self.setup.roles):
                module = model.get_submodule(path)
                forward = embedding_forward(module.forward, path, cut.shards_of_embeddings)
                self._undo.append(replace_method(module, "forward", forward))
        shards = ContextShards(self.group, cut, self._name_attention)
        self._undo.append(self.setup.first_blocks.register(blocks, name, shards, verify=self.config.verify_blocks))

    def _switch_hugging_face(self, model: nn.Module, blocks: Sequence[nn.Module]) -> Callable[[], bool]:
        """Has a model of transformers call the seam; whether its present forward runs with all tokens on every rank."""
        if not any(map(is_from_transformers, blocks)):
            return lambda: False
        from lightning_overlap.modes.context.huggingface import Switch  # which needs transformers

        switch = Switch(model, blocks)
        self._undo.append(switch.undo)
        return lambda: switch.is_unsharded

    @staticmethod
    def _name_attention(module: nn.Module) -> None:
        if is_from_transformers(module):
            from lightning_overlap.modes.context.huggingface import name_attention  # which needs transformers

            name_attention(module)

    def _uninstall(self) -> None:
        """The model computes as the user wrote it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.setup.boundary.start_forward()  # what was prepared is of the sharded model

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks; see :class:`AttentionByMask`."""
        if self._in_trial:
            options = replace(options, dropout=0.0)
        state = self.setup.boundary.forwards.current.of(ContextState)
        sharding = state.by_mask.get(mask, state.sharding)
        if sharding is None:  # a short sequence
            return self._unsharded_attention(q, k, v, mask, options)
        return self._attention(q, k, v, mask, sharding.layout, options)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        self._uninstall()
        try:
            yield
        finally:
            self._install()

    @contextmanager
    def trial(self) -> Iterator[None]:
        self._in_trial = True
        try:
            yield
        finally:
            self._in_trial = False

    # -- training ----------------------------------------------------------------------------------------------------

    def start_forward(self) -> None:
        self.setup.boundary.start_forward()

    def raise_cause(self, error: Exception) -> None:
        if is_guard_failure(error):
            raise ConfigError(
                "a compiled function was called with a tensor whose tokens are sharded over the ranks, for which torch cannot compile "
                "it: call it without torch.compile, or set context_parallel.boundary: blocks"
            ) from error
        self.setup.boundary.raise_if_between_blocks(error)

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        if self._in_trial:
            self._average()

    def _average(self) -> None:
        """Averages all gradients but those of experts, which in training is the work of the data mode. Collective."""
        assert self._model is not None, "the model is parallelized before it is trained"
        parameters = dict(self._model.named_parameters())
        mine = [name for name, parameter in parameters.items() if parameter.grad is not None and not is_expert(parameter)]
        for name in sorted(set().union(*self.group.all_gather_objects(mine))):
            parameter = parameters[name]
            if parameter.grad is None:  # no token of this rank has used it
                parameter.grad = torch.zeros_like(parameter)
            self.group.all_reduce(parameter.grad, label="context.trial", divisor=self.group.size).wait()

    def release(self, *, complete: bool = True) -> None:
        if not self._undo:
            return
        self._uninstall()
        if complete:
            self.group.stop()


def look(model: nn.Module, config: ContextParallel, roles: Mapping[str, str]) -> ContextFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    name, blocks = blocks_by_role(model, roles, 1)
    heads, kv_heads = _count_heads(blocks)
    mixers = tuple(find_mixers(name, blocks, names_by_role(model, roles, "token_wise")))
    embeddings = find_embeddings(model, name, roles) if config.boundary == "batch" else ()
    compiled = tuple(path for path, module in model.named_modules() if path and is_compiled(module))
    return ContextFacts(f"the blocks are {name}", heads, kv_heads, mixers, embeddings, compiled)


def _count_heads(blocks: nn.Module) -> tuple[int | None, int | None]:
    """Query heads, and key and value heads, as the config of a module in the blocks tells (as in transformers)."""
    for module in blocks.modules():
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if isinstance(heads, int):
            kv_heads = getattr(module.config, "num_key_value_heads", None)
            return heads, kv_heads if isinstance(kv_heads, int) else heads
    return None, None
