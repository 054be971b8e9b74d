"""The thread that sends chunks: in which order, and when."""

import threading

import pytest
import torch

from lightning_overlap.ranks.chunks import CHUNK_BYTES, WINDOW, Chunk, ChunkSender, chunks_of
from lightning_overlap.ranks.transfer import Transfer


class Whole:
    """A transfer that counts its chunks."""

    def __init__(self, label):
        self.transfer = Transfer(label, 0, 0, (0, 1), 0.0)
        self.errors = []
        self.done = threading.Event()

    def chunk_done(self, error):
        self.errors.append(error)
        self.done.set()


class Wire:
    """What has been posted; nothing is sent before ``open``."""

    def __init__(self, *, free=True):
        self.free, self.posted, self.open = free, [], threading.Event()
        self.under_way, self.most = 0, 0
        self.sender = ChunkSender("test", lambda: self.free, self.post)

    def post(self, transfer, chunk):
        if chunk.peer < 0:
            raise ConnectionError("no peer")
        self.posted.append((transfer.transfer.label, chunk.tag))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return self.wait

    def wait(self):
        self.open.wait()
        self.under_way -= 1

    def send(self, label, *tags, peer=0, priority=0):
        whole = Whole(label)
        self.sender.send(whole, [Chunk(torch.empty(1), peer, tag) for tag in tags], priority)
        return whole


@pytest.fixture
def wire():
    made = Wire(free=False)
    yield made
    made.open.set()
    made.sender.close(drop=False)
    made.sender.thread.join(10)
    assert not made.sender.thread.is_alive()


def test_both_ends_split_alike_and_all_peers_get_their_first_chunk_first():
    step = CHUNK_BYTES // 8
    x, y = torch.arange(2 * step + 3, dtype=torch.float64), torch.arange(step, dtype=torch.float64)
    chunks = chunks_of([(2, x), (1, y), (3, x[:0])], key=5)
    assert [(c.peer, len(c.tensor)) for c in chunks] == [(2, step), (1, step), (2, step), (2, 3)]
    assert [(c.peer, c.tag) for c in chunks] == [(1 + (i != 1), chunks[0].tag + max(i - 1, 0)) for i in range(4)]
    assert torch.equal(torch.cat([c.tensor for c in chunks if c.peer == 2]), x)
    assert chunks_of([(0, x)], key=6)[0].tag > chunks[-1].tag


def test_the_earliest_step_then_the_most_urgent_then_the_first_goes_first(wire):
    wire.send("second", 1, 2, priority=2)
    wire.send("first", 3, priority=1)
    wire.sender.start_step()
    last = wire.send("next step", 4, priority=0)
    wire.send("third", 5, priority=1)
    wire.open.set()
    assert wire.posted == [], "more urgent data is on the link"
    wire.free = True
    assert last.done.wait(10)
    wire.sender.close(drop=False)
    wire.sender.thread.join(10)
    assert wire.posted == [("first", 3), ("second", 1), ("second", 2), ("next step", 4), ("third", 5)]


def test_few_chunks_are_under_way_and_a_failed_one_is_told_of(wire):
    whole = wire.send("x", *range(WINDOW + 3))
    late = wire.send("late", 9, peer=-1)
    wire.free = True
    wire.open.set()
    assert late.done.wait(10)
    assert len(wire.posted) == WINDOW + 3
    assert wire.most == WINDOW
    assert whole.errors == [None] * (WINDOW + 3)
    assert isinstance(late.errors[0], ConnectionError)


def test_what_is_dropped_is_told_of(wire):
    whole = wire.send("x", 1, 2)
    wire.sender.close(drop=True)
    assert [type(error) for error in whole.errors] == [ConnectionError] * 2
    assert wire.posted == []
