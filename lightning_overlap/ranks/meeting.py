"""Makes the world: ranks meet within a time limit, or an error names the missing ranks."""

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

POLL_INTERVAL = 0.5
"""Longest time in seconds between two attempts to reach the store, and between two checks which ranks have come."""


class Environment(Protocol):
    """The ranks and the address of the store: Lightning's ``ClusterEnvironment``."""

    @property
    def main_address(self) -> str:
        """The host of rank 0."""

    @property
    def main_port(self) -> int:
        """The port of the store on that host."""

    def global_rank(self) -> int:
        """This process's rank."""

    def world_size(self) -> int:
        """The number of ranks."""


def start_world(environment: Environment, backend: str, limit: timedelta, timeout: timedelta, device: torch.device) -> None:
    """Makes the world's process group.

    Args:
        environment: has this process's rank and the address of the store.
        backend: as in ``init_process_group``.
        limit: how long ranks wait for each other.
        timeout: how long later transfers may take.
        device: of this rank.

    Raises:
        ConfigError: two processes have the same rank, or ranks disagree about the world's size.
        TransferError: some ranks have not come in time.
    """
    rank, size = environment.global_rank(), environment.world_size()
    host, port = environment.main_address, environment.main_port
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)  # as Lightning sets them
    # torchrun's agent keeps its store when it restarts the ranks.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", open_store(host, port, rank, size, limit))
    meet_in(store, rank, size, limit)
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    make = partial(dist.init_process_group, backend, store=PrefixStore("default_pg", store), rank=rank, world_size=size, **bound)
    patiently(partial(make, timeout=timeout), limit, f"the {size} ranks have met, but have not all connected")
    store.set_timeout(timeout)


def open_store(host: str, port: int, rank: int, size: int, limit: timedelta) -> Any:
    """Opens the store, which rank 0 or torchrun's agent serves.

    Raises:
        ConfigError: another program uses the port.
        TransferError: the store was not opened in time.
    """
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = f"MASTER_ADDR:MASTER_PORT={host}:{port}"
    if not serves:
        _reach(host, port, limit, f"rank 0 has not opened {address}")
    open_store = partial(TCPStore, host, port, size, serves, limit, wait_for_workers=False, multi_tenant=True)
    try:
        return patiently(open_store, limit, f"rank {rank} finds no store at {address} (another program may use this port)")
    except TransferError as error:
        if "EADDRINUSE" not in str(error.__cause__):
            raise
        raise ConfigError(f"rank 0 cannot open {address}: another program uses this port. Set MASTER_PORT to a free one") from error


def _reach(host: str, port: int, limit: timedelta, failed: str) -> None:
    """Returns when a process listens at the address. torch's own attempts take longer than their limit."""
    until = time.monotonic() + limit.total_seconds()
    while True:
        with suppress(OSError):
            create_connection((host, port), POLL_INTERVAL).close()
            return
        if time.monotonic() > until:
            raise TransferError(f"{failed} within {limit} (meeting_timeout): rank 0 was not started, or has ended. Look for its error")
        time.sleep(POLL_INTERVAL / 5)


def meet_in(store: Any, rank: int, size: int, limit: timedelta) -> None:
    """Returns when all ranks have registered in the store.

    Raises:
        ConfigError: two processes have the same rank, or ranks disagree about the world's size.
        TransferError: some ranks have not come; with their numbers.
    """
    until = time.monotonic() + limit.total_seconds()
    registry = PrefixStore("lightning_overlap/meeting", store)
    entry = f"{size} ranks, process {os.getpid()} of {gethostname()}"
    first = registry.compare_set(f"rank {rank}", "", entry).decode()
    if first != entry:
        registry.set("wrong", f"two processes are rank {rank}: {first}, and {entry}. Give each process another RANK")
    names = [f"rank {other}" for other in range(size)]
    nap = 0.002
    try:
        while True:
            if registry.check(["wrong"]):
                raise ConfigError(registry.get("wrong").decode())
            complete = registry.check(names)  # one request, whatever the number of ranks
            late = time.monotonic() > until
            if complete or late:
                present = [name for name in names if complete or registry.check([name])]
                sizes = {name: words.decode().split()[0] for name, words in zip(present, registry.multi_get(present), strict=True)}
                if len(set(sizes.values())) > 1:
                    registry.set("wrong", f"ranks disagree about WORLD_SIZE: {sizes}. Start all with the same devices and num_nodes")
                    continue
            if complete:
                return
            if late:
                missing = [other for other in range(size) if names[other] not in present]
                raise TransferError(
                    f"ranks {missing} of {size} have not come within {limit} (meeting_timeout). Look for their errors, and start "
                    "all ranks"
                )
            time.sleep(nap)  # torch's own wait in the store writes a warning at each timeout
            nap = min(1.5 * nap, POLL_INTERVAL)
    except dist.DistNetworkError as error:
        raise TransferError(f"the process with the store (rank 0 or torchrun's agent) has ended while ranks met: {error}") from error


def keep_store_alive() -> None:
    """Turns on keep-alive for the connections of the store, so that the end of its process is noticed."""
    store = base_store()
    if isinstance(store, TCPStore):
        connections = Sockets.of_port(store.port)
        connections.keep_alive()
        connections.close()
