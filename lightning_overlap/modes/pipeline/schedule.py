"""Pipeline schedules as data: what each rank computes, in which order. Standard library only.

A batch passes the stages in microbatches. Schedules differ in which microbatch a rank takes next, which decides how long ranks
stand idle (the bubble) and how many microbatches' activations they hold.

    1f1b, two ranks, four microbatches
    rank 0   F0.0 F0.1           B0.0 F0.2      B0.1 F0.3      B0.2      B0.3
    rank 1        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3

GPipe: Huang et al., 2019. 1F1B: Narayanan et al., PipeDream, 2019; eager: Zhuang et al., On Optimizing the Communication of Model
Parallelism, 2022; interleaved: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, 2021. Backward in
two parts, of which the second can fill bubbles: Qi et al., Zero Bubble Pipeline Parallelism, 2023; V-shaped: Qi et al., Pipeline
Parallelism with Controllable Memory, 2024.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        """A rank's stages."""
        return tuple(stage for stage, there in enumerate(self.placement) if there == rank)

    def text(self) -> str:
        """One line a rank; :func:`parse` reads it."""
        return "\n".join([f"# {self.name}", *(" ".join(map(str, row)) for row in self.actions)]) + "\n"


def parse(text: str) -> Schedule:
    """Reads a schedule: a line of actions for each rank. Empty lines and what follows a # are left out.

    Raises:
        ConfigError: naming the line, or what :func:`validate` finds.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        row = []
        for word in words:
            if (found := re.fullmatch(r"([FBIW])(\d+)\.(\d+)", word)) is None:
                raise ConfigError(
                    f"line {number} of the schedule: {word!r} is no action; F0.3 is the forward of stage 0, microbatch 3"
                )
            row.append(Action(found[1], int(found[2]), int(found[3])))
        if row:
            rows.append(tuple(row))
    place = {action.stage: rank for rank, row in enumerate(rows) for action in row}
    if not place or sorted(place) != list(range(len(place))):
        raise ConfigError(f"the schedule has the stages {sorted(place)}: they are to be numbered from 0, with none left out")
    microbatches = 1 + max(action.microbatch for row in rows for action in row)
    made = Schedule("file", microbatches, tuple(place[stage] for stage in range(len(place))), tuple(rows))
    validate(made)
    return made


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What must be over before an action: kinds (any one of the letters), stage, microbatch."""
    kind, stage, microbatch = action
    if kind == "F":
        return [("F", stage - 1, microbatch)] if stage > 0 else []
    if kind == "W":
        return [("I", stage, microbatch)]
    return [("F", stage, microbatch), *([("BI", stage + 1, microbatch)] if stage < stages - 1 else [])]


def validate(schedule: Schedule) -> None:
    """Checks that everything is computed once, where the placement says, and that no rank waits for ever.

    Raises:
        ConfigError: naming what is missing, too much, misplaced or blocked.
    """
    seen: dict[Action, int] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action in seen:
                raise ConfigError(f"schedule {schedule.name}: {action} is run twice, by ranks {seen[action]} and {rank}")
            if action.stage >= schedule.stages or schedule.placement[action.stage] != rank:
                raise ConfigError(f"schedule {schedule.name}: {action} is run by rank {rank}, which does not hold its stage")
            seen[action] = rank
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            kinds = "".join(k for k in "FBIW" if Action(k, stage, microbatch) in seen)
            if kinds not in ("FB", "FIW"):
                raise ConfigError(
                    f"schedule {schedule.name}: stage {stage}, microbatch {microbatch} is run as {kinds or 'nothing'}: it is to be "
                    "F and B, or F, I and W"
                )
    if stuck := _run(schedule)[1]:
        raise ConfigError(f"schedule {schedule.name} stands still: {', '.join(stuck)}")


def _run(schedule: Schedule) -> tuple[list[Action], list[str]]:
    """The actions in an order in which they can be run, and, by rank, what cannot."""
    done: set[tuple[str, int, int]] = set()
    order: list[Action] = []
    at = [0] * schedule.ranks

    def blocked(action: Action) -> list[str]:
        return [
            f"{kinds[0]}{stage}.{microbatch}"
            for kinds, stage, microbatch in needs(action, schedule.stages)
            if not any((kind, stage, microbatch) in done for kind in kinds)
        ]

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while at[rank] < len(row) and not blocked(row[at[rank]]):
                order.append(row[at[rank]])
                done.add(row[at[rank]])
                at[rank] += 1
                moved = True
    left = [
        f"rank {rank} at {row[at[rank]]}, which needs {' and '.join(blocked(row[at[rank]]))}"
        for rank, row in enumerate(schedule.actions)
        if at[rank] < len(row)
    ]
    return order, left


# -- schedules ---------------------------------------------------------------------------------------------------------


def _looped(ranks: int, virtual: int) -> tuple[int, ...]:
    return tuple(stage % ranks for stage in range(ranks * virtual))


def _v_shaped(ranks: int) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks)))


def _gpipe(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """All forwards, then all backwards."""
    rows = []
    for rank in range(ranks):
        own = range(rank, ranks * virtual, ranks)
        forward = [Action("F", stage, m) for stage in own for m in range(microbatches)]
        backward = [Action("B", stage, m) for stage in reversed(own) for m in range(microbatches)]
        rows.append((*forward, *backward))
    return Schedule("gpipe", microbatches, _looped(ranks, virtual), tuple(rows))


def _alternating(
    name: str, ranks: int, virtual: int, microbatches: int, table: Sequence[tuple[int, int]], warmup: list[int]
) -> Schedule:
    """Forwards to warm up, then a forward and a backward by turns, then the backwards that are left.

    Args:
        name: of the schedule.
        ranks: of the pipeline.
        virtual: stages of a rank.
        microbatches: of the batch.
        table: in the order of a rank's forwards, microbatch and which of its stages.
        warmup: by rank, the forwards before its first backward.
    """
    rows = []
    for rank in range(ranks):
        forward = [Action("F", chunk * ranks + rank, m) for m, chunk in table]
        backward = [Action("B", (virtual - 1 - chunk) * ranks + rank, m) for m, chunk in table]
        first = min(warmup[rank], len(table))
        row = forward[:first]
        for i, action in enumerate(forward[first:]):
            row += [action, backward[i]]
        rows.append((*row, *backward[len(table) - first :]))
    return Schedule(name, microbatches, _looped(ranks, virtual), tuple(rows))


def _one_f_one_b(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    table = [(m, 0) for m in range(microbatches)]
    return _alternating("1f1b", ranks, 1, microbatches, table, [ranks - rank - 1 for rank in range(ranks)])


def _eager(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """Twice as many forwards before the first backward: what goes to the next stage and back has another microbatch to hide under."""
    table = [(m, 0) for m in range(microbatches)]
    return _alternating("eager_1f1b", ranks, 1, microbatches, table, [2 * (ranks - rank - 1) for rank in range(ranks)])


def table(virtual: int, microbatches: int, group: int) -> list[tuple[int, int]]:
    """The order of a rank's forwards, as microbatch and which of its stages: a group of microbatches through each stage in turn."""
    starts = range(0, microbatches, group)
    return [(m, chunk) for start in starts for chunk in range(virtual) for m in range(start, min(start + group, microbatches))]


def _interleaved(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    """The reference's order, if the microbatches can be grouped so that nobody waits for ever; else the greedy one."""
    group = group or ranks
    warmup = [(ranks - rank - 1) * 2 + (virtual - 1) * group for rank in range(ranks)]
    if group >= ranks and (microbatches % group == 0 or microbatches % group >= ranks):
        return _alternating("interleaved", ranks, virtual, microbatches, table(virtual, microbatches, group), warmup)
    return _greedy("interleaved", _looped(ranks, virtual), microbatches, [w + 1 for w in warmup], split=False)


def _zero_bubble(name: str, placement: tuple[int, ...], microbatches: int, held: list[int]) -> Schedule:
    return _greedy(name, placement, microbatches, held, split=True)


def _greedy(name: str, placement: tuple[int, ...], microbatches: int, held: list[int], *, split: bool) -> Schedule:
    """Each rank takes, whenever it is free, what frees others first: a backward, else a forward, else weights' gradients.

    All of F, I and W take one unit of time, B two.

    Args:
        name: of the schedule.
        placement: by stage, its rank.
        microbatches: of the batch.
        held: by rank, the forwards whose backward (and weights) may be outstanding.
        split: backward in two parts.
    """
    stages, ranks = len(placement), max(placement) + 1
    own = [[s for s, rank in enumerate(placement) if rank == r] for r in range(ranks)]
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    over: dict[tuple[str, int, int], int] = {}  # when it is over
    free, holding = [0] * ranks, [0] * ranks
    next_of = {(kind, stage): 0 for kind in "FBIW" for stage in range(stages)}
    left, now = (3 if split else 2) * stages * microbatches, 0
    backward = "I" if split else "B"

    def ready(kind: str, stage: int) -> bool:
        action = Action(kind, stage, next_of[kind, stage])
        return action.microbatch < microbatches and all(
            any(over.get((k, s, m), now + 1) <= now for k in kinds) for kinds, s, m in needs(action, stages)
        )

    while left:
        for rank in range(ranks):
            if free[rank] > now:
                continue
            # Room is left for the way through the rank's later stages: nothing would be freed otherwise.
            room = [s for later, s in enumerate(reversed(own[rank])) if holding[rank] < held[rank] - later]
            choices = [
                *((backward, s) for s in reversed(own[rank])),
                *(("F", s) for s in room),
                *(("W", s) for s in own[rank] if split),
            ]
            chosen = next(((kind, stage) for kind, stage in choices if ready(kind, stage)), None)
            if chosen is None:
                continue
            kind, stage = chosen
            action = Action(kind, stage, next_of[chosen])
            next_of[chosen] += 1
            rows[rank].append(action)
            free[rank] = over[action] = now + (2 if kind == "B" else 1)
            holding[rank] += {"F": 1, "I": 0, "B": -1, "W": -1}[kind]
            left -= 1
        now += 1
        if now > 4 * stages * microbatches + stages:
            raise ConfigError(f"schedule {name}: no order holds so few activations ({held} by rank); use another schedule")
    return Schedule(name, microbatches, placement, tuple(map(tuple, rows)))


def _zb_h1(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    return _zero_bubble("zb_h1", _looped(ranks, 1), microbatches, [ranks - rank for rank in range(ranks)])


def _interleaved_zb(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    held = [(ranks - rank - 1) * 2 + (virtual - 1) * ranks + 1 for rank in range(ranks)]
    return _zero_bubble("interleaved_zb", _looped(ranks, virtual), microbatches, held)


def _zb_v(ranks: int, virtual: int, microbatches: int, group: int | None) -> Schedule:
    return _zero_bubble("zb_v", _v_shaped(ranks), microbatches, [2 * ranks] * ranks)


SCHEDULES: dict[str, Callable[[int, int, int, int | None], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "eager_1f1b": _eager,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "interleaved_zb": _interleaved_zb,
    "zb_v": _zb_v,
}
"""Schedules by name."""
STAGES_OF_A_RANK = {"1f1b": 1, "eager_1f1b": 1, "zb_h1": 1, "zb_v": 2}
"""How many stages a rank must have, where it is not free."""


def build(name: str, ranks: int, virtual: int, microbatches: int, *, group: int | None = None) -> Schedule:
    """A schedule by name.

    Args:
        name: one of SCHEDULES.
        ranks: of the pipeline.
        virtual: stages of each rank.
        microbatches: of the batch, any number.
        group: of an interleaved schedule: microbatches that go through one of a rank's stages before the next one is begun.

    Raises:
        ConfigError: there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if (wanted := STAGES_OF_A_RANK.get(name, virtual)) != virtual:
        raise ConfigError(f"schedule {name} needs virtual_stages: {wanted}, and there are {virtual}")
    made = SCHEDULES[name](ranks, virtual, microbatches, group)
    validate(made)
    return made


# -- simulation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """How a schedule would run.

    Attributes:
        seconds: from the first action to the end of the last.
        spans: rank, action, start and end.
        busy: by rank, the seconds in which it computes.
        peak: by rank, the most stage activations that it holds at once, until their backward, and weights, are over.
        exposed: by how much it is longer than without transfers.
    """

    seconds: float
    spans: tuple[tuple[int, Action, float, float], ...]
    busy: tuple[float, ...]
    peak: tuple[int, ...]
    exposed: float

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they stand idle."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(
    schedule: Schedule,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float | None = None,
    transfer: float = 0.0,
    overlapped: bool = True,
) -> Simulation:
    """Runs a schedule on paper.

    Args:
        schedule: a valid one.
        forward: seconds of a stage's forward of one microbatch.
        backward: of its whole backward.
        weight: of the weights' part of it; half of it by default.
        transfer: of one transfer between two ranks. A rank sends one at a time to each other rank, in the order of its actions.
        overlapped: transfers run beside compute; otherwise the sender stands still until what it sends has gone.
    """
    weight = backward / 2 if weight is None else weight
    cost = {"F": forward, "B": backward, "I": backward - weight, "W": weight}
    free, busy = [0.0] * schedule.ranks, [0.0] * schedule.ranks
    held, peak = [0] * schedule.ranks, [0] * schedule.ranks
    link: dict[tuple[int, int], float] = {}
    here: dict[tuple[str, int, int], float] = {}  # when it is over, for its own stage
    there: dict[tuple[str, int, int], float] = {}  # when the neighbouring stage has it
    spans = []
    for action in _run(schedule)[0]:
        rank, start = schedule.placement[action.stage], free[schedule.placement[action.stage]]
        for kinds, stage, microbatch in needs(action, schedule.stages):
            when = here if stage == action.stage else there
            start = max(start, *(when[kind, stage, microbatch] for kind in kinds if (kind, stage, microbatch) in when))
        end = start + cost[action.kind]
        spans.append((rank, action, start, end))
        busy[rank] += cost[action.kind]
        held[rank] += {"F": 1, "I": 0}.get(action.kind, -1)
        peak[rank] = max(peak[rank], held[rank])
        free[rank] = here[action] = there[action] = end
        target = action.stage + (1 if action.kind == "F" else -1)
        if action.kind != "W" and 0 <= target < schedule.stages and schedule.placement[target] != rank:
            route = rank, schedule.placement[target]
            link[route] = there[action] = max(end, link.get(route, 0.0)) + transfer
            if not overlapped:
                free[rank] = link[route]
    seconds = max(end for *_, end in spans)
    free_of_transfers = simulate(schedule, forward=forward, backward=backward, weight=weight).seconds if transfer else seconds
    exposed = seconds - free_of_transfers
    return Simulation(seconds, tuple(spans), tuple(busy), tuple(peak), exposed)


def draw(schedule: Schedule) -> str:
    """The schedule over time, if transfers are hidden and a backward takes twice as long as a forward; dots are the bubble."""
    width = max(len(str(action)) for row in schedule.actions for action in row) + 1
    lines = [""] * schedule.ranks
    for rank, action, start, end in simulate(schedule).spans:
        lines[rank] = lines[rank].ljust(round(start) * width, ".") + str(action).ljust(round(end - start) * width)
    return "\n".join(f"rank {rank}  {line.rstrip()}" for rank, line in enumerate(lines)) + "\n"
