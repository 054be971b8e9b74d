"""The machine for which a layout is chosen: its ranks, their links and memory, given by the user or measured."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_overlap.bench.runs import Runs
from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero, only_warnings
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tune.link import measure_links
from lightning_overlap.tune.network import Link, Network, parse_link

_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[MGT])B")
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Machine:
    """The ranks for which a layout is chosen.

    Attributes:
        ranks: on all hosts.
        ranks_per_host: on each host; consecutive ranks share one.
        is_there: whether the ranks run this command; otherwise figures are on paper.
        device: of a rank.
        backend: of the process group.
    """

    ranks: int
    ranks_per_host: int
    is_there: bool
    device: torch.device
    backend: str

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return self.ranks // self.ranks_per_host


def find_network(
    machine: Machine, link: str | None, inside_link: str | None, strategy: OverlapStrategy, trainer: dict[str, Any]
) -> Network:
    """Finds the links of a machine: as given, or measured. If the ranks are there, it connects them: collective over the world.

    Args:
        machine: the ranks.
        link: the link between hosts, as text for :func:`parse_link`; None: it is measured.
        inside_link: the link inside a host; None: it is measured.
        strategy: has the backend and the time limit.
        trainer: the user's arguments of Trainer.

    Raises:
        ConfigError: there is one rank; or a link is not given, and cannot be measured because the ranks are not there.
    """
    if machine.ranks == 1:
        raise ConfigError("one rank has no layout to choose: set more devices, or pass --devices 8 --num-nodes 2 for figures on paper")
    inter_host = parse_link(link) if link is not None else None
    intra_host = parse_link(inside_link) if inside_link is not None else None
    if machine.is_there:
        measurement = _Measurement(machine.ranks_per_host, strategy.time_limit, (intra_host, inter_host))
        places: dict[str, Any] = {
            name: trainer[name] for name in ("accelerator", "devices", "num_nodes", "plugins") if name in trainer
        }
        runs = Runs(_OneWeight(), None, strategy, places)
        plain = OverlapStrategy(process_group_backend=strategy.process_group_backend)
        log_on_rank_zero("tune connects the ranks and measures the links that are not given, then rehearses layouts")
        with only_warnings():
            runs.fit(plain, 1, measurement, train_dataloaders=DataLoader(torch.zeros(machine.ranks, 1)))  # type: ignore[arg-type]
        intra_host, inter_host = measurement.links
    missing = [
        f"{option} {example} (the link {where})"
        for option, example, where, given, needed in (
            ("--link", "300mbit,0.5ms", "between hosts", inter_host, machine.hosts > 1),
            ("--inside_link", "100GB,10us", "inside a host", intra_host, machine.ranks_per_host > 1),
        )
        if needed and given is None
    ]
    if missing:
        raise ConfigError(f"the ranks are not there, so links cannot be measured: pass {' and '.join(missing)}")
    return Network(
        machine.ranks_per_host,
        intra_host if machine.ranks_per_host > 1 else None,
        inter_host if machine.hosts > 1 else None,
        rings=machine.backend == "nccl",
    )


class _Measurement(Callback):
    """Measures the links that are None at the start of a fit, in which all ranks are connected."""

    def __init__(self, ranks_per_host: int, timeout: timedelta, links: tuple[Link | None, Link | None]) -> None:
        self.links = links
        self._ranks_per_host, self._timeout = ranks_per_host, timeout

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.links = measure_links(self._ranks_per_host, trainer.strategy.root_device, self._timeout, self.links)


class _OneWeight(LightningModule):
    """The smallest module that can be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def memory_of_a_rank(machine: Machine, given: str | None) -> int:
    """Returns the bytes of memory that a rank has: as given (``80GB``), the CUDA device's, or its share of the host's.

    Raises:
        ConfigError: ``given`` is no number of bytes.
    """
    if given is not None:
        match = _BYTES.fullmatch(given)
        if match is None:
            raise ConfigError(f"--memory is a number of bytes, such as 80GB or 900MB; got {given!r}")
        return int(float(match["number"]) * _UNITS[match["unit"]])
    if machine.device.type == "cuda":
        return torch.cuda.get_device_properties(machine.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // machine.ranks_per_host
