"""Times of a device, whose events a stand-in of CUDA's gives."""

import contextlib
import itertools
import time

import pytest
import torch

from lightning_overlap.ranks.clock import Clock, DeviceClock, Marks, Timeline
from lightning_overlap.ranks.group import Transfer


@pytest.fixture
def device(monkeypatch):
    """Each event happens a millisecond after the one before, as the device sees it."""
    ticks = itertools.count(7)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(ticks)

        def synchronize(self):
            assert self.at

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


def test_a_devices_stamps_are_read_on_the_hosts_clock(device):
    clock = DeviceClock()
    before = time.perf_counter()
    clock.start()
    after = time.perf_counter()
    times = [clock.read(stamp) for stamp in (clock.now(), clock.now())]
    assert times[1] - times[0] == pytest.approx(0.001)
    assert before <= times[0] - 0.001 <= after


def test_a_transfer_gets_the_devices_times(device):
    class Work:
        waited = 0

        def wait(self):
            self.waited += 1

    clock, work = DeviceClock(), Work()
    clock.start()
    marks = Marks(clock, [(work, 0)], None)
    assert work.waited == 1, "the stream beside waits, so that it knows the end"
    transfer = Transfer("data.grads[0]", 0, 8, (0, 1), posted=1.0, marks=marks)
    transfer.read()
    assert transfer.waited is None
    assert transfer.done - transfer.posted == pytest.approx(0.001)
    marks.waited(marks.now())
    transfer.read()
    times = [transfer.posted, transfer.done, *transfer.waited]
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([0.001] * 3)
    assert transfer.started == transfer.posted
    assert transfer.marks is None


def test_a_timeline_tells_what_was_done_when():
    line = Timeline(Clock())
    with line.during("F0.0"):
        start = line.clock.now()
    line.add("B0.0", start)
    (first, second), empty = line.take(), line.take()
    assert (first[0], second[0], empty) == ("F0.0", "B0.0", [])
    assert first[1] <= start == second[1] <= first[2] <= second[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_a_span_covers_what_the_stream_does():
    line = Timeline(DeviceClock())
    line.clock.start()
    x = torch.randn(4096, 4096, device="cuda")
    with line.during("multiply"):
        for _ in range(20):
            x = x @ x / 4096
    told = time.perf_counter()
    ((_, start, end),) = line.take()
    assert end > told, "the host was done long before"
    assert end > start
