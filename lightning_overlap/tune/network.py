"""The links between ranks, and how much of them a transfer takes. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from lightning_overlap.decision import ConfigError

_RATE = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[kmgtKMGT]?)(?P<quantity>bit|B)(/s)?")
_TIME = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|ms|us)")
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Link:
    """A kind of link: inside a host, or between hosts.

    Attributes:
        bandwidth: bytes a second in each direction, both at once. Inside a host: of each rank. Between hosts: of a host, whose ranks
            share it.
        latency: seconds of a transfer of a few bytes.
        load: share of its compute that a rank loses while it sends and receives at full bandwidth, 0 to 1: copies take processor time.
        overhead: seconds of its compute that a rank loses for each transfer, however short.
    """

    bandwidth: float
    latency: float = 0.0
    load: float = 0.0
    overhead: float = 0.0

    def __str__(self) -> str:
        speed = f"{self.bandwidth * 8 / 1e6:,.0f} Mbit/s, {self.latency * 1e3:.2f} ms"
        return f"{speed}, takes {self.load:.0%} of the compute meanwhile" if self.load else speed


def parse_link(text: str) -> Link:
    """Parses a link as a user gives it: ``300mbit``, or ``300mbit,0.5ms`` with its latency.

    Args:
        text: bits (``mbit``, ``gbit``) or bytes (``MB``, ``GB``) a second; then, after a comma, the latency (``s``, ``ms``, ``us``).

    Raises:
        ConfigError: the text is something else.
    """
    rate, _, latency = text.replace(" ", "").partition(",")
    speed, time = _RATE.fullmatch(rate), _TIME.fullmatch(latency or "0s")
    if speed is None or time is None or not float(speed["number"]):
        raise ConfigError(f"a link is its speed and its latency, such as 300mbit,0.5ms or 25GB,5us; got {text!r}")
    bandwidth = float(speed["number"]) * _PREFIXES[speed["unit"].lower()] / (8 if speed["quantity"] == "bit" else 1)
    return Link(bandwidth, float(time["number"]) * _SECONDS[time["unit"]])


class Load(NamedTuple):
    """What a rank's part of a transfer takes of one kind of link.

    Attributes:
        link: the link.
        is_inter_host: whether it is the link between hosts.
        seconds: for which the rank's share of it is in use.
    """

    link: Link
    is_inter_host: bool
    seconds: float


@dataclass(frozen=True)
class Network:
    """The links of a machine. Consecutive ranks share a host.

    Attributes:
        ranks_per_host: ranks on each host.
        intra_host: the link between ranks of a host; None if no host has several.
        inter_host: the link between hosts; None if there is one host.
        rings: whether gathers and reduce-scatters go around a ring, as on NCCL. Otherwise each rank sends to each other one.
    """

    ranks_per_host: int
    intra_host: Link | None
    inter_host: Link | None
    rings: bool = False

    def loads(self, rank: int, ranks: tuple[int, ...], verb: str, nbytes: int, stage: int) -> list[Load]:
        """Returns what a rank's part of a transfer takes of each link.

        In a ring, one member on each host sends to the next host. Otherwise all ranks of a host send to members on other hosts at the
        same time; between stages, all ranks of a host that have this stage.

        Args:
            rank: the sender.
            ranks: all members.
            verb: as in :class:`~lightning_overlap.tune.rehearsal.Post`.
            nbytes: bytes that the rank sends.
            stage: ranks of a pipeline stage.
        """
        peers = [other for other in ranks if other != rank]
        if not peers or not nbytes:
            return []
        remote_peers = sum(not self.is_local(rank, other) for other in peers)
        local_peers = len(peers) - remote_peers
        ring = verb == "all_reduce" or (self.rings and verb in ("all_gather", "reduce_scatter"))
        if ring:
            # the recorded bytes of an all-reduce are twice the tensor's, of which a ring of n sends (n - 1) / n
            sent = nbytes * len(peers) / len(ranks) if verb == "all_reduce" else nbytes
            inside = sent * (local_peers > 0)
            between = sent * (remote_peers > 0) * self.ranks_per_host / (local_peers + 1)
        else:
            senders = min(stage, self.ranks_per_host) if verb == "send" else self.ranks_per_host
            inside = nbytes * local_peers / len(peers)
            between = nbytes * remote_peers / len(peers) * senders
        loads = []
        for link, is_inter_host, sent in ((self.intra_host, False, inside), (self.inter_host, True, between)):
            if sent:
                assert link is not None, f"ranks {ranks} need a link that the network does not have"
                loads.append(Load(link, is_inter_host, sent / link.bandwidth))
        return loads

    def latency(self, ranks: tuple[int, ...], verb: str) -> float:
        """Returns the seconds that a transfer of few bytes takes: a ring passes them on from rank to rank."""
        link = self.slowest(ranks)
        hops = len(ranks) - 1 if verb == "all_reduce" else 1
        return link.latency * hops if link is not None else 0.0

    def slowest(self, ranks: tuple[int, ...]) -> Link | None:
        """Returns the link between hosts if the ranks are on several, otherwise that inside a host; None for one rank."""
        if len(ranks) == 1:
            return None
        return self.intra_host if all(self.is_local(ranks[0], other) for other in ranks) else self.inter_host

    def is_local(self, rank: int, other: int) -> bool:
        """Whether two ranks are on one host."""
        return rank // self.ranks_per_host == other // self.ranks_per_host
