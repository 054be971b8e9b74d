import datetime
import os
import signal
import socket
import sys
import threading
import weakref
from contextlib import suppress
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_overlap.ranks import gloo
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.gloo import SEND_BUFFER
from lightning_overlap.ranks.link import Urgency
from lightning_overlap.ranks.sockets import _duplicate, _sockets
from lightning_overlap.ranks.world import WORLD, make_group


def transfers(bounds, wire):
    size, rank = dist.get_world_size(), dist.get_rank()
    group = make_group([list(range(size))], "test", datetime.timedelta(seconds=30))
    try:
        x = torch.arange(bounds[-1], dtype=torch.float32) * (rank + 1) / 3
        own = group.reduce_scatter(x.clone(), bounds, key=0, label="reduce", divisor=size, wire=wire).wait().clone()
        gathered = torch.full((bounds[-1],), -1.0)
        gathered[bounds[rank] : bounds[rank + 1]] = rank
        group.all_gather(gathered, bounds, key=1, label="gather").wait()
        group.start_step()
        total = group.all_reduce(torch.ones(3), label="sum").wait()
        return own.tolist(), gathered.tolist(), total.tolist()
    finally:
        group.close()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_transfers(world, size, uneven, wire):
    bounds = [0, 0, 7, 7, 12][: size + 1] if uneven else [3 * r for r in range(size + 1)]
    results = world(size).run(transfers, bounds, wire)
    mean = torch.arange(bounds[-1]) * (size + 1) / 2 / 3
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if wire is None else {"rtol": 4e-3, "atol": 4e-3}  # bf16 keeps 8 bits
    owners = [r for r in range(size) for _ in range(bounds[r], bounds[r + 1])]
    for rank, (own, gathered, total) in enumerate(results):
        torch.testing.assert_close(torch.tensor(own), mean[bounds[rank] : bounds[rank + 1]], **tolerance)
        assert gathered == owners
        assert total == [size] * 3


def rows_for_all(table):
    """Each rank sends rows that name their sender, receiver and number."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = make_group([list(range(size))], "test", datetime.timedelta(seconds=30), gathers=False)
    try:
        sent = [[10.0 * rank + receiver, number] for receiver in range(size) for number in range(table[rank][receiver])]
        x = torch.tensor(sent).reshape(-1, 2)
        receive_sizes = [table[sender][rank] for sender in range(size)]
        several = [group.all_to_all(x + 100 * key, table[rank], receive_sizes, key=key, label="experts.rows") for key in range(3)]
        got = [(pending.wait() - 100 * key).tolist() for key, pending in reversed(list(enumerate(several)))]
        return got, [[10.0 * sender + rank, number] for sender in range(size) for number in range(receive_sizes[sender])]
    finally:
        group.close()


@pytest.mark.parametrize(
    "table",
    [
        [[1, 2], [3, 0]],
        [[0, 0], [0, 0]],
        [[0, 5], [0, 0]],
        [[1, 0, 2], [0, 0, 0], [4, 1, 1]],
        [[1, 2, 0, 3], [0, 0, 0, 0], [2, 2, 2, 2], [0, 7, 0, 0]],
    ],
)
def test_all_to_all(world, table):
    for got, expected in world(len(table)).run(rows_for_all, table):
        assert got == [expected] * 3


def test_all_to_all_names_sizes_that_do_not_fit(world):
    assert world(2).run(refused_sizes) == [True] * 2


def refused_sizes():
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=30), gathers=False, threads=False)
    try:
        with pytest.raises(ValueError, match=r"of 3 rows got send_sizes \[1, 1\]"):
            group.all_to_all(torch.ones(3, 1), [1, 1], [1, 1], key=0, label="x")
        return True
    finally:
        group.close()


def divided(divisor):
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=30), gathers=False)
    try:
        total = group.all_reduce(torch.full((2,), 3.0), label="x", divisor=divisor).wait()
        piece = group.reduce_scatter(torch.full((4,), 3.0), [0, 2, 4], key=0, label="y", divisor=divisor).wait()
        return total.tolist(), piece.tolist()
    finally:
        group.close()


@pytest.mark.parametrize(("divisor", "result"), [(None, 6.0), (2, 3.0), (4, 1.5)])
def test_a_sum_is_divided_by_its_divisor(world, divisor, result):
    assert world(2).run(divided, divisor) == [([result] * 2, [result] * 2)] * 2


def gathers_before_sums(background):
    """The thread that sends a gather's chunks sees a reduction's bytes on the link, and later that they have gone."""
    rank = dist.get_rank()
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=10), background=background)
    try:
        for _ in range(20):
            looks = iter([False])
            group._engine.sockets.is_idle = lambda looks=looks: next(looks, True)
            x = torch.full((2,), -1.0)
            x[rank] = rank
            gather = group.all_gather(x, [0, 1, 2], key=0, label="gather")
            total = group.all_reduce(torch.ones(1), label="sum")
            assert gather.wait().tolist() == [0, 1]
            assert total.wait().item() == 2
    finally:
        group.close()


@pytest.mark.parametrize("background", [Urgency.REDUCTION, Urgency.GATHER])
def test_a_gather_is_not_forgotten_behind_a_sum(world, background):
    world(2).run(gathers_before_sums, background)


def lagging_rank(background):
    """Rank 1 is one step ahead: it waits for a reduction of rank 0, which waits for a gather of the earlier step."""
    rank = dist.get_rank()
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=20), background=background)
    try:
        x, grads = torch.full((1 << 21,), float(rank)), torch.ones(8)
        hold = group.reduce_scatter(torch.ones(8), [0, 4, 8], key=5, label="hold") if rank else None
        gather = group.all_gather(x, [0, 1 << 20, 1 << 21], key=1, label="gather")
        group.start_step()
        if rank == 0:
            gather.wait()
            hold = group.reduce_scatter(torch.ones(8), [0, 4, 8], key=5, label="hold")
        assert hold is not None
        hold.wait()
        gather.wait()
        group.reduce_scatter(grads, [0, 4, 8], key=0, label="reduce").wait()
        return x[0].item(), x[-1].item()
    finally:
        group.close()


@pytest.mark.parametrize("background", [Urgency.REDUCTION, Urgency.GATHER])
def test_a_rank_that_is_behind_is_not_deadlocked(world, background):
    assert world(2).run(lagging_rank, background) == [(0.0, 1.0)] * 2


def send_buffers():
    """This process's connections, and the sizes of their send buffers."""
    sizes = {}  # by inode: a connection may have several descriptors
    for descriptor, inode in _sockets():
        if connection := _duplicate(descriptor):
            with connection, suppress(OSError):  # a socket that listens has no other end
                connection.getpeername()
                sizes[inode] = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return sizes


def test_a_descriptor_of_another_file_is_not_kept():
    read, write = os.pipe()
    before = os.listdir("/proc/self/fd")
    assert _duplicate(read) is None
    assert os.listdir("/proc/self/fd") == before
    for end in (read, write):
        os.close(end)


def bounded_connections():
    """By kind of group, the number of its connections, and how many of them have small send buffers."""
    kinds = []
    for background in (Urgency.REDUCTION, Urgency.GATHER, None):
        before = send_buffers()
        group = make_group([list(range(dist.get_world_size()))], "test", datetime.timedelta(seconds=30), background=background)
        try:
            made = {connection: size for connection, size in send_buffers().items() if connection not in before}
            kinds.append((len(made), sum(size == 2 * SEND_BUFFER for size in made.values())))
        finally:
            group.close()
    return kinds


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed, and send buffers bounded, on Linux only")
def test_background_connections_alone_have_small_send_buffers(world):
    for kinds in world(4).run(bounded_connections):
        assert kinds == [(6, 6), (6, 3), (6, 0)]  # to each peer one for gathers and one for the rest


def background_beside_foreground():
    """Data of a background group is posted first. Which kinds of data are on the link is planted. Tells what has started when."""
    rank, bounds = dist.get_rank(), [0, 1 << 17, 1 << 18]
    limit = datetime.timedelta(seconds=20)
    late, first = (
        make_group([[0, 1]], name, limit, background=Urgency.REDUCTION if name == "late" else None) for name in ("late", "first")
    )
    busy = {first._engine.sockets, late._engine.sockets}
    for sockets in list(busy):
        sockets.is_idle = lambda sockets=sockets: sockets not in busy
    try:
        weights = torch.full((1 << 18,), -1.0)
        weights[bounds[rank] : bounds[rank + 1]] = rank
        gather = late.all_gather(weights, bounds, key=0, label="gather")
        sums = late.reduce_scatter(torch.full((1 << 18,), 1.0 + rank), bounds, key=0, label="reduce")
        events = []

        def turn(*freed):
            """Another kind of data has gone. Foreground data goes there and back, so that both ranks are as far."""
            busy.difference_update(freed)
            for pending in (sums, gather)[: len(events)]:
                pending.wait()
            for _ in range(3):
                rows = first.all_to_all(torch.ones(2) * rank, [1, 1], [1, 1], key=0, label="rows").wait()
            events.append((sums.transfer.started is not None, gather.transfer.started is not None))
            return rows.tolist()

        rows = [turn(), turn(first._engine.sockets), turn(late._engine.sockets)]
        return rows, events, sums.wait().unique().tolist(), [part.unique().tolist() for part in weights.chunk(2)]
    finally:
        busy.clear()
        late.close()
        first.close()


@pytest.mark.skipif(sys.platform != "linux", reason="whether a link is idle is known on Linux only")
def test_background_data_waits_for_other_data_and_gathers_wait_for_reductions(world):
    for rows, events, sums, weights in world(2).run(background_beside_foreground):
        assert rows == [[0, 1]] * 3
        assert events == [(False, False), (True, False), (True, True)]
        assert (sums, weights) == ([3], [[0], [1]])


def ahead_of_a_peer(background):
    """The first rank waits for a reduction that its peer posts only after a gather of the same step."""
    rank, bounds = dist.get_rank(), [0, 2, 4]
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=10), background=background)
    try:
        group.start_step()
        x, weights = torch.full((4,), float(rank)), torch.full((4,), -1.0)
        weights[bounds[rank] : bounds[rank + 1]] = rank
        if rank == 0:
            reduce = group.reduce_scatter(x, bounds, key=0, label="reduce")
        gather = group.all_gather(weights, bounds, key=1, label="gather").wait().tolist()
        if rank == 1:
            reduce = group.reduce_scatter(x, bounds, key=0, label="reduce")
        return gather, reduce.wait().tolist()
    finally:
        group.close()


@pytest.mark.skipif(sys.platform != "linux", reason="whether a link is idle is known on Linux only")
@pytest.mark.parametrize("background", [Urgency.REDUCTION, Urgency.GATHER])
def test_gathers_are_not_held_back_for_a_reduce_that_waits_for_its_peer(world, background):
    for gather, reduce in world(2).run(ahead_of_a_peer, background):
        assert gather == [0, 0, 1, 1]
        assert reduce == [1, 1]


def handed_on():
    """A tensor goes round, several under way at once, in any order of keys."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = make_group([list(range(size))], "test", datetime.timedelta(seconds=30), gathers=False)
    try:
        before, after = (rank - 1) % size, (rank + 1) % size
        buffers = [torch.empty(1000) for _ in range(3)]
        receives = [group.receive(x, before, key=key, label="x") for key, x in enumerate(buffers)]
        sends = [group.send(torch.full((1000,), 10.0 * rank + key), after, key=key, label="x") for key in (2, 0, 1)]
        got = [pending.wait()[0].item() for pending in reversed(receives)]
        for pending in sends:
            pending.wait()
        return got, all(pending.arrived() for pending in sends), sends[0].transfer.ranks
    finally:
        group.close()


@pytest.mark.parametrize("size", [2, 4])
def test_point_to_point(world, size):
    for rank, (got, arrived, ranks) in enumerate(world(size).run(handed_on)):
        assert got == [10.0 * ((rank - 1) % size) + key for key in (2, 1, 0)]
        assert arrived
        assert ranks == (rank, (rank + 1) % size)


def let_go(last):
    """Runs the last transfers of a group, after which its threads are idle."""
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=30), gathers=False)
    try:
        peer, used = 1 - dist.get_rank(), [torch.ones(1000), torch.ones(1000)]
        gone = [threading.Event() for _ in used]
        for x, event in zip(used, gone, strict=True):
            weakref.finalize(x, event.set)
        if last == "sum":
            assert group.all_reduce(used[0], label="sum").wait()[0] == 2
        else:
            pending = group.receive(used[0], peer, key=0, label="received")
            group.send(used[1], peer, key=0, label="sent")
            pending.wait()
            del pending
        del x
        used.clear()
        return all(event.wait(10) for event in gone)
    finally:
        group.close()


@pytest.mark.parametrize("last", ["sum", "send"])
def test_tensors_that_have_gone_or_come_are_let_go_of(world, last):
    assert world(2).run(let_go, last) == [True] * 2


def halfway():
    """The second rank is killed during a transfer for which the first rank waits."""
    group = make_group([[0, 1]], "test", datetime.timedelta(minutes=5))
    x = torch.zeros(1 << 28)
    if dist.get_rank() == 1:
        threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with mock.patch.object(gloo, "CLOSED_CONNECTION_GRACE", 0.5), pytest.raises(TransferError) as caught:
        group.reduce_scatter(x, [0, 1 << 27, 1 << 28], key=0, label="large").wait()
    group.abandon()
    return str(caught.value)


def test_a_peer_that_dies_in_the_middle_of_a_transfer_is_noticed(own_world):
    told = own_world.first(halfway)
    assert told.startswith("transfer 'large' of group 'test' between rank 0 and rank 1 failed")
    own_world.workers[1].join(10)
    assert own_world.workers[1].exitcode == -signal.SIGKILL


def connections_of_others():
    """Another thread connects to another server while a group is made."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    loggers = []

    def new_group(*arguments, **kwargs):
        loggers.append(socket.create_connection(server.getsockname()))
        return plain(*arguments, **kwargs)

    plain = dist.new_group
    before = socket.create_connection(server.getsockname())
    with mock.patch.object(dist, "new_group", new_group):
        group = make_group([list(range(dist.get_world_size()))], "test", datetime.timedelta(seconds=30))
    try:
        asked = [c.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for c in [before, *loggers]]
        held = [sockets._held for sockets in (group._engine.sockets, group._engine.gather_sockets)]
        ours = [c.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for connections in held for c in connections]
        return asked, ours
    finally:
        group.close()
        for each in (before, server, *loggers):
            each.close()


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed on Linux only")
def test_connections_of_loggers_are_left_alone(world):
    for asked, ours in world(2).run(connections_of_others):
        assert asked == [0, 0, 0]
        assert ours == [1, 1]


def free_sizes(pool):
    """The elements of a pool's free buffers on the CPU, in ascending order: takes them until a new one comes, and gives them back."""
    taken = [pool.take(1, torch.float32, torch.device("cpu"))]
    while taken[-1].numel() > 1:
        taken.append(pool.take(1, torch.float32, torch.device("cpu")))
    for buffer in taken[:-1]:
        pool.give_back(buffer)
    return [buffer.numel() for buffer in taken[:-1]]


def free_buffers():
    """The free buffers of a group after transfers of pieces of several sizes."""
    group = make_group([[0, 1]], "test", datetime.timedelta(seconds=30), gathers=False, threads=False)
    try:
        sizes = []
        for bounds in ([0, 0, 8], [0, 4, 8], [0, 0, 8], [0, 6, 8], [0, 4, 8]):
            group.reduce_scatter(torch.ones(8), bounds, key=0, label="reduce").wait()
            sizes.append(free_sizes(group._pool))
        meta = group._pool.take(4, torch.float32, torch.device("meta"))
        group._pool.give_back(torch.empty(64))
        return sizes, meta.device.type, group._pool.take(4, torch.float32, torch.device("cpu")).numel()
    finally:
        group.close()


def test_buffers_are_kept_by_device_and_the_smallest_that_fits_is_taken(world):
    (first, device, smallest), (second, *_) = world(2).run(free_buffers)
    assert first == [[], [4], [4], [4, 6], [4, 6]]
    assert second == [[8], [8], [8], [8], [8]]
    assert (device, smallest) == ("meta", 4)


def never_comes():
    """One rank fails before a group, for which the other one waits."""
    WORLD.announcements.start()
    WORLD.announcements.interval = 0.1
    WORLD.assemble(datetime.timedelta(seconds=30), datetime.timedelta(seconds=30))
    try:
        if dist.get_rank() == 1:
            WORLD.announcements.announce(ValueError("the user's"))
        else:
            with pytest.raises(TransferError) as caught:
                make_group([[0, 1]], "test", datetime.timedelta(seconds=30))
            return str(caught.value)
    finally:
        WORLD.abandon()
        WORLD.announcements.end()


def test_who_waits_for_a_group_hears_why_nobody_comes(own_world):
    assert own_world.run(never_comes) == ["rank 1 has failed: ValueError: the user's", None]


def never_sends():
    """One rank fails before a transfer of a group whose threads have ended, for which the other one waits."""
    WORLD.announcements.start()
    WORLD.announcements.interval = 0.1
    WORLD.assemble(datetime.timedelta(seconds=30), datetime.timedelta(seconds=30))
    group = make_group([[0, 1]], "stopped", datetime.timedelta(minutes=30))
    group.stop()
    try:
        if dist.get_rank() == 1:
            WORLD.announcements.announce(ValueError("the user's"))
        else:
            with pytest.raises(TransferError) as caught:
                group.all_reduce(torch.ones(1), label="sum").wait()
            return str(caught.value)
    finally:
        WORLD.abandon()
        WORLD.announcements.end()


def test_a_wait_in_a_stopped_group_raises_the_error_of_the_sender(own_world):
    assert own_world.run(never_sends) == ["rank 1 has failed: ValueError: the user's", None]
