"""Pipeline schedules as data: the order of the forwards and backwards that each rank computes. Standard library only.

A batch passes the stages in microbatches. A schedule decides which microbatch a rank takes next. This order decides how long ranks are
idle (the bubble) and how many microbatches' activations they hold.

    1f1b, two ranks, four microbatches
    rank 0   F0.0 F0.1           B0.0 F0.2      B0.1 F0.3      B0.2      B0.3
    rank 1        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3

In every schedule each stage runs its forwards, its backwards and its weights' gradients in the order of the microbatches, so that
gradients are the same sums.

For P ranks with V stages each, M >= P microbatches, a forward of 1 unit of time and a backward of 2, of which 1 for the weights:

    schedule         bubble   stage activations held, at most
    gpipe            3(P-1)   VM                                    Huang et al., GPipe, 2019
    1f1b             3(P-1)   P                                     Narayanan et al., PipeDream, 2019
    eager_1f1b       3(P-1)   2P - 1                                Zhuang et al., On Optimizing the Communication of Model
                                                                    Parallelism, 2022
    interleaved      3(P-1)   (V-1)group + 2P - 1, stages 1/V       Narayanan et al., Efficient Large-Scale Language Model Training
                                                                    on GPU Clusters Using Megatron-LM, 2021
    zb_h1             P-1     P                                     Qi et al., Zero Bubble Pipeline Parallelism, 2023
    interleaved_zb    P-1     as interleaved, stages 1/V            both
    zb_v              P-1     2P, stages 1/2                        Qi et al., Pipeline Parallelism with Controllable Memory, 2024
    dualpipev         P-1     2P + 1, stages 1/2, from M = 2P on    DeepSeek-AI, DualPipeV, 2025
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from lightning_overlap.decision import ConfigError


class Action(NamedTuple):
    """The forward or backward of one microbatch on one stage.

    Attributes:
        kind: ``F`` forward, ``B`` backward, ``I`` the part of a backward for the gradients of inputs, ``W`` its other part, for the
            gradients of weights.
        stage: the number of the stage, along the model.
        microbatch: the number of the microbatch in the batch.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @property
    def result(self) -> Action:
        """The action under which others need the result: ``B`` for an ``I`` too, because both compute the gradients of inputs."""
        return self._replace(kind="B") if self.kind == "I" else self


@dataclass(frozen=True)
class Schedule:
    """The actions of all ranks for one batch.

    Attributes:
        name: the name of the schedule.
        microbatches: the number of microbatches.
        placement: the rank of each stage.
        actions: the actions of each rank, in order.
        paired: forwards, each of which runs in a lane beside the action after it, see :mod:`lightning_overlap.steps.lanes`.
    """

    name: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    paired: frozenset[Action] = frozenset()

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def splits_backward(self) -> bool:
        """Whether any backward is split into ``I`` and ``W``."""
        return any(action.kind == "I" for row in self.actions for action in row)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, in rising order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def text(self) -> str:
        """Returns the name on a line, and the actions of each rank on a line. :func:`parse` reads it."""
        rows = (" ".join("|".join(map(str, unit)) for unit in self.units(rank)) + "\n" for rank in range(self.ranks))
        return "".join([f"# {self.name}\n", *rows])

    def units(self, rank: int) -> list[tuple[Action, ...]]:
        """Returns what a rank runs at a time, in order: an action, or a pair of a forward and a backward."""
        units: list[tuple[Action, ...]] = []
        for action in self.actions[rank]:
            before = units.pop() if units and units[-1][-1] in self.paired else ()
            units.append((*before, action))
        return units

    def needs(self, action: Action) -> list[Action]:
        """Returns the results that an action needs, see :attr:`Action.result`."""
        kind, stage, microbatch = action
        if kind == "W":
            return [Action("B", stage, microbatch)]
        if kind == "F":
            return [Action("F", stage - 1, microbatch)] if stage > 0 else []
        after = [Action("B", stage + 1, microbatch)] if stage + 1 < self.stages else []
        return [Action("F", stage, microbatch), *after]

    def receiver(self, action: Action) -> int | None:
        """Returns the rank to which an action's result is sent; None if no other rank needs it."""
        stage = action.stage + (1 if action.kind == "F" else -1)
        if action.kind == "W" or stage not in range(self.stages) or self.placement[stage] == self.placement[action.stage]:
            return None
        return self.placement[stage]

    def order(self) -> list[tuple[Action, ...]]:
        """Merges the :meth:`units` of all ranks into one order, in which each comes after the actions that it needs.

        Raises:
            ConfigError: the ranks would wait for each other forever. It names the action at which each rank waits.
        """
        order, results = list[tuple[Action, ...]](), set[Action]()
        rows = [self.units(rank) for rank in range(self.ranks)]
        next_index = [0] * self.ranks

        def needs(unit: tuple[Action, ...]) -> list[Action]:
            return [need for action in unit for need in self.needs(action) if need not in results]

        progress = True
        while progress:
            progress = False
            for rank, row in enumerate(rows):
                while next_index[rank] < len(row) and not needs(row[next_index[rank]]):
                    order.append(row[next_index[rank]])
                    results.update(action.result for action in row[next_index[rank]])
                    next_index[rank] += 1
                    progress = True
        if blocked := [(rank, row[next_index[rank]]) for rank, row in enumerate(rows) if next_index[rank] < len(row)]:
            names = {action.result: str(action) for row in self.actions for action in row}
            waits = [
                f"rank {rank} at {'|'.join(map(str, unit))}, which needs {' and '.join(names.get(x, str(x)) for x in needs(unit))}"
                for rank, unit in blocked
            ]
            raise ConfigError(
                f"schedule {self.name} deadlocks: {'; '.join(waits)}. Move the needed actions earlier in their ranks' lines"
            )
        return order


def parse(text: str) -> Schedule:
    """Reads a schedule, the inverse of :meth:`Schedule.text`: a line of actions for each rank.

    Empty lines and comments, from # on, are ignored. A comment on the first line is the schedule's name.

    Raises:
        ConfigError: a line is wrong, or :func:`validate` refuses the schedule.
    """
    rows: list[tuple[Action, ...]] = []
    paired: set[Action] = set()
    line_of: dict[int, int] = {}  # by stage
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        row = []
        for word in line.partition("#")[0].replace("|", "| ").split():
            if (match := re.fullmatch(r"([FBIW])(\d+)\.(\d+)(\|?)", word)) is None:
                raise ConfigError(
                    f"line {number} of the schedule: {word!r} is no action. F0.3 is the forward of stage 0, microbatch 3. B0.3 is its "
                    "backward, or I0.3 the backward for inputs and W0.3 for weights. F0.3|B0.2 is a forward beside a backward"
                )
            action = Action(match[1], int(match[2]), int(match[3]))
            if line_of.setdefault(action.stage, number) != number:
                raise ConfigError(
                    f"line {number} of the schedule: {word!r} is an action of stage {action.stage}, which is on line "
                    f"{line_of[action.stage]}. A line is a rank, and each stage is on one rank"
                )
            row.append(action)
            if match[4]:
                paired.add(action)
        if row:
            rows.append(tuple(row))
    rank_of = {action.stage: rank for rank, row in enumerate(rows) for action in row}
    if not rank_of or sorted(rank_of) != list(range(len(rank_of))):
        raise ConfigError(f"the schedule has the stages {sorted(rank_of)}: number them from 0 without gaps")
    schedule = Schedule(
        name=lines[0].lstrip("# ").rstrip() if lines[0].startswith("#") else "file",
        microbatches=1 + max(action.microbatch for row in rows for action in row),
        placement=tuple(rank_of[stage] for stage in range(len(rank_of))),
        actions=tuple(rows),
        paired=frozenset(paired),
    )
    validate(schedule)
    return schedule


def validate(schedule: Schedule) -> None:
    """Checks that each stage computes each microbatch once, on its rank, and that no rank waits forever.

    Raises:
        ConfigError: an action is missing, redundant, on the wrong rank, or blocked.
    """
    name = f"schedule {schedule.name}"
    if set(schedule.placement) != set(range(schedule.ranks)):
        ranks = sorted(set(schedule.placement))
        raise ConfigError(f"{name} has {schedule.ranks} ranks, but its placement names the ranks {ranks}: give each rank a stage")
    run_by: dict[Action, int] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            kind, stage, microbatch = action
            if (
                kind not in ("F", "B", "I", "W")
                or stage not in range(schedule.stages)
                or microbatch not in range(schedule.microbatches)
            ):
                raise ConfigError(
                    f"{name}: rank {rank} runs {action}, which does not exist. Actions are F, B, I and W of stages 0 to "
                    f"{schedule.stages - 1} and microbatches 0 to {schedule.microbatches - 1}"
                )
            if action in run_by:
                raise ConfigError(f"{name}: ranks {run_by[action]} and {rank} both run {action}: remove one of them")
            if (holder := schedule.placement[stage]) != rank:
                raise ConfigError(f"{name}: rank {rank} runs {action}, but its stage is on rank {holder}: run it there")
            run_by[action] = rank
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            kinds = [kind for kind in "FBIW" if Action(kind, stage, microbatch) in run_by]
            needed = "FIW" if "B" not in kinds and {"I", "W"} & set(kinds) else "FB"
            missing = [str(Action(kind, stage, microbatch)) for kind in needed if kind not in kinds]
            redundant = [str(Action(kind, stage, microbatch)) for kind in kinds if kind not in needed]
            if missing or redundant:
                problem = f"{', '.join(missing)} missing" if missing else f"{', '.join(redundant)} redundant"
                raise ConfigError(f"{name}: {problem}. Each stage runs F and B, or F, I and W, of each microbatch")
    for unit in (unit for rank in range(schedule.ranks) for unit in schedule.units(rank)):
        if unit[-1] in schedule.paired or (len(unit) > 1 and not are_a_pair(*unit)):
            raise ConfigError(f"{name}: {'|'.join(map(str, unit))} is no pair of an F and another microbatch's B or I, like F0.3|B0.2")
    schedule.order()


def are_a_pair(*unit: Action) -> bool:
    """Whether actions are a forward and a backward, of different microbatches."""
    return "".join(action.kind for action in unit) in ("FB", "FI") and unit[0].microbatch != unit[1].microbatch


# -- orders of forward and backward ------------------------------------------------------------------------------------


def _looped(ranks: int, virtual: int) -> tuple[int, ...]:
    """Returns the placement that goes around the ranks ``virtual`` times."""
    return tuple(stage % ranks for stage in range(ranks * virtual))


def _gpipe(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """All forwards, then all backwards."""
    rows = []
    for rank in range(ranks):
        stages = range(rank, ranks * virtual, ranks)
        forward = [Action("F", stage, m) for stage in stages for m in range(microbatches)]
        backward = [Action("B", stage, m) for stage in reversed(stages) for m in range(microbatches)]
        rows.append((*forward, *backward))
    return Schedule("gpipe", microbatches, _looped(ranks, virtual), tuple(rows))


Slot = tuple[int | None, int]
"""An entry of a rank's order: a microbatch, or None for an empty entry, and the index of one of the rank's stages."""


def _alternate(name: str, ranks: int, virtual: int, slots: Sequence[Slot], warmup: Sequence[int]) -> Schedule:
    """Builds a schedule of warm-up forwards, then forwards and backwards by turns, then the remaining backwards.

    Args:
        name: the name of the schedule.
        ranks: the number of ranks.
        virtual: the number of stages of each rank.
        slots: the order of a rank's forwards and, with its stages counted from the last one, of its backwards. Empty slots are removed
            at the end: a schedule that runs with them also runs without them.
        warmup: the number of warm-up forwards of each rank.
    """
    rows = []
    for rank in range(ranks):
        forward = [(m, Action("F", chunk * ranks + rank, m or 0)) for m, chunk in slots]
        backward = [(m, Action("B", (virtual - 1 - chunk) * ranks + rank, m or 0)) for m, chunk in slots]
        first = min(warmup[rank], len(slots))
        pairs = [slot for pair in zip(forward[first:], backward, strict=False) for slot in pair]
        row = [*forward[:first], *pairs, *backward[len(slots) - first :]]
        rows.append(tuple(action for m, action in row if m is not None))
    microbatches = 1 + max(m for m, _ in slots if m is not None)
    return Schedule(name, microbatches, _looped(ranks, virtual), tuple(rows))


def _one_f_one_b(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """Each rank runs only as many forwards ahead as keep the later ranks busy."""
    return _alternate("1f1b", ranks, 1, [(m, 0) for m in range(microbatches)], [ranks - rank - 1 for rank in range(ranks)])


def _eager_one_f_one_b(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """1F1B with twice as many warm-up forwards: another microbatch hides the transfers to the next stage and back."""
    warmup = [2 * (ranks - rank - 1) for rank in range(ranks)]
    return _alternate("eager_1f1b", ranks, 1, [(m, 0) for m in range(microbatches)], warmup)


def _slots(ranks: int, virtual: int, microbatches: int, group: int) -> list[Slot]:
    """Returns the order of a rank's forwards: each group of microbatches passes all stages of the rank before the next group.

    No rank waits forever if every group has at least as many slots as there are ranks, which Megatron-LM requires. Other counts of
    microbatches become one group if it holds no more activations, else groups of equal size, at most ``group``, with empty slots.
    """
    rest = microbatches % group
    if virtual * microbatches <= _held_activations(ranks, virtual, group):
        groups: list[list[int | None]] = [list(range(microbatches))]
    elif rest == 0 or rest >= ranks:
        groups = [list(range(start, min(start + group, microbatches))) for start in range(0, microbatches, group)]
    else:
        count = -(-microbatches // group)
        bounds = [microbatches * i // count for i in range(count + 1)]
        width = max(ranks, -(-microbatches // count))
        groups = [[*[None] * (width - (end - start)), *range(start, end)] for start, end in pairwise(bounds)]
    return [(m, chunk) for members in groups for chunk in range(virtual) for m in members]


def _held_activations(ranks: int, virtual: int, group: int) -> int:
    """Returns the most stage activations that rank 0 of an interleaved schedule holds."""
    return (virtual - 1) * group + 2 * ranks - 1


def _interleaved(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """1F1B over several smaller stages a rank: the bubble is only as long as the forward and backward of one of them."""
    slots = _slots(ranks, virtual, microbatches, max(group or ranks, ranks))
    width = slots.index(next(slot for slot in slots if slot[1] == 1))  # the size of the first group
    warmup = [2 * (ranks - rank - 1) + (virtual - 1) * width for rank in range(ranks)]
    return _alternate("interleaved", ranks, virtual, slots, warmup)


# -- backward in two parts ---------------------------------------------------------------------------------------------


def _split_backward(name: str, unsplit: Schedule, limit: int) -> Schedule:
    """Splits each backward into ``I`` and ``W``, and puts the ``W`` where its rank would be idle.

    Simulates the schedule with one unit of time for each action. A rank takes its next forward or backward as soon as it can run, and
    until then its oldest pending ``W``.

    Args:
        name: the name of the new schedule.
        unsplit: a schedule of ``F`` and ``B``.
        limit: the most stage activations that a rank may hold, at least as many as in ``unsplit``. A forward above the limit waits.
    """
    rows: list[list[Action]] = [[] for _ in unsplit.actions]
    next_index, held = [0] * unsplit.ranks, [0] * unsplit.ranks
    pending: list[deque[Action]] = [deque() for _ in unsplit.actions]
    results: set[Action] = set()
    while any(pending) or any(next_index[rank] < len(row) for rank, row in enumerate(unsplit.actions)):
        new_results, count = [], sum(map(len, rows))
        for rank, row in enumerate(unsplit.actions):
            action = row[next_index[rank]] if next_index[rank] < len(row) else None
            is_full = action is not None and action.kind == "F" and held[rank] == limit
            if action is not None and not is_full and results.issuperset(unsplit.needs(action)):
                next_index[rank] += 1
                new_results.append(action)
                if action.kind == "F":
                    held[rank] += 1
                    rows[rank].append(action)
                else:
                    pending[rank].append(action._replace(kind="W"))
                    rows[rank].append(action._replace(kind="I"))
            elif pending[rank]:
                held[rank] -= 1
                rows[rank].append(pending[rank].popleft())
        assert sum(map(len, rows)) > count, f"{name} may hold {limit} activations, fewer than {unsplit.name} holds"
        results.update(new_results)
    return replace(unsplit, name=name, actions=tuple(map(tuple, rows)))


def _zb_h1(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """1F1B with split backwards. Every rank may hold as much as rank 0: later ranks defer more gradients of weights."""
    return _split_backward("zb_h1", _one_f_one_b(ranks, 1, microbatches, None), ranks)


def _interleaved_zb(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """The interleaved schedule with split backwards. Every rank may hold as much as rank 0."""
    unsplit = _interleaved(ranks, virtual, microbatches, group)
    return _split_backward("interleaved_zb", unsplit, _held_activations(ranks, virtual, max(group or ranks, ranks)))


# -- V-shaped: stages go down the ranks and up again, so that the first rank has the first and the last stage ------------------


def _v_shaped(name: str, ranks: int, microbatches: int, *, steady: str, flush: str) -> Schedule:
    """Builds DualPipeV's eight steps.

    A word is a kind and a direction, 0 down and 1 up; ``W`` is the oldest pending one. With fewer than two microbatches a rank, the
    order of two is built, and actions of the surplus ones are removed: a schedule that runs with them also runs without them.

    Args:
        name: the name of the schedule.
        ranks: the number of ranks.
        microbatches: the number of microbatches.
        steady: the words that the fourth step repeats: forward and backward, down and up.
        flush: the words that the fifth step repeats, without a forward that goes down.
    """
    rows = []
    count = max(microbatches, 2 * ranks)
    for rank in range(ranks):
        later_ranks = ranks - rank - 1
        row: list[Action] = []
        next_microbatch: Counter[tuple[bool, int]] = Counter()  # by whether it is a forward, and stage
        pending: deque[Action] = deque()
        for word in [
            *["F0"] * (2 * later_ranks),
            *["F0", "F1"] * (rank + 1),
            *["I1", "W", "F1"] * later_ranks,
            *steady.split() * (count - ranks - later_ranks),
            *flush.split() * later_ranks,
            *(["B1", "B0"] * (rank + 1))[: rank + 1],
            *(["I1", "I0"] * (rank + 1))[rank + 1 :],
            *["W", "I0"] * later_ranks,
            *["W"] * (rank + 1),
        ]:
            if word == "W":
                row.append(pending.popleft())
                continue
            kind, stage = word[0], rank if word[1] == "0" else 2 * ranks - 1 - rank
            action = Action(kind, stage, next_microbatch[kind == "F", stage])
            next_microbatch[kind == "F", stage] += 1
            row.append(action)
            if kind == "I":
                pending.append(action._replace(kind="W"))
        rows.append(tuple(action for action in row if action.microbatch < microbatches))
    return Schedule(name, microbatches, (*range(ranks), *reversed(range(ranks))), tuple(rows))


def _dualpipev(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """Each forward is next to a backward of another microbatch, whose compute hides its transfers. A rank runs them in sequence."""
    return _v_shaped("dualpipev", ranks, microbatches, steady="F0 B1 F1 B0", flush="B1 F1 B0")


def _zb_v(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """DualPipeV's order, with each backward before the forward next to it, so that its activations are released, and all split."""
    order = _v_shaped("zb_v", ranks, microbatches, steady="B1 F0 B0 F1", flush="B1 B0 F1")
    unsplit = replace(order, actions=tuple(tuple(a.result for a in row if a.kind != "W") for row in order.actions))
    return _split_backward("zb_v", unsplit, 2 * ranks)


# -- by name -----------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[int, int, int, int | None], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "eager_1f1b": _eager_one_f_one_b,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "interleaved_zb": _interleaved_zb,
    "zb_v": _zb_v,
    "dualpipev": _dualpipev,
}
"""The function that builds each schedule from the numbers of ranks, stages a rank and microbatches, and the group."""
STAGES_OF_A_RANK = {"1f1b": 1, "eager_1f1b": 1, "zb_h1": 1, "zb_v": 2, "dualpipev": 2}
"""The only possible number of stages a rank, of schedules that do not let the user choose."""
INTERLEAVED = ("interleaved", "interleaved_zb")
"""Schedules with groups of microbatches and at least two stages a rank."""


def build(name: str, ranks: int, virtual: int, microbatches: int, *, group: int | None = None) -> Schedule:
    """Builds a schedule.

    Args:
        name: a key of :data:`SCHEDULES`.
        ranks: the number of ranks.
        virtual: the number of stages of each rank.
        microbatches: the number of microbatches, any.
        group: for interleaved schedules: the number of microbatches that pass one of a rank's stages before its next stage starts. The
            default, and the least, is ``ranks``; smaller groups are used if a rank would wait forever otherwise.

    Raises:
        ConfigError: the schedule does not exist for these numbers.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} does not exist; known are {', '.join(SCHEDULES)}")
    for argument, number in {"ranks": ranks, "virtual": virtual, "microbatches": microbatches, "group": group}.items():
        if number is not None and number < 1:
            raise ConfigError(f"schedule {name} cannot have {argument}={number}: it must be at least 1")
    if (needed := STAGES_OF_A_RANK.get(name, virtual)) != virtual:
        raise ConfigError(f"schedule {name} needs virtual_stages: {needed}, not {virtual}")
    if name in INTERLEAVED and virtual < 2:
        raise ConfigError(f"schedule {name} needs virtual_stages of at least 2, not {virtual}. For 1, use 1f1b or zb_h1")
    if name not in INTERLEAVED and group is not None:
        raise ConfigError(f"schedule {name} has no groups of microbatches: remove group={group}, or use {' or '.join(INTERLEAVED)}")
    schedule = SCHEDULES[name](ranks, virtual, microbatches, group)
    validate(schedule)
    return schedule
