"""The schedules that have a name, built for any numbers of ranks, stages and microbatches. Standard library only.

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

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from lightning_overlap.decision import ConfigError
from lightning_overlap.steps.schedule import Action, Schedule, validate

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
