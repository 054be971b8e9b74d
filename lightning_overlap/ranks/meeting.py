"""How ranks come together: each start meets the others within a limit, or names those that have not come."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from socket import create_connection, gethostname
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, and not declared in its __all__

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.announcements import TransferError, base_store
from lightning_overlap.ranks.sockets import Sockets
from lightning_overlap.ranks.world import patiently

LOOK_AGAIN = 0.5
"""Seconds between two attempts to reach the store, and between two looks at who has come."""


class Environment(Protocol):
    """Who this process is, and where ranks meet: Lightning's ``ClusterEnvironment``."""

    @property
    def main_address(self) -> str:
        """The host of rank 0."""

    @property
    def main_port(self) -> int:
        """The port of the store there."""

    def global_rank(self) -> int:
        """This process's rank."""

    def world_size(self) -> int:
        """The number of ranks."""


def start_world(environment: Environment, backend: str, limit: timedelta, timeout: timedelta, device: torch.device) -> None:
    """Makes the world's process group.

    Args:
        environment: tells ranks, and where they meet.
        backend: as in ``init_process_group``.
        limit: how long ranks wait for each other.
        timeout: how long they wait for a transfer from then on.
        device: of this rank.

    Raises:
        ConfigError: ranks disagree about who they are.
        TransferError: they have not met in time.
    """
    rank, size = environment.global_rank(), environment.world_size()
    host, port = environment.main_address, environment.main_port
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # as Lightning leaves them
    # torchrun's agent keeps its store when it starts the ranks again.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", open_store(host, port, rank, size, limit))
    meet_in(store, rank, size, limit)
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    make = partial(dist.init_process_group, backend, store=PrefixStore("default_pg", store), rank=rank, world_size=size, **bound)
    patiently(partial(make, timeout=timeout), limit, f"the {size} ranks have met, and have not all connected")
    store.set_timeout(timeout)


def open_store(host: str, port: int, rank: int, size: int, limit: timedelta) -> Any:
    """The store that rank 0, or torchrun's agent, keeps."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    if not serves:
        _reach(host, port, limit, f"rank 0 has not opened {where}")
    open_store = partial(TCPStore, host, port, size, serves, limit, wait_for_workers=False, multi_tenant=True)
    return patiently(open_store, limit, f"rank {rank} finds no store at {where}, which may be another program's")


def _reach(host: str, port: int, limit: timedelta, failed: str) -> None:
    """Until somebody listens there: torch's own attempts take longer than their limit."""
    until = time.monotonic() + limit.total_seconds()
    while True:
        with suppress(OSError):
            create_connection((host, port), LOOK_AGAIN).close()
            return
        if time.monotonic() > until:
            raise TransferError(f"{failed} within {limit}: it was not started, or has ended. meeting_timeout is how long others wait")
        time.sleep(LOOK_AGAIN / 5)


def meet_in(store: Any, rank: int, size: int, limit: timedelta) -> None:
    """Until all ranks have written down who they are.

    Raises:
        ConfigError: on those that have come, if ranks disagree.
        TransferError: naming those that have not come.
    """
    until = time.monotonic() + limit.total_seconds()
    place = PrefixStore("lightning_overlap/meeting", store)
    mine = f"{size} ranks, process {os.getpid()} of {gethostname()}"
    first = place.compare_set(f"rank {rank}", "", mine).decode()
    if first != mine:
        place.set("wrong", f"two processes are rank {rank}: {first}, and {mine}: give each a RANK of its own")
    names = [f"rank {other}" for other in range(size)]
    nap = 0.002
    try:
        while True:
            if place.check(["wrong"]):
                raise ConfigError(place.get("wrong").decode())
            complete = place.check(names)  # one question, whatever the number of ranks
            late = time.monotonic() > until
            if complete or late:
                come = [name for name in names if complete or place.check([name])]
                sizes = {name: words.decode().split()[0] for name, words in zip(come, place.multi_get(come), strict=True)}
                if len(set(sizes.values())) > 1:
                    place.set("wrong", f"ranks disagree about WORLD_SIZE: {sizes}. Start all with the same devices and num_nodes")
                    continue
            if complete:
                return
            if late:
                missing = [other for other in range(size) if names[other] not in come]
                raise TransferError(
                    f"ranks {missing} of {size} have not come within {limit}: look for their errors, and start all of them. "
                    "meeting_timeout is how long others wait"
                )
            time.sleep(nap)  # torch's own wait in the store writes a warning each time that it is looked up from
            nap = min(1.5 * nap, LOOK_AGAIN)
    except dist.DistNetworkError as error:
        raise TransferError(f"the process with the store, rank 0 or torchrun's agent, has ended while ranks met: {error}") from error


def keep_store_alive() -> None:
    """The kernel asks after the process with the store, too."""
    store = base_store()
    if isinstance(store, TCPStore):
        connections = Sockets.of_port(store.port)
        connections.keep_alive()
        connections.close()
