"""The world of a rehearsal: its group of all ranks, and the messages between players."""

import pickle
import queue
import threading
from datetime import timedelta

from lightning_overlap.ranks.clock import Clock
from lightning_overlap.ranks.rehearsal import Players, RehearsedWorld
from lightning_overlap.ranks.world import WORLD, all_gather_objects, everyone


def test_the_group_of_all_ranks_is_made_once():
    turn = threading.Lock()
    turn.acquire()
    rehearsed = RehearsedWorld(Players([2], 4, 0, [queue.SimpleQueue()], turn, 0), 4, "gloo", Clock())
    with rehearsed.running():
        first = everyone()
        assert (first.size, first.rank) == (4, 2)
        assert all_gather_objects("hidden") == ["hidden"] * 4
        assert everyone() is first
        assert first in WORLD.groups
        WORLD.assemble(timedelta(minutes=5), timedelta(minutes=5))
        second = everyone()
        assert second is not first
        assert everyone() is second
    assert WORLD.connector is None
    assert WORLD._everyone is None


def test_messages_of_one_subject_come_in_the_order_in_which_they_were_sent():
    inboxes = [queue.SimpleQueue(), queue.SimpleQueue()]
    turn = threading.Lock()
    turn.acquire()
    sender, receiver = (Players([0, 1], 2, player, inboxes, turn, session=1) for player in range(2))
    inboxes[1].put((0, (0, "number"), pickle.dumps("of an earlier rehearsal")))
    for subject, message in (("number", 1), ("number", 2), ("flag", True)):
        sender.send(1, subject, message)
    sender.fail(RuntimeError("a message is missing"))  # is read if one is, in place of waiting for ever
    assert receiver.receive(0, "flag") is True
    assert [receiver.receive(0, "number") for _ in range(2)] == [1, 2]
    assert not receiver._mail
    assert turn.locked()
