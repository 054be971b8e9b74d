"""Transfers that were posted and for which nobody waits."""

import datetime
import gc
import itertools
import sys
import threading
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_overlap.ranks import gloo
from lightning_overlap.ranks.world import make_group


def dropped_gather():
    """Rank 0 drops a gather before rank 1 posts it. What does the next gather with its key bring?"""
    rank = dist.get_rank()
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=20))
    try:
        for value in (1.0, 2.0):
            if rank == 1 and value == 1.0:
                dist.barrier()
            x = torch.full((2,), -1.0)
            x[rank] = value
            pending = group.all_gather(x, [0, 1, 2], key=0, label="gather")
            if value == 1.0:
                pending._waiter.settled.wait()  # a thread has posted the receive
                del pending, x
                gc.collect()
                if rank == 0:
                    dist.barrier()
        return pending.wait().tolist()
    finally:
        group.close()


def test_a_gather_that_nobody_waits_for_takes_no_data_of_the_next_one(world):
    assert world(2).run(dropped_gather) == [[2.0, 2.0], [2.0, 2.0]]


def ended(group, before=None):
    """What the end of a group says, and its threads that are left. The rank ``before`` ends it while the other still has it."""
    if before is not None and group.rank != before:
        dist.barrier()
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(gloo, "CLOSE_TIMEOUT", 0.2):
        warnings.simplefilter("always")
        group.close()
    if group.rank == before:
        dist.barrier()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{group.name}.")]
    return [str(each.message).partition(" (")[0] for each in caught], left


def dropped_receive():
    """Rank 0 drops a receive for which rank 1 sends nothing. Returns what it received later, and how the group ended."""
    group, rank = make_group([[0, 1]], "half", datetime.timedelta(minutes=10)), dist.get_rank()
    if rank == 0:
        dropped = group.receive(torch.zeros(2), 1, key=0, label="never")
        dropped._waiter.settled.wait()  # a thread has posted it
        del dropped
        pending = group.receive(torch.zeros(2), 1, key=1, label="next")
    else:
        pending = group.send(torch.ones(2), 0, key=1, label="next")
    return pending.wait().tolist(), *ended(group, before=0)


def dropped_in_gather():
    """Rank 0 drops a gather that rank 1 never posts: neither its receives nor its sends complete."""
    group = make_group([[0, 1]], "half", datetime.timedelta(minutes=10))
    if dist.get_rank() == 0:
        dropped = group.all_gather(torch.zeros(2), [0, 1, 2], key=0, label="never")
        dropped._waiter.settled.wait()
        del dropped
    return ended(group, before=0)


def test_a_transfer_that_never_comes_holds_nothing_up_and_its_group_ends_with_a_word(own_world):
    told = "rank 0 ends group 'half' without the transfers never"
    assert own_world.run(dropped_receive) == [([1.0, 1.0], [told], []), ([], [], [])]
    assert own_world.run(dropped_in_gather) == [([told], []), ([], [])]


def slow_data():
    """Rank 0 drops a receive, for which rank 1 sends when rank 0 has waited longer than the limit. What does the group's end say?"""
    group, rank, calls = make_group([[0, 1]], "slow", datetime.timedelta(minutes=10)), dist.get_rank(), itertools.count(1)

    def moved(engine):
        number = next(calls)
        if number == 3 * gloo.CHECKS and rank == 0:
            dist.barrier()
        return number

    with mock.patch.object(gloo.GlooEngine, "bytes_moved", moved):
        if rank == 0:
            dropped = group.receive(torch.zeros(2), 1, key=0, label="late")
            dropped._waiter.settled.wait()
            del dropped
        else:
            dist.barrier()
            group.send(torch.ones(2), 0, key=0, label="late").wait()
        return ended(group)


def test_a_group_does_not_end_while_its_data_moves(own_world):
    assert own_world.run(slow_data) == [([], []), ([], [])]


def moved_bytes():
    """The bytes of the group's connections by 1000 sent ones, on each rank."""
    group, rank = make_group([[0, 1]], "counted", datetime.timedelta(seconds=30)), dist.get_rank()
    before = group._engine.bytes_moved()
    x = torch.zeros(1000, dtype=torch.uint8)
    (group.receive(x, 1, key=0, label="x") if rank == 0 else group.send(x, 0, key=0, label="x")).wait()
    group.barrier()
    moved = group._engine.bytes_moved() - before
    group.close()
    return moved


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's tcp_info is read on Linux only")
def test_the_bytes_of_connections_are_counted(world):
    assert all(1000 <= moved < 4000 for moved in world(2).run(moved_bytes))
