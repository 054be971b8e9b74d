"""Finds which tensors each stage sends: the hidden states, and every other tensor of its blocks that later stages read.

On the first microbatch of a fit the stages run one after the other. A stage that needs a tensor of an earlier stage requests it, and
the rank that has it answers. ::

    rank 0   runs stage 0 | answers                   | answers
    rank 1   answers      | runs stage 1, requests    | answers
    rank 2   answers      | answers                   | runs stage 2, requests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, device

from lightning_overlap.model.block_pass import ARGUMENTS, Leaf, Pass, count_slots
from lightning_overlap.ranks.announcements import in_words, raise_from_words
from lightning_overlap.ranks.group import Group


@dataclass(frozen=True)
class Flow:
    """The tensors that stages send.

    Attributes:
        stages: by stage, the numbers of its blocks.
        uses: by stage, the tensors of earlier stages that it reads.
        outputs: by block, the structure of its output, as in :class:`lightning_overlap.model.block_pass.Pass`.
    """

    stages: Sequence[range]
    uses: Sequence[frozenset[Leaf]]
    outputs: Mapping[int, Any]

    def stage_of(self, block: int) -> int:
        """The stage that runs a block."""
        return 0 if block == ARGUMENTS else next(stage for stage, blocks in enumerate(self.stages) if block in blocks)

    def is_new(self, leaf: Leaf) -> bool:
        """Whether a block returns a tensor that it did not return in training (a state or cache, made in evaluation only)."""
        block, number = leaf
        return block in self.outputs and number >= count_slots(self.outputs[block])

    def sent_after(self, stage: int) -> tuple[Leaf, ...]:
        """The tensors that a stage sends: made in it or in an earlier stage, and read by a later one."""
        used = {leaf for uses in self.uses[stage + 1 :] for leaf in uses}
        return tuple(sorted(leaf for leaf in used if self.stage_of(leaf[0]) <= stage))


@dataclass(frozen=True)
class _Result:
    """The result of a stage's run.

    Attributes:
        uses: the tensors that it has requested.
        outputs: by block of the stage, the structure of its output.
        failure: the message of the error that ended it; None if it ended without one.
    """

    uses: frozenset[Leaf]
    outputs: dict[int, Any]
    failure: str | None = None


def find_flow(
    stages: Sequence[range],
    placement: Sequence[int],
    group: Group,
    on: device,
    run: Callable[[int, Pass], None],
    size: int,
) -> Flow:
    """Runs every stage once, and records which tensors it reads. Collective.

    Args:
        stages: by stage, the numbers of its blocks.
        placement: by stage, its rank.
        group: the pipeline's ranks.
        on: this rank's device.
        run: runs a stage's forward with a pass.
        size: the number of blocks.

    Raises:
        ConfigError: the user's code fails in a stage; on every rank.
    """
    kept: dict[Leaf, Tensor] = {}
    no_uses = Flow(stages, [frozenset()] * len(stages), {})
    uses: list[frozenset[Leaf]] = []
    outputs: dict[int, Any] = {}

    def owner(leaf: Leaf) -> int:
        return placement[no_uses.stage_of(leaf[0])]

    for stage, rank in enumerate(placement):
        if rank == group.rank:
            result, error = _run_stage(stage, stages, outputs, kept, _Requests(group, owner, kept, on), run, size)
            group.share_object(result, rank)
            if error is not None:
                raise error
        else:
            result = _answer(rank, group, owner, kept)
        if result.failure is not None:
            raise_from_words(result.failure)
        uses.append(result.uses)
        outputs |= result.outputs
    return Flow(stages, uses, outputs)


def _run_stage(
    stage: int,
    stages: Sequence[range],
    outputs: dict[int, Any],
    kept: dict[Leaf, Tensor],
    requests: _Requests,
    run: Callable[[int, Pass], None],
    size: int,
) -> tuple[_Result, Exception | None]:
    blocks = stages[stage]
    current_pass = Pass(
        local_blocks=frozenset(blocks),
        end_block=size if stage == len(stages) - 1 else blocks.stop,
        structures=dict(outputs),
        is_first=stage == 0,
        is_kept=lambda leaf: True,
        fetch=requests if stage > 0 else None,
    )
    if not blocks and 0 < stage < len(stages) - 1:
        return _Result(frozenset(), {}), None  # it only forwards the tensors that it receives
    try:
        run(stage, current_pass)
    except Exception as error:  # the other ranks wait for requests
        return _Result(frozenset(), {}, in_words(error)), error
    kept |= {leaf: x.detach().requires_grad_(x.requires_grad) for leaf, x in current_pass.kept.items()}
    return _Result(frozenset(current_pass.received), {block: current_pass.structures[block] for block in blocks}), None


class _Requests:
    """Requests a tensor from the rank that has it, while that rank is in :func:`_answer`."""

    def __init__(self, group: Group, owner: Callable[[Leaf], int], kept: Mapping[Leaf, Tensor], on: device) -> None:
        self._group, self._owner, self._kept, self._on = group, owner, kept, on

    def __call__(self, leaf: Leaf) -> Tensor:
        owner = self._owner(leaf)
        if owner == self._group.rank:
            return self._kept[leaf]
        self._group.share_object(leaf, self._group.rank)
        x: Any = self._group.share_object(None, owner)
        return x.to(self._on).requires_grad_(x.requires_grad)


def _answer(source: int, group: Group, owner: Callable[[Leaf], int], kept: Mapping[Leaf, Tensor]) -> _Result:
    """Answers the requests of the rank ``source``, until it shares its result."""
    while True:
        message: Any = group.share_object(None, source)
        if isinstance(message, _Result):
            return message
        rank = owner(message)
        answer = kept[message].detach().cpu().requires_grad_(kept[message].requires_grad) if rank == group.rank else None
        group.share_object(answer, rank)
