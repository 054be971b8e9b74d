"""Pipeline schedules as data: what each rank computes, in which order. Standard library only.

A batch passes the stages in microbatches. Schedules differ in which microbatch a rank takes next, which decides how long ranks
stand idle (the bubble) and how many microbatches' activations they hold.

    1f1b, two ranks, four microbatches
    rank 0   F0.0 F0.1           B0.0 F0.2      B0.1 F0.3      B0.2      B0.3
    rank 1        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3

In all of them each stage runs its forwards, its backwards and its weights' gradients in the order of the microbatches, so that
gradients are the same sums in every one.

For P ranks with V stages each, M >= P microbatches, a forward that takes 1 and a backward that takes 2, of which 1 for the weights:

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
    """What a rank does in one go.

    Attributes:
        kind: ``F`` forward, ``B`` backward, ``I`` backward for the gradients of inputs alone, ``W`` the gradients of weights that an
            ``I`` has left.
        stage: counted along the model.
        microbatch: of the batch.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @property
    def gives(self) -> Action:
        """The action as others need it: an ``I`` gives them what a ``B`` does."""
        return self._replace(kind="B") if self.kind == "I" else self


@dataclass(frozen=True)
class Schedule:
    """All ranks' actions for one batch.

    Attributes:
        name: of the schedule.
        microbatches: of the batch.
        placement: by stage, its rank.
        actions: by rank, in their order.
    """

    name: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def splits_backward(self) -> bool:
        """Whether backward is in two parts anywhere."""
        return any(action.kind == "I" for row in self.actions for action in row)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """A rank's stages, in rising order."""
        return tuple(stage for stage, there in enumerate(self.placement) if there == rank)

    def text(self) -> str:
        """One line a rank, after one with the name; :func:`parse` reads it."""
        return "\n".join([f"# {self.name}", *(" ".join(map(str, row)) for row in self.actions)]) + "\n"

    def needs(self, action: Action) -> list[Action]:
        """What must be over before an action, as :attr:`Action.gives` says it."""
        kind, stage, microbatch = action
        if kind == "W":
            return [Action("B", stage, microbatch)]
        if kind == "F":
            return [Action("F", stage - 1, microbatch)] if stage > 0 else []
        after = [Action("B", stage + 1, microbatch)] if stage + 1 < self.stages else []
        return [Action("F", stage, microbatch), *after]

    def receiver(self, action: Action) -> int | None:
        """The other rank that goes on from an action; None if it is the same one, or none."""
        stage = action.stage + (1 if action.kind == "F" else -1)
        if action.kind == "W" or stage not in range(self.stages) or self.placement[stage] == self.placement[action.stage]:
            return None
        return self.placement[stage]

    def order(self) -> list[Action]:
        """All ranks' actions in one order in which they can be run: a rank's in its own, each after what it needs.

        Raises:
            ConfigError: there is none; with the action at which each rank stands still.
        """
        order: list[Action] = []
        over: set[Action] = set()
        at = [0] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.actions):
                while at[rank] < len(row) and over.issuperset(self.needs(row[at[rank]])):
                    order.append(row[at[rank]])
                    over.add(row[at[rank]].gives)
                    at[rank] += 1
                    moved = True
        blocked = [(rank, row[at[rank]]) for rank, row in enumerate(self.actions) if at[rank] < len(row)]
        if blocked:
            called = {action.gives: str(action) for row in self.actions for action in row}
            waits = []
            for rank, action in blocked:
                missing = " and ".join(called.get(need, str(need)) for need in self.needs(action) if need not in over)
                waits.append(f"rank {rank} at {action}, which needs {missing}")
            raise ConfigError(f"schedule {self.name} stands still: {'; '.join(waits)}: run what is needed earlier")
        return order


def parse(text: str) -> Schedule:
    """Reads a schedule, the inverse of :meth:`Schedule.text`: a line of actions for each rank.

    Empty lines and what follows a # are left out; a remark on the first line is the schedule's name.

    Raises:
        ConfigError: naming the line, or what :func:`validate` finds.
    """
    rows: list[tuple[Action, ...]] = []
    line_of: dict[int, int] = {}  # by stage
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        row = []
        for word in line.partition("#")[0].split():
            if (found := re.fullmatch(r"([FBIW])(\d+)\.(\d+)", word)) is None:
                raise ConfigError(
                    f"line {number} of the schedule: {word!r} is no action; F0.3 is the forward of stage 0, microbatch 3, and B, I or "
                    "W in place of F its backward, that of inputs, or of weights"
                )
            action = Action(found[1], int(found[2]), int(found[3]))
            if line_of.setdefault(action.stage, number) != number:
                raise ConfigError(
                    f"line {number} of the schedule: {word!r} is of stage {action.stage}, which line {line_of[action.stage]} has: "
                    "a line is a rank, and a stage is on one"
                )
            row.append(action)
        if row:
            rows.append(tuple(row))
    place = {action.stage: rank for rank, row in enumerate(rows) for action in row}
    if not place or sorted(place) != list(range(len(place))):
        raise ConfigError(f"the schedule has the stages {sorted(place)}: number them from 0, and leave none out")
    made = Schedule(
        name=lines[0].lstrip("# ").rstrip() if lines[0].startswith("#") else "file",
        microbatches=1 + max(action.microbatch for row in rows for action in row),
        placement=tuple(place[stage] for stage in range(len(place))),
        actions=tuple(rows),
    )
    validate(made)
    return made


def validate(schedule: Schedule) -> None:
    """Checks that everything is computed once, where the placement says, and that no rank waits for ever.

    Raises:
        ConfigError: naming what is missing, too much, misplaced or blocked.
    """
    said = f"schedule {schedule.name}"
    if set(schedule.placement) != set(range(schedule.ranks)):
        there = sorted(set(schedule.placement))
        raise ConfigError(f"{said} has {schedule.ranks} ranks, and its placement names the ranks {there}: give each a stage")
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
                    f"{said}: rank {rank} runs {action}, and there are F, B, I and W of stages 0 to {schedule.stages - 1} and "
                    f"microbatches 0 to {schedule.microbatches - 1}"
                )
            if action in run_by:
                raise ConfigError(f"{said}: {action} is run twice, by ranks {run_by[action]} and {rank}: leave one out")
            if (holder := schedule.placement[stage]) != rank:
                raise ConfigError(f"{said}: {action} is run by rank {rank}, and its stage is on rank {holder}: run it there")
            run_by[action] = rank
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            kinds = [kind for kind in "FBIW" if Action(kind, stage, microbatch) in run_by]
            wanted = "FIW" if "B" not in kinds and {"I", "W"} & set(kinds) else "FB"
            missing = [str(Action(kind, stage, microbatch)) for kind in wanted if kind not in kinds]
            spare = [str(Action(kind, stage, microbatch)) for kind in kinds if kind not in wanted]
            if missing or spare:
                wrong = f"{', '.join(missing)} missing" if missing else f"{', '.join(spare)} too much"
                raise ConfigError(f"{said}: {wrong}: each stage runs F and B, or F, I and W, of each microbatch")
    schedule.order()


# -- orders of forward and backward ------------------------------------------------------------------------------------


def _looped(ranks: int, virtual: int) -> tuple[int, ...]:
    """The placement around the ranks, ``virtual`` times."""
    return tuple(stage % ranks for stage in range(ranks * virtual))


def _gpipe(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """All forwards, then all backwards."""
    rows = []
    for rank in range(ranks):
        own = range(rank, ranks * virtual, ranks)
        forward = [Action("F", stage, m) for stage in own for m in range(microbatches)]
        backward = [Action("B", stage, m) for stage in reversed(own) for m in range(microbatches)]
        rows.append((*forward, *backward))
    return Schedule("gpipe", microbatches, _looped(ranks, virtual), tuple(rows))


Slot = tuple[int | None, int]
"""A turn in a rank's order: a microbatch, or None, and which of the rank's stages."""


def _by_turns(name: str, ranks: int, virtual: int, slots: Sequence[Slot], warmup: Sequence[int]) -> Schedule:
    """Forwards to warm up, then a forward and a backward by turns, then the backwards that are left.

    Args:
        name: of the schedule.
        ranks: of the pipeline.
        virtual: stages of a rank.
        slots: the order of a rank's forwards, and with its stages counted from the last one, of its backwards. Slots without a
            microbatch are left out at the end: what can be run with them can be run without.
        warmup: by rank, the slots before its first backward's forward.
    """
    rows = []
    for rank in range(ranks):
        forward = [(m, Action("F", chunk * ranks + rank, m or 0)) for m, chunk in slots]
        backward = [(m, Action("B", (virtual - 1 - chunk) * ranks + rank, m or 0)) for m, chunk in slots]
        first = min(warmup[rank], len(slots))
        turns = [slot for turn in zip(forward[first:], backward, strict=False) for slot in turn]
        row = [*forward[:first], *turns, *backward[len(slots) - first :]]
        rows.append(tuple(action for m, action in row if m is not None))
    microbatches = 1 + max(m for m, _ in slots if m is not None)
    return Schedule(name, microbatches, _looped(ranks, virtual), tuple(rows))


def _one_f_one_b(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """A rank holds no more than it takes to keep the ones behind it busy."""
    return _by_turns("1f1b", ranks, 1, [(m, 0) for m in range(microbatches)], [ranks - rank - 1 for rank in range(ranks)])


def _eager_one_f_one_b(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """Twice as many forwards before the first backward: what goes to the next stage and back has another microbatch to hide under."""
    warmup = [2 * (ranks - rank - 1) for rank in range(ranks)]
    return _by_turns("eager_1f1b", ranks, 1, [(m, 0) for m in range(microbatches)], warmup)


def _slots(ranks: int, virtual: int, microbatches: int, group: int) -> list[Slot]:
    """The order of a rank's forwards: one group of microbatches after the other through each stage of the rank in turn.

    No rank waits for ever if every group has at least as many slots as there are ranks, which the reference demands of groups.
    Counts for which that cannot be are met thus: as one group if no more is held for it, else as groups of equal size, not above
    ``group``, with empty slots.
    """
    rest = microbatches % group
    if virtual * microbatches <= _held(ranks, virtual, group):
        groups: list[list[int | None]] = [list(range(microbatches))]
    elif rest == 0 or rest >= ranks:
        groups = [list(range(start, min(start + group, microbatches))) for start in range(0, microbatches, group)]
    else:
        count = -(-microbatches // group)
        bounds = [microbatches * i // count for i in range(count + 1)]
        width = max(ranks, -(-microbatches // count))
        groups = [[*[None] * (width - (end - start)), *range(start, end)] for start, end in pairwise(bounds)]
    return [(m, chunk) for members in groups for chunk in range(virtual) for m in members]


def _held(ranks: int, virtual: int, group: int) -> int:
    """Stage activations that rank 0 of an interleaved schedule holds at most."""
    return (virtual - 1) * group + 2 * ranks - 1


def _interleaved(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """1F1B over several stages a rank, of which each is a smaller part of the model: the bubble is that of one of them."""
    slots = _slots(ranks, virtual, microbatches, max(group or ranks, ranks))
    width = slots.index(next(slot for slot in slots if slot[1] == 1))  # of the first group
    warmup = [2 * (ranks - rank - 1) + (virtual - 1) * width for rank in range(ranks)]
    return _by_turns("interleaved", ranks, virtual, slots, warmup)


# -- backward in two parts ---------------------------------------------------------------------------------------------


def _split(name: str, whole: Schedule, held: int) -> Schedule:
    """The same forwards and backwards, with the weights' gradients where their rank would stand idle.

    Found by running it with a unit of time for each action: a rank takes its next forward or backward as soon as it can be run, and
    until then the oldest weights' gradients that it has left.

    Args:
        name: of the schedule.
        whole: with whole backwards.
        held: the most stage activations of a rank, at least those of ``whole``. A forward for which there is no room waits.
    """
    rows: list[list[Action]] = [[] for _ in whole.actions]
    at, holding = [0] * whole.ranks, [0] * whole.ranks
    left: list[deque[Action]] = [deque() for _ in whole.actions]
    over: set[Action] = set()
    while any(left) or any(at[rank] < len(row) for rank, row in enumerate(whole.actions)):
        ended, run = [], sum(map(len, rows))
        for rank, row in enumerate(whole.actions):
            action = row[at[rank]] if at[rank] < len(row) else None
            full = action is not None and action.kind == "F" and holding[rank] == held
            if action is not None and not full and over.issuperset(whole.needs(action)):
                at[rank] += 1
                ended.append(action)
                if action.kind == "F":
                    holding[rank] += 1
                    rows[rank].append(action)
                else:
                    left[rank].append(action._replace(kind="W"))
                    rows[rank].append(action._replace(kind="I"))
            elif left[rank]:
                holding[rank] -= 1
                rows[rank].append(left[rank].popleft())
        assert sum(map(len, rows)) > run, f"{name} has room for {held} activations, fewer than {whole.name} holds"
        over.update(ended)
    return replace(whole, name=name, actions=tuple(map(tuple, rows)))


def _zb_h1(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """1F1B with a split backward. Every rank may hold what rank 0 does: later ones hold weights' gradients back for longer."""
    return _split("zb_h1", _one_f_one_b(ranks, 1, microbatches, None), ranks)


def _interleaved_zb(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """The interleaved one with a split backward. Every rank may hold what rank 0 does."""
    whole = _interleaved(ranks, virtual, microbatches, group)
    return _split("interleaved_zb", whole, _held(ranks, virtual, max(group or ranks, ranks)))


# -- V-shaped: the stages run down the ranks and up again, so that the last one is on the rank of the first --------------------


def _v_shaped(name: str, ranks: int, microbatches: int, *, steady: str, flush: str) -> Schedule:
    """DualPipeV's eight steps.

    Written as kind and way, 0 down and 1 up; a W is the oldest that an I has left. Fewer than two microbatches a rank are run as
    two, and those that there are not left out: what can be run with them can be run without.

    Args:
        name: of the schedule.
        ranks: of the pipeline.
        microbatches: of the batch.
        steady: a turn of the fourth step, with all four of forward and backward, down and up.
        flush: a turn of the fifth step, in which no forward goes down any more.
    """
    rows = []
    count = max(microbatches, 2 * ranks)
    for rank in range(ranks):
        behind = ranks - rank - 1
        row: list[Action] = []
        run: Counter[tuple[bool, int]] = Counter()  # by whether it is a forward, and stage
        left: deque[Action] = deque()
        for turn in [
            *["F0"] * (2 * behind),
            *["F0", "F1"] * (rank + 1),
            *["I1", "W", "F1"] * behind,
            *steady.split() * (count - ranks - behind),
            *flush.split() * behind,
            *(["B1", "B0"] * (rank + 1))[: rank + 1],
            *(["I1", "I0"] * (rank + 1))[rank + 1 :],
            *["W", "I0"] * behind,
            *["W"] * (rank + 1),
        ]:
            if turn == "W":
                row.append(left.popleft())
                continue
            kind, stage = turn[0], rank if turn[1] == "0" else 2 * ranks - 1 - rank
            action = Action(kind, stage, run[kind == "F", stage])
            run[kind == "F", stage] += 1
            row.append(action)
            if kind == "I":
                left.append(action._replace(kind="W"))
        rows.append(tuple(action for action in row if action.microbatch < microbatches))
    return Schedule(name, microbatches, (*range(ranks), *reversed(range(ranks))), tuple(rows))


def _dualpipev(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """A forward beside each backward of another microbatch, to hide one's transfers behind the other; here one after the other."""
    return _v_shaped("dualpipev", ranks, microbatches, steady="F0 B1 F1 B0", flush="B1 F1 B0")


def _zb_v(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """DualPipeV's order with each backward before the forward beside it, which frees its room, and with every backward split."""
    order = _v_shaped("zb_v", ranks, microbatches, steady="B1 F0 B0 F1", flush="B1 B0 F1")
    whole = replace(order, actions=tuple(tuple(a.gives for a in row if a.kind != "W") for row in order.actions))
    return _split("zb_v", whole, 2 * ranks)


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
"""Schedules by name: builders of ranks, stages a rank, microbatches and group."""
STAGES_OF_A_RANK = {"1f1b": 1, "eager_1f1b": 1, "zb_h1": 1, "zb_v": 2, "dualpipev": 2}
"""How many stages a rank has, where that is not free."""
INTERLEAVED = ("interleaved", "interleaved_zb")
"""Those with groups of microbatches, and with at least two stages a rank."""


def build(name: str, ranks: int, virtual: int, microbatches: int, *, group: int | None = None) -> Schedule:
    """A schedule by name.

    Args:
        name: one of SCHEDULES.
        ranks: of the pipeline.
        virtual: stages of each rank.
        microbatches: of the batch, any number.
        group: of an interleaved schedule: microbatches that go through one of a rank's stages before the next one is begun. By
            default, and at least, ``ranks``; fewer where the microbatches cannot be grouped so without a rank waiting for ever.

    Raises:
        ConfigError: there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    for what, number in {"ranks": ranks, "virtual": virtual, "microbatches": microbatches, "group": group}.items():
        if number is not None and number < 1:
            raise ConfigError(f"schedule {name} cannot have {what}={number}: give at least 1")
    if (wanted := STAGES_OF_A_RANK.get(name, virtual)) != virtual:
        raise ConfigError(f"schedule {name} needs virtual_stages: {wanted}, and there are {virtual}")
    if name in INTERLEAVED and virtual < 2:
        raise ConfigError(f"schedule {name} needs virtual_stages of at least 2, and there is {virtual}: 1f1b and zb_h1 are for 1")
    if name not in INTERLEAVED and group is not None:
        raise ConfigError(f"schedule {name} has no groups of microbatches: leave out group={group}, or use {' or '.join(INTERLEAVED)}")
    made = SCHEDULES[name](ranks, virtual, microbatches, group)
    validate(made)
    return made
