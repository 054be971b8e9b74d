"""The context mode: each rank has some tokens of every sequence, and attention sees those of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.model.blocks import Blocks, find_blocks
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.modes.base import Setup, Sharder
from lightning_overlap.modes.context import seam
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.config import ContextChoices, ContextFacts, ContextParallel
from lightning_overlap.modes.context.cut import ContextCut, ContextState
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.refusals import find_mixers
from lightning_overlap.ranks.group import Group


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
        self._attention = ContextAttention(
            self.group,
            choices.method.value,
            pieces=config.pieces,
            overlapped=choices.overlap.value,
            hierarchical_sizes=config.hierarchical_sizes,
        )
        self._undo: list[Callable[[], None]] = []
        self._model: nn.Module | None = None
        self._in_trial = False

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> None:
        _, blocks = _find(model, self.setup.roles)
        self._model = model
        self._install = partial(self._patch, model, list(blocks.children()))
        self._install()

    def _patch(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        cut = ContextCut(self.group, self.setup.boundary, self.choices.order.value, self.choices.boundary.value)
        self._undo.append(self.setup.boundary.register(blocks, cut))
        self._undo.append(seam.install(model, blocks, self._attend, lambda: cut.is_active))

    def _uninstall(self) -> None:
        """The model computes as the user wrote it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.setup.boundary.start_forward()  # what was prepared is of the sharded model

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options: Any) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks; see :class:`ContextAttention`."""
        if self._in_trial:
            options["dropout"] = 0.0
        return self._attention(q, k, v, mask, self.setup.boundary.forwards.current.of(ContextState).layout, **options)

    @contextmanager
    def whole(self) -> Iterator[None]:
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

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        if self._in_trial:
            self._average()

    def _average(self) -> None:
        """Averages all gradients, which in training is the work of the data mode. Collective."""
        assert self._model is not None, "the model is parallelized before it is trained"
        parameters = dict(self._model.named_parameters())
        mine = [name for name, parameter in parameters.items() if parameter.grad is not None]
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


def _find(model: nn.Module, roles: Mapping[str, str]) -> tuple[str, Blocks]:
    named = {role: name for name, role in roles.items()}
    return find_blocks(model, named.get("blocks"), 1)


def look(model: nn.Module, config: ContextParallel, roles: Mapping[str, str]) -> ContextFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    name, blocks = _find(model, roles)
    heads, kv_heads = seam.count_heads(blocks)
    return ContextFacts(f"the blocks are {name}", heads, kv_heads, tuple(find_mixers(name, blocks)))
