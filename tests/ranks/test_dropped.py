"""Transfers that were posted and for which nobody waits."""

import datetime
import gc
import threading
import warnings
from unittest import mock

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


def gather_that_never_comes():
    """Rank 0 drops a gather that rank 1 never posts. Returns what the end of the group says, and its threads that are left."""
    rank = dist.get_rank()
    group = make_group([[0, 1]], "half", datetime.timedelta(minutes=10))
    completed = threading.Event()
    try:
        if rank == 0:
            dropped = group.all_gather(torch.zeros(2), [0, 1, 2], key=0, label="never")
            dropped._waiter.settled.wait()
            del dropped
        gathered = group.all_gather(torch.full((2,), float(rank)), [0, 1, 2], key=1, label="next")
        threading.Thread(target=lambda: (gathered.wait(), completed.set()), daemon=True).start()
        assert completed.wait(20)
    finally:
        with warnings.catch_warnings(record=True) as caught, mock.patch.object(gloo, "CLOSE_TIMEOUT", 0.5):
            warnings.simplefilter("always")
            group.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("half.")]
    return [str(each.message) for each in caught], left


def test_a_gather_whose_sender_never_comes_holds_nothing_up_and_the_group_ends_with_a_word(world):
    (told, left), *second = world(2).run(gather_that_never_comes)
    assert [message.split(" (")[0] for message in told] == ["rank 0 ends group 'half' without the transfers never"]
    assert not left
    assert second == [([], [])]
