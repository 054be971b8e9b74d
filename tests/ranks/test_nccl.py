"""The calls of torch.distributed for NCCL, their order and communicators, recorded without a device."""

import weakref

import pytest
import torch
import torch.distributed as dist

from lightning_overlap.ranks import nccl
from lightning_overlap.ranks.announcements import Announcements, TransferError
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.nccl import NcclEngine

RANK, RANKS = 1, (4, 5, 6)  # this process is the second member, with the global rank 5


class Recorder:
    """The interface of torch.distributed that the engine uses."""

    def __init__(self):
        self.calls = []
        self.refused = False

    def work(self, name):
        return RecordedWork(self, name)

    def collective(self, name):
        def call(*arguments, async_op=False, **named):
            communicator = next(a for a in [*arguments, *named.values()] if a in ("reductions", "gathers"))
            rest = [a for a in arguments if isinstance(a, int | list) and not isinstance(a, bool) and a is not communicator]
            self.calls.append((name, communicator, *rest))
            return self.work(name)

        return call

    def batch_isend_irecv(self, ops):
        self.calls.append(("batch", *[(op.kind, op.peer, op.process_group) for op in ops]))
        return [self.work("batch")]


class RecordedWork:
    """A posted operation. The host must not ask whether it is complete, except where it polls."""

    def __init__(self, recorder, name):
        self.recorder, self.name = recorder, name

    def is_completed(self):
        self.recorder.calls.append(("poll", self.name))
        return True

    def wait(self):
        if self.recorder.refused:
            raise RuntimeError("the communicator was aborted")
        self.recorder.calls.append(("stream waits", self.name))


class Operation:
    def __init__(self, operation, x, peer, process_group):
        self.kind, self.peer, self.process_group = operation.__name__, peer, process_group


def isend(x, peer, process_group, tag):
    """Replaced by the recorder; P2POp names it."""


def irecv(x, peer, process_group, tag):
    """As isend."""


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast", "all_to_all_single"):
        monkeypatch.setattr(dist, name, made.collective(name))
    for operation in (isend, irecv):

        def post(x, peer, process_group, tag, name=operation.__name__):
            made.calls.append((name, process_group, peer))
            return made.work(name)

        post.__name__ = operation.__name__
        monkeypatch.setattr(dist, operation.__name__, post)
    monkeypatch.setattr(dist, "P2POp", Operation)
    monkeypatch.setattr(dist, "batch_isend_irecv", made.batch_isend_irecv)
    monkeypatch.setattr(dist, "get_rank", lambda: RANKS[RANK])
    monkeypatch.setattr(nccl.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nccl.torch.cuda, "Stream", lambda: "observer")
    monkeypatch.setattr(NcclEngine, "_recorder", "_dump_fr_trace_json")  # this torch may be without NCCL
    return made


@pytest.fixture
def group(recorder):
    members = Members(RANKS, "test", Announcements())
    return Group(members, NcclEngine(members, "reductions", "gathers"))


EVEN, UNEVEN = [0, 2, 4, 6], [0, 0, 4, 6]


def test_even_pieces_use_the_native_collectives_each_on_its_communicator(group, recorder):
    reduction = group.reduce_scatter(torch.ones(6), EVEN, key=0, label="data.grads[0]", divisor=3)
    gather = group.all_gather(torch.ones(6), EVEN, key=0, label="data.params[0]")
    total = group.all_reduce(torch.ones(6), label="data.norm")
    posted = [("reduce_scatter_tensor", "reductions"), ("all_gather_into_tensor", "gathers"), ("all_reduce", "reductions")]
    assert recorder.calls == posted
    recorder.calls.clear()
    for pending in (gather, reduction, total):
        pending.wait()
        pending.wait()
    # Once each, in the order of the waits, and the host asks nothing.
    assert [name for _, name in recorder.calls] == ["all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"]
    assert {kind for kind, _ in recorder.calls} == {"stream waits"}


@pytest.mark.parametrize(("divisor", "expected"), [(3, [1.0, 1.0]), (6, [1 / 6, 1 / 6]), (None, [1.0, 1.0])])
def test_only_a_divisor_that_is_not_the_size_is_divided_by_afterwards(group, divisor, expected):
    """The recorded reduction leaves ones, as NCCL's mean of ones does."""
    for pending in (
        group.reduce_scatter(torch.ones(6), EVEN, key=0, label="x", divisor=divisor),
        group.all_reduce(torch.ones(2), label="x", divisor=divisor),
    ):
        assert pending.wait().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("bounds", "wire"), [(UNEVEN, None), (EVEN, torch.bfloat16)])
def test_what_has_no_native_collective_is_posted_at_once_receives_first(group, recorder, bounds, wire):
    """Posted one after the other, each rank's receive would block the send that its peer waits for."""
    group.reduce_scatter(torch.ones(6), bounds, key=0, label="x", wire=wire).wait()
    receives = [("irecv", 4, "reductions"), ("irecv", 6, "reductions")]
    sends = [("isend", peer, "reductions") for peer in ((6,) if bounds is UNEVEN else (4, 6))]  # rank 4 has an empty piece
    assert recorder.calls == [("batch", *receives, *sends), ("stream waits", "batch")]


def test_uneven_gathers_are_broadcasts_by_global_rank(group, recorder):
    group.all_gather(torch.ones(6), UNEVEN, key=0, label="x")
    assert recorder.calls == [("broadcast", "gathers", rank) for rank in RANKS]


def test_all_to_all_is_one_collective(group, recorder):
    received = group.all_to_all(torch.ones(5, 2), [0, 1, 4], [2, 1, 0], key=0, label="x").wait()
    assert recorder.calls == [("all_to_all_single", "reductions", [2, 1, 0], [0, 1, 4]), ("stream waits", "all_to_all_single")]
    assert received.shape == (3, 2)


def test_a_hop_goes_by_the_peers_global_rank_and_holds_what_it_sends(group, recorder):
    x = torch.ones(3)
    held = weakref.ref(x)
    coming = group.receive(torch.empty(3), 0, key=7, label="pipeline.x")
    going = group.send(x, 2, key=7, label="pipeline.x")
    del x
    coming.wait()
    going.wait()
    assert recorder.calls[:2] == [("irecv", "reductions", 4), ("isend", "reductions", 6)]
    assert held() is not None, "NCCL lets go of it as soon as a stream waits, which may be another one"
    del going
    assert held() is None


def test_a_blocking_sum_is_polled_so_that_the_rank_hears_of_errors(group, recorder):
    group.sum(torch.ones(1))
    assert recorder.calls == [("all_reduce", "reductions"), ("poll", "all_reduce"), ("stream waits", "all_reduce")]


def test_weights_are_broadcast_without_the_host(group, recorder):
    group.broadcast(torch.ones(1), on_host=False)
    assert recorder.calls == [("broadcast", "reductions", 4), ("stream waits", "broadcast")]


def test_a_failed_wait_names_the_transfer(group, recorder):
    pending = group.all_reduce(torch.ones(1), label="data.norm")
    recorder.refused = True
    with pytest.raises(TransferError, match=r"transfer 'data.norm' of group 'test' between rank 5 and rank \[4, 6\] failed: the"):
        pending.wait()


def test_what_the_modes_are_told(group):
    assert (group.keyed, group.in_one_order, group.sums_sparse) == (False, True, False)
