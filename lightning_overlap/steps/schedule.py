"""Pipeline schedules as data: the order of the forwards and backwards that each rank computes. Standard library only.

A batch passes the stages in microbatches. A schedule decides which microbatch a rank takes next. This order decides how long ranks are
idle (the bubble) and how many microbatches' activations they hold.

    1f1b, two ranks, four microbatches
    rank 0   F0.0 F0.1           B0.0 F0.2      B0.1 F0.3      B0.2      B0.3
    rank 1        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3

In every schedule each stage runs its forwards, its backwards and its weights' gradients in the order of the microbatches, so that
gradients are the same sums.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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
