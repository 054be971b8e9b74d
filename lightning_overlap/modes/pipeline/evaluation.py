"""A forward over all stages without a schedule: each rank runs its blocks when the stage before has handed on what they need.

What the last stage hands on goes to every rank that goes on to the loss. Nothing is known of a batch's shapes before, so each stage
tells what it hands on. ::

    length of the description | description: what blocks return, which tensors come | the tensors
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch

from lightning_overlap.model.block_pass import ARGUMENTS, Leaf, Pass
from lightning_overlap.modes.pipeline.flow import Flow
from lightning_overlap.modes.pipeline.transfers import Form
from lightning_overlap.ranks.group import Group, Pending

KEYS = 1 << 12
"""Keys for the transfers of one stage."""


@dataclass(frozen=True)
class _Handed:
    """What a stage hands on.

    Attributes:
        outputs: by block so far, what it returns, as in :class:`lightning_overlap.model.block_pass.Pass`.
        places: by leaf, which of the tensors it is. Several blocks may return the same one.
        forms: of the tensors.
    """

    outputs: dict[int, Any]
    places: dict[Leaf, int]
    forms: list[Form]


class Evaluation:
    """What one rank runs, receives and hands on in one evaluation step.

    Args:
        stages: by stage, its blocks.
        placement: by stage, its rank.
        flow: what training has found that stages need of each other. None before the first training step: then all that has come
            so far is handed on, of what the user's code still holds.
        group: the pipeline's ranks.
        device: where this rank's tensors are.
    """

    def __init__(
        self, stages: Sequence[range], placement: Sequence[int], flow: Flow | None, group: Group, device: torch.device
    ) -> None:
        self._stages, self._placement, self._flow, self._group, self._device = stages, placement, flow, group, device
        self._filled = [ARGUMENTS, *(stage for stage, blocks in enumerate(stages) if blocks)]
        """Stages with blocks, after what comes before the blocks, which is on the first stage's rank."""
        self._end = self._filled[-1]

    def make_pass(self, size: int, alone: int | None, again: Callable[[], None] | None) -> Pass:
        """The forward of this rank.

        Args:
            size: how many blocks there are.
            alone: the only rank that goes on to the loss; None: all do.
            again: called where the model is called a second time; None: it is gone through once more.
        """
        rank = self._group.rank
        current_pass = Pass(run=frozenset(), stop=size, is_first=self._placement[0] == rank)
        if self._flow is None:
            current_pass.kept = WeakValueDictionary()
        sources: dict[int, int] = {}  # by stage whose tensors come to this rank, in the order in which they come
        for before, stage in pairwise(self._filled):
            source, target = self._placement[max(before, 0)], self._placement[stage]
            if target == rank:
                current_pass.run |= frozenset(self._stages[stage])
            if source != target == rank:
                sources[before] = source
            if target != source == rank:
                current_pass.after_block[self._last_block(before)] = partial(self._hand_on, current_pass, before, [target])
        going_on = range(self._group.size) if alone is None else [alone]
        if self._placement[self._end] == rank:
            others = [other for other in going_on if other != rank]
            current_pass.after_block[self._last_block(self._end)] = partial(self._hand_on, current_pass, self._end, others)
        elif rank in going_on:
            sources[self._end] = self._placement[self._end]
        if rank not in going_on:
            current_pass.stop = max(current_pass.run, default=-1) + 1
        arrived: set[int] = set()

        def arrive(block: int) -> None:
            if block == ARGUMENTS not in sources:
                return
            stage = next(stage for stage in sources if self._last_block(stage) >= block)
            if stage not in arrived:
                arrived.add(stage)
                self._receive(current_pass, stage, sources[stage])

        def start_again() -> None:
            arrived.clear()
            current_pass.received.clear()
            current_pass.kept.clear()

        current_pass.receive, current_pass.restart = (arrive if sources else None), again or start_again
        current_pass.is_kept = lambda leaf: any(self._goes_on(current_pass, stage, leaf) for stage in self._filled)
        return current_pass

    def _last_block(self, stage: int) -> int:
        return self._stages[stage][-1] if stage >= 0 else ARGUMENTS

    def _goes_on(self, current_pass: Pass, stage: int, leaf: Leaf) -> bool:
        """Whether a stage hands on a tensor."""
        hidden = current_pass.progress.hidden_index
        if self._flow is None or leaf == (self._last_block(stage), hidden) or self._flow.is_new(leaf):
            return True
        if stage < self._end:
            return leaf in self._flow.after(max(stage, 0))
        # After the blocks the last stage uses of its own ones what it uses of others, but for the hidden states that come to it.
        first = min(self._stages[self._end])
        if first == 0:  # there are no others
            return leaf[1] != hidden
        return leaf[1] in {number for block, number in self._flow.uses[-1] if number != hidden or block < first - 1}

    def _hand_on(self, current_pass: Pass, stage: int, targets: list[int]) -> None:
        tensors_here = {**current_pass.kept, **current_pass.received}
        here = {leaf: x for leaf, x in tensors_here.items() if self._goes_on(current_pass, stage, leaf)}
        tensors = list({id(x): x for x in here.values()}.values())
        numbers = {id(x): number for number, x in enumerate(tensors)}
        places = {leaf: numbers[id(x)] for leaf, x in here.items()}
        handed = _Handed(current_pass.structures, places, [Form(tuple(x.shape), x.dtype, trained=False) for x in tensors])
        said = torch.frombuffer(bytearray(pickle.dumps(handed)), dtype=torch.uint8).to(self._device)
        length = torch.tensor([len(said)], device=self._device)
        sends = [
            self._group.send(x.contiguous(), target, key=self._key(stage) + number, label=f"pipeline.evaluation[{stage}]")
            for target in targets
            for number, x in enumerate([length, said, *tensors])
        ]
        for pending in sends:
            pending.wait()

    def _receive(self, current_pass: Pass, stage: int, source: int) -> None:
        numbers = itertools.count(self._key(stage))

        def receive(shape: Sequence[int], dtype: torch.dtype) -> Pending:
            room = torch.empty(shape, dtype=dtype, device=self._device)
            return self._group.receive(room, source, key=next(numbers), label=f"pipeline.evaluation[{stage}]")

        length = int(receive([1], torch.int64).wait())
        handed: _Handed = pickle.loads(receive([length], torch.uint8).wait().cpu().numpy().tobytes())
        pending = [receive(form.shape, form.dtype) for form in handed.forms]
        tensors = [each.wait() for each in pending]
        current_pass.structures |= handed.outputs
        current_pass.received |= {leaf: tensors[number] for leaf, number in handed.places.items()}

    @staticmethod
    def _key(stage: int) -> int:
        return (stage + 2) * KEYS
