"""Measures the links between the ranks that are there: how fast they are, and what a transfer takes from a rank that computes."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta

import torch
from torch import Tensor

from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.world import all_gather_objects, make_group, world_size
from lightning_overlap.tune.network import Link

SECONDS = 0.3
"""About the duration of a measured transfer, long enough for TCP to reach its speed."""
REPEATS = 3
LATENCY_REPEATS = 20
LASTING = 1.3
"""Duration of the products beside a transfer, as a multiple of that of the transfer by itself. They must end after it: where one core
does both, the transfer is slower beside products, and what it takes from products that end before it is only a part."""
PIECE = 1 << 21
"""Most bytes that a rank sends in one of the gathers of a transfer: about as many as modes send at once. All gathers use one buffer:
on a fast link the first use of memory takes about as long as its transfer."""
FIRST_BYTES, MOST_BYTES = 1 << 18, 1 << 30
"""Bytes that a rank sends in the shortest and the longest transfer."""
ROWS = 256
"""Rows of the matrices that a rank multiplies meanwhile: about a millisecond on one core."""


def measure_links(
    ranks_per_host: int,
    device: torch.device,
    timeout: timedelta,
    given: tuple[Link | None, Link | None] = (None, None),
    *,
    seconds: float = SECONDS,
) -> tuple[Link | None, Link | None]:
    """Measures the link inside a host and that between hosts, while all ranks use it. Collective over the world; a few seconds.

    Args:
        ranks_per_host: ranks on each host; consecutive ranks share one.
        device: of this rank.
        timeout: how long a transfer may take.
        given: the links inside a host and between hosts, the same on all ranks; None: it is measured.
        seconds: about the duration of a measured transfer.

    Returns:
        Both links, the same on all ranks; None where there is no such link and none was given.
    """
    ranks = range(world_size())
    local = [list(ranks[start : start + ranks_per_host]) for start in ranks[::ranks_per_host]]
    across = [list(ranks[number::ranks_per_host]) for number in range(ranks_per_host)]
    links: list[Link | None] = []
    for sets, sharers, link in ((local, 1, given[0]), (across, ranks_per_host, given[1])):
        if link is not None or len(sets[0]) == 1:
            links.append(link)
            continue
        group = make_group(sets, "link", timeout)
        links.append(_mean(_Probe(group, device, seconds).link(), sharers))
        group.close()
    return links[0], links[1]


def _mean(link: Link, sharers: int) -> Link:
    """Returns the mean of all ranks' links, with the bandwidth of so many of them together. Collective over the world."""
    links = all_gather_objects(link)
    bandwidth, latency, load, overhead = (
        statistics.mean(getattr(each, name) for each in links) for name in ("bandwidth", "latency", "load", "overhead")
    )
    return Link(bandwidth * sharers, latency, load, overhead)


class _Probe:
    """Times transfers and products.

    Args:
        group: ranks that all send to each other.
        device: of this rank.
        seconds: as in :func:`measure_links`.
    """

    def __init__(self, group: Group, device: torch.device, seconds: float) -> None:
        self._group, self._device, self._seconds = group, device, seconds
        self._key = 0
        self._buffer = torch.zeros(group.size * (PIECE // (4 * (group.size - 1))), device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._factor = torch.zeros(ROWS, ROWS, dtype=dtype, device=device)

    def link(self) -> Link:
        """Measures the link. Collective over the group."""
        self._transfer(FIRST_BYTES)  # connects
        latency = statistics.median(self._transfer(1) for _ in range(LATENCY_REPEATS))
        nbytes = FIRST_BYTES
        while (seconds := self._transfer(nbytes)) < self._seconds / 2 and nbytes < MOST_BYTES:
            nbytes = min(MOST_BYTES, int(nbytes * min(8.0, self._seconds / seconds)))
        seconds = min(self._transfer(nbytes) for _ in range(REPEATS))
        product = statistics.median(self._compute(50) / 50 for _ in range(REPEATS))
        work = statistics.median(self._work(nbytes, int(LASTING * seconds / product) + 1) for _ in range(REPEATS))
        overhead = statistics.median(self._overhead(LATENCY_REPEATS, product) for _ in range(REPEATS))
        return Link(nbytes / max(seconds - latency, 1e-9), latency, min(1.0, work / seconds), overhead)

    def _post(self, nbytes: int) -> list[Pending]:
        """Posts gathers in which each member sends so many bytes to the others."""
        pending = []
        for start in range(0, nbytes, PIECE):
            elements = max(1, min(PIECE, nbytes - start) // (4 * (self._group.size - 1)))
            bounds = [elements * member for member in range(self._group.size + 1)]
            self._key += 1
            pending.append(self._group.all_gather(self._buffer[: bounds[-1]], bounds, key=self._key, label="link.probe"))
        return pending

    def _transfer(self, nbytes: int) -> float:
        """Seconds of a transfer, of the slowest member."""
        self._meet()
        start = time.perf_counter()
        for each in self._post(nbytes):
            each.wait()
        return self._slowest(self._since(start))

    def _compute(self, products: int) -> float:
        """Seconds of some products."""
        start = time.perf_counter()
        for _ in range(products):
            self._multiply()
        return self._since(start)

    def _work(self, nbytes: int, products: int) -> float:
        """Seconds of compute that a transfer takes: so much longer do products take beside it, which end after it."""
        alone = self._compute(products)
        self._meet()
        start = time.perf_counter()
        pending = self._post(nbytes)
        self._compute(products)
        for each in pending:
            each.wait()
        return max(0.0, self._since(start) - alone)

    def _overhead(self, count: int, product: float) -> float:
        """Seconds of compute that one of many short transfers takes: its post, the work of threads, and a wait after its end."""
        self._meet()
        start = time.perf_counter()
        pending: list[Pending] = []
        for _ in range(count):
            pending += self._post(1)
            self._multiply()
        for _ in range(count):  # meanwhile all are complete
            self._multiply()
        for each in pending:
            each.wait()
        return max(0.0, self._since(start) / count - 2 * product)

    def _multiply(self) -> Tensor:
        return self._factor @ self._factor

    def _since(self, start: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def _meet(self) -> None:
        self._slowest(0.0)

    def _slowest(self, seconds: float) -> float:
        x = torch.tensor([seconds], dtype=torch.float64)
        return float(self._group.sum(x.to(self._group.device_of(x)), "max"))
