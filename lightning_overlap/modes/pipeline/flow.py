"""What goes from stage to stage: the hidden states, and whatever else later blocks or the loss read of earlier blocks.

Which tensors these are is found by running each stage once, one after the other, on the first microbatch of a fit. A stage that needs
a tensor of an earlier one asks for it, and the rank that has it answers, since it has nothing else to do. ::

    rank 0   runs stage 0 | answers                  | answers
    rank 1   answers      | runs stage 1, asks       | answers
    rank 2   answers      | answers                  | runs stage 2, asks
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
    """What goes from stage to stage.

    Attributes:
        stages: by stage, its blocks.
        uses: by stage, the tensors of earlier blocks that it computes with.
        outputs: by block, what it returns, as in :class:`lightning_overlap.model.block_pass.Pass`.
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

    def after(self, stage: int) -> tuple[Leaf, ...]:
        """What a stage hands on: all that later stages use and that is made in it, or before it."""
        used = {leaf for uses in self.uses[stage + 1 :] for leaf in uses}
        return tuple(sorted(leaf for leaf in used if self.stage_of(leaf[0]) <= stage))


@dataclass(frozen=True)
class _Ran:
    """A stage has been run.

    Attributes:
        uses: what it has asked for.
        outputs: of the blocks that it has run.
        failed: the error that has ended it, in words.
    """

    uses: frozenset[Leaf]
    outputs: dict[int, Any]
    failed: str | None = None


def rehearse(
    stages: Sequence[range],
    placement: Sequence[int],
    group: Group,
    on: device,
    run: Callable[[int, Pass], None],
    size: int,
) -> Flow:
    """Finds what goes from stage to stage. Collective.

    Args:
        stages: by stage, its blocks.
        placement: by stage, its rank.
        group: the pipeline's ranks.
        on: where this rank's tensors are.
        run: runs a stage's forward with a pass.
        size: how many blocks there are.

    Raises:
        ConfigError: a stage cannot be run so; on every rank.
    """
    made: dict[Leaf, Tensor] = {}
    found = Flow(stages, [frozenset()] * len(stages), {})
    uses: list[frozenset[Leaf]] = []
    outputs: dict[int, Any] = {}

    def owner(leaf: Leaf) -> int:
        return placement[found.stage_of(leaf[0])]

    for stage, rank in enumerate(placement):
        if rank == group.rank:
            mine, failed = _run_stage(stage, stages, outputs, made, _Asks(group, owner, made, on), run, size)
            group.share_object(mine, rank)
            if failed is not None:
                raise failed
            ran = mine
        else:
            ran = _answer(rank, group, owner, made)
        if ran.failed is not None:
            raise_from_words(ran.failed)
        uses.append(ran.uses)
        outputs |= ran.outputs
    return Flow(stages, uses, outputs)


def _run_stage(
    stage: int,
    stages: Sequence[range],
    outputs: dict[int, Any],
    made: dict[Leaf, Tensor],
    asks: _Asks,
    run: Callable[[int, Pass], None],
    size: int,
) -> tuple[_Ran, Exception | None]:
    blocks = stages[stage]
    current_pass = Pass(
        run=frozenset(blocks),
        stop=size if stage == len(stages) - 1 else blocks.stop,
        structures=dict(outputs),
        is_first=stage == 0,
        is_kept=lambda leaf: True,
        fetch=asks if stage > 0 else None,
    )
    if not blocks and 0 < stage < len(stages) - 1:
        return _Ran(frozenset(), {}), None  # it hands on what it gets
    try:
        run(stage, current_pass)
    except Exception as error:  # the others are waiting to be asked
        return _Ran(frozenset(), {}, in_words(error)), error
    made |= {leaf: x.detach().requires_grad_(x.requires_grad) for leaf, x in current_pass.kept.items()}
    return _Ran(frozenset(current_pass.received), {block: current_pass.structures[block] for block in blocks}), None


class _Asks:
    """Gets a tensor from the rank that has it, while that rank is in :func:`_answer`."""

    def __init__(self, group: Group, owner: Callable[[Leaf], int], made: Mapping[Leaf, Tensor], on: device) -> None:
        self._group, self._owner, self._made, self._on = group, owner, made, on

    def __call__(self, leaf: Leaf) -> Tensor:
        owner = self._owner(leaf)
        if owner == self._group.rank:
            return self._made[leaf]
        self._group.share_object(leaf, self._group.rank)
        x: Any = self._group.share_object(None, owner)
        return x.to(self._on).requires_grad_(x.requires_grad)


def _answer(asking: int, group: Group, owner: Callable[[Leaf], int], made: Mapping[Leaf, Tensor]) -> _Ran:
    """Answers the rank that runs a stage until it has come to its end."""
    while True:
        said: Any = group.share_object(None, asking)
        if isinstance(said, _Ran):
            return said
        rank = owner(said)
        group.share_object(made[said].detach().cpu().requires_grad_(made[said].requires_grad) if rank == group.rank else None, rank)
