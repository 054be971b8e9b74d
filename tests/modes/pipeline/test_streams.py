"""What NCCL does with the order in which a pipeline posts: a group's transfers run one after the other on each rank."""

from typing import Any

import pytest
import torch

from lightning_overlap.modes.pipeline.transfers import Form, KnownForms, PipelineTransfers, channel_kinds, channel_name, hops
from lightning_overlap.steps.named_schedules import SCHEDULES, build
from lightning_overlap.steps.runner import Runner
from lightning_overlap.steps.schedule import Schedule

FORMS = (Form((0,), torch.float32, True),)
Event = tuple[Any, ...]


class Recorder:
    """One rank: a group of it, and what its actions compute. Writes down what is posted, waited for and computed."""

    in_one_order = True

    def __init__(self, rank: int, stages: int, events: list[Event], name: str = "") -> None:
        self.rank, self.stages, self.events, self.name = rank, stages, events, name

    def _post(self, source: int, target: int, key: int) -> Any:
        transfer = (self.name, source, target, key)
        self.events.append(("post", *transfer))

        def wait(_: Any) -> torch.Tensor:
            self.events.append(("wait", *transfer))
            return torch.empty(0)

        return type("Posted", (), {"arrived": lambda _: False, "wait": wait})()

    def send(self, x: torch.Tensor, to: int, *, key: int, label: str) -> Any:
        return self._post(self.rank, to, key)

    def receive(self, x: torch.Tensor, source: int, *, key: int, label: str) -> Any:
        return self._post(source, self.rank, key)

    def forward(self, stage: int, *_: Any) -> Any:
        self.events.append(("compute",))
        return None if stage == self.stages - 1 else [torch.empty(0, requires_grad=True)]

    def backward(self, action: Any, _: Any) -> Any:
        self.events.append(("compute",))
        return [] if action.stage == 0 else [torch.empty(0)]

    def weights(self, *_: Any) -> None:
        self.events.append(("compute",))


def posted(schedule: Schedule, prefetch: int | None, *, new: bool = False) -> list[list[Event]]:
    """By rank, what its main thread does in a step whose forms are known, and whose kernels are too unless it is ``new``."""
    ranks = []
    for rank in range(schedule.ranks):
        events: list[Event] = []
        kinds = channel_kinds(schedule.placement)
        groups: Any = {kind: Recorder(rank, schedule.stages, events, channel_name(kind, "nccl")) for kind in kinds}
        known = {(stage, 0) for stage in range(schedule.stages)}
        forms = KnownForms(dict.fromkeys(known, FORMS), known)
        transfers = PipelineTransfers(schedule, rank, groups, forms, torch.device("cpu"), prefetch, [1] * schedule.stages)
        runner = Runner(schedule, rank, transfers)
        for _ in range(1 if new else 2):
            events.clear()
            transfers.start_batch([0] * schedule.microbatches)
            runner.run(Recorder(rank, schedule.stages, events))
        ranks.append(events)
    return ranks


def comes_to_an_end(ranks: list[list[Event]]) -> bool:
    """Whether the device does it all. A transfer needs both ends; each begins it when all is over that stands before it in its group,
    and what was computed or waited for before it was posted."""
    begun: list[set[int]] = [set() for _ in ranks]
    done: list[set[int]] = [set() for _ in ranks]
    place = [{event[1:]: i for i, event in enumerate(events) if event[0] == "post"} for events in ranks]
    moved = True
    while moved:
        moved = False
        for rank, events in enumerate(ranks):
            free = dict.fromkeys({event[1] for event in events if event[0] == "post"}, True)
            stream = True  # whether all that is computed and waited for so far is over
            for i, event in enumerate(events):
                if event[0] == "post":
                    if free[event[1]] and stream:
                        begun[rank].add(i)
                    other = event[2] if event[2] != rank else event[3]
                    over = i in begun[rank] and place[other][event[1:]] in begun[other]
                    free[event[1]] = over
                else:
                    stream = stream and (event[0] == "compute" or place[rank][event[1:]] in done[rank])
                    over = stream
                if over and i not in done[rank]:
                    done[rank].add(i)
                    moved = True
    return all(len(found) == len(events) for found, events in zip(done, ranks, strict=True))


@pytest.mark.parametrize("prefetch", [None, 1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_transfer_stands_behind_one_that_waits_for_it(name: str, prefetch: int | None) -> None:
    for size, microbatches in ((2, 4), (3, 6), (4, 8)):
        chunks = 2 if name in ("interleaved", "interleaved_zb", "zb_v", "dualpipev") else 1
        assert comes_to_an_end(posted(build(name, size, chunks, microbatches), prefetch)), (size, microbatches)


def test_nothing_is_posted_ahead_while_kernels_are_new() -> None:
    """Loading one may wait for what runs: two ranks that load would wait for each other's receives."""
    schedule = build("1f1b", 2, 1, 4)
    assert posted(schedule, 2, new=True) == posted(schedule, None)
    assert posted(schedule, 2) != posted(schedule, None)


def test_connections_are_made_for_every_hop() -> None:
    """Of a rank's hops in a group, both ends make them at once: a first transfer waits for the other end."""
    placement = (0, 1, 2, 0, 1, 2)
    found = {way: hops(placement, way) for way in channel_kinds(placement)}
    assert found[("F", True, 0)] == {(0, 1)}
    assert found[("F", False, 0)] == {(2, 0)}
    assert found[("B", False, 1)] == {(1, 0)}
    assert sum(map(len, found.values())) == 6


def test_neighbours_hops_have_groups_of_their_own() -> None:
    """Rank 1 would have its first send stand behind the third receive, which rank 0 sends after the second backward."""
    in_one_group = [
        [(e[0], str(e[1]).rsplit(".", 1)[0], *e[2:]) if len(e) > 1 else e for e in events]
        for events in posted(build("1f1b", 4, 1, 8), 2)
    ]
    assert not comes_to_an_end(in_one_group)
