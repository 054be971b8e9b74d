"""Validation inside a fit: each rank runs its blocks when it has received the tensors that they need.

The last stage sends its tensors to every rank that computes the loss. Shapes are not known before, so each stage also sends a
description of its tensors. ::

    length of the description | description: structures of outputs, which tensors follow | the tensors
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import ARGUMENTS, Leaf, Pass
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.stand_in import StandIn
from lightning_overlap.modes.pipeline.flow import Flow
from lightning_overlap.modes.pipeline.partition import Partition
from lightning_overlap.modes.pipeline.transfers import Form
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.shared_state import share

KEYS = 1 << 12
"""The number of keys for the transfers of one stage."""


class Evaluation:
    """Runs the validations inside a fit.

    Args:
        stack: the blocks.
        partition: the parameters, and the ranks that hold them.
        group: the pipeline's ranks, for parameters.
        channel: the same ranks, for tensors between stages. Its threads report an error of another rank to a rank that waits.
        on_last_stage: only the last stage computes the loss.
        device: this rank's.
    """

    def __init__(
        self, stack: BlockStack, partition: Partition, group: Group, channel: Group, *, on_last_stage: bool, device: torch.device
    ) -> None:
        self.is_on_last_stage = on_last_stage and group.size > 1
        self._stack, self._partition, self._group, self._channel, self._device = stack, partition, group, channel, device
        self._borrowed: list[str] = []
        """Parameters after the blocks that this rank holds during the validation only."""

    def start(self) -> None:
        """Sends the modules after the blocks to every rank, if every rank computes the loss. Collective."""
        if self.is_on_last_stage:
            return
        names = self._partition.after_blocks
        self._borrowed = self._partition.restore(names)
        with torch.no_grad():
            share([self._partition.tensor(name) for name in names], self._group, self._partition.placement[-1])

    def finish(self) -> None:
        """Drops the parameters that :meth:`start` has sent to this rank."""
        self._partition.drop(self._group.rank, self._borrowed)
        self._borrowed = []

    @contextmanager
    def step(self, flow: Flow | None) -> Iterator[None]:
        """Inside, the user's validation step runs this rank's blocks.

        Args:
            flow: as in :class:`StageExchange`.
        """
        if self._group.size == 1:
            yield
            return
        exchange = StageExchange(self._partition.stages, self._partition.placement, flow, self._channel, self._device)
        loss_rank = self._partition.placement[-1] if self.is_on_last_stage else None
        current_pass = exchange.make_pass(self._stack.size, loss_rank, self._refuse_second_call if self.is_on_last_stage else None)
        try:
            with self._stack.running(current_pass):
                yield
        finally:
            current_pass.release()

    @staticmethod
    def _refuse_second_call() -> None:
        raise ConfigError(
            "validation_step calls the model a second time. With pipeline_parallel.evaluation='last_stage' the other stages have "
            "ended their step by then: set evaluation='replicate'"
        )


@dataclass(frozen=True)
class _Description:
    """Describes the tensors that a stage sends.

    Attributes:
        structures: by block so far, the structure of its output, as in :class:`lightning_overlap.model.block_pass.Pass`.
        indices: by leaf, the index of its tensor. Several blocks may return the same tensor.
        forms: the tensors' forms.
    """

    structures: dict[int, Any]
    indices: dict[Leaf, int]
    forms: list[Form]


class StageExchange:
    """Sends and receives the tensors between stages in one evaluation step.

    Args:
        stages: by stage, the numbers of its blocks.
        placement: by stage, its rank.
        flow: the tensors that stages read in training. None before the first training step: then a stage sends all tensors so far that
            the user's code still references.
        group: the pipeline's ranks.
        device: this rank's.
    """

    def __init__(
        self, stages: Sequence[range], placement: Sequence[int], flow: Flow | None, group: Group, device: torch.device
    ) -> None:
        self._stages, self._placement, self._flow, self._group, self._device = stages, placement, flow, group, device
        self._senders = [ARGUMENTS, *(stage for stage, blocks in enumerate(stages) if blocks)]
        """The stages with blocks; before them, :data:`ARGUMENTS` for the code before the blocks, on the first stage's rank."""
        self._last = self._senders[-1]

    def make_pass(self, size: int, loss_rank: int | None, restart: Callable[[], None] | None) -> Pass:
        """Makes the pass of this rank.

        Args:
            size: the number of blocks.
            loss_rank: the only rank that computes the loss; None: all ranks do.
            restart: called when the user's code calls the model a second time; None: the blocks are run a second time.
        """
        rank = self._group.rank
        current_pass = Pass(local_blocks=frozenset(), end_block=size, is_first=self._placement[0] == rank)
        if self._flow is None:
            current_pass.kept = WeakValueDictionary()
        sources: dict[int, int] = {}  # by stage whose tensors this rank receives, its rank; in the order of the stages
        for before, stage in pairwise(self._senders):
            source, target = self._placement[max(before, 0)], self._placement[stage]
            if target == rank:
                current_pass.local_blocks |= frozenset(self._stages[stage])
            if source != target == rank:
                sources[before] = source
            if target != source == rank:
                current_pass.after_block[self._last_block(before)] = partial(self._send, current_pass, before, [target])
        loss_ranks = range(self._group.size) if loss_rank is None else [loss_rank]
        if self._placement[self._last] == rank:
            others = [other for other in loss_ranks if other != rank]
            current_pass.after_block[self._last_block(self._last)] = partial(self._send, current_pass, self._last, others)
        elif rank in loss_ranks:
            sources[self._last] = self._placement[self._last]
        if rank not in loss_ranks:
            current_pass.end_block = max(current_pass.local_blocks, default=-1) + 1
        received: set[int] = set()

        def receive(block: int) -> None:
            if block == ARGUMENTS not in sources:
                return
            stage = next(stage for stage in sources if self._last_block(stage) >= block)
            if stage not in received:
                received.add(stage)
                self._receive(current_pass, stage, sources[stage])

        def run_again() -> None:
            received.clear()
            current_pass.received.clear()
            current_pass.kept.clear()

        current_pass.receive, current_pass.restart = (receive if sources else None), restart or run_again
        current_pass.is_kept = lambda leaf: any(self._is_sent(current_pass, stage, leaf) for stage in self._senders)
        return current_pass

    def _last_block(self, stage: int) -> int:
        return self._stages[stage][-1] if stage >= 0 else ARGUMENTS

    def _is_sent(self, current_pass: Pass, stage: int, leaf: Leaf) -> bool:
        """Whether a stage sends a tensor."""
        hidden = current_pass.progress.hidden_index
        if self._flow is None or leaf == (self._last_block(stage), hidden) or self._flow.is_new(leaf):
            return True
        if stage < self._last:
            return leaf in self._flow.sent_after(max(stage, 0))
        # The code after the blocks reads the last stage's tensors. Training has recorded which it reads of other stages' blocks: it
        # reads those of all blocks, except the hidden states that the last stage itself receives.
        first = min(self._stages[self._last])
        if first == 0:  # there are no other stages with blocks
            return leaf[1] != hidden
        return leaf[1] in {number for block, number in self._flow.uses[-1] if number != hidden or block < first - 1}

    def _send(self, current_pass: Pass, stage: int, targets: list[int]) -> None:
        known = {**current_pass.kept, **current_pass.received}
        sent = {leaf: x for leaf, x in known.items() if self._is_sent(current_pass, stage, leaf)}
        tensors = list({id(x): x for x in sent.values()}.values())
        index_of = {id(x): index for index, x in enumerate(tensors)}
        indices = {leaf: index_of[id(x)] for leaf, x in sent.items()}
        # Other ranks take ordinary tensors, not those of which each rank has some tokens.
        tensors = [x.complete("evaluation in a pipeline") if isinstance(x, StandIn) else x for x in tensors]
        forms = [Form(tuple(x.shape), x.dtype, has_gradient=False) for x in tensors]
        message = pickle.dumps(_Description(current_pass.structures, indices, forms))
        description = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)
        length = torch.tensor([len(description)], device=self._device)
        sends = [
            self._group.send(x.contiguous(), target, key=self._key(stage) + number, label=f"pipeline.evaluation[{stage}]")
            for target in targets
            for number, x in enumerate([length, description, *tensors])
        ]
        for pending in sends:
            pending.wait()

    def _receive(self, current_pass: Pass, stage: int, source: int) -> None:
        keys = itertools.count(self._key(stage))

        def receive(shape: Sequence[int], dtype: torch.dtype) -> Pending:
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
            return self._group.receive(buffer, source, key=next(keys), label=f"pipeline.evaluation[{stage}]")

        length = int(receive([1], torch.int64).wait())
        description: _Description = pickle.loads(receive([length], torch.uint8).wait().cpu().numpy().tobytes())
        pending = [receive(form.shape, form.dtype) for form in description.forms]
        tensors = [each.wait() for each in pending]
        current_pass.structures |= description.structures
        current_pass.received |= {leaf: tensors[index] for leaf, index in description.indices.items()}

    @staticmethod
    def _key(stage: int) -> int:
        return (stage + 2) * KEYS
