"""Times the attention of context parallelism alone, forward and backward, with its transfers.

    torchrun --nproc-per-node 2 -m examples.measure_attention --tokens 4096 --methods p2p a2a --peers

The row overlapped is the code that trains. Compute is the same without transfers, and transfers are those of one run, posted at once.
With ``--sleep`` kernels sleep in place of computing, which takes no core: more ranks than cores can be measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.bench.peers import made_by_all
from lightning_overlap.bench.peers.context import PeerAttention, attentions
from lightning_overlap.bench.rows import Row
from lightning_overlap.bench.skip import Skipped
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.config import METHODS
from lightning_overlap.modes.context.kernel import Kernel, Tile, kernel_for
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.ranks.group import Group, Pending, Transfer
from lightning_overlap.ranks.world import WORLD, all_gather_objects, end_world, make_group
from lightning_overlap.tables import as_text

PHASES = ("forward", "backward", "both")
ORDERS: dict[str, Callable[[Mask, int], TokenLayout]] = {
    "balanced": lambda mask, ranks: TokenLayout.balanced(mask.tokens, ranks),
    "contiguous": lambda mask, ranks: TokenLayout.contiguous(mask.tokens, ranks),
    "documents": TokenLayout.for_documents,
}
BACKWARD = 2.5
"""Products of a backward for one of a forward: five for two."""


class SleepingKernel(Kernel):
    """Sleeps as long as a kernel would compute that takes the same time for each pair of a query and a key.

    Args:
        seconds: of a pair, in forward.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(1.0)
        self._seconds = seconds

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        self._sleep(q, k, tile, 1.0)
        return q.new_zeros(1).expand(*q.shape[:3], v.shape[3]), q.new_zeros(1).expand(q.shape[:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._sleep(q, k, tile, BACKWARD)
        of_q, of_k, of_v = (x.new_zeros(1).expand(x.shape) for x in (q, k, v))
        return of_q, of_k, of_v

    def _sleep(self, q: Tensor, k: Tensor, tile: Tile, times: float) -> None:
        queries, keys = q.shape[2], k.shape[2]
        hidden = min(queries, keys) * (keys - min(queries, keys) / 2) if tile.causal else 0  # later queries see all keys
        time.sleep(self._seconds * times * q.shape[0] * q.shape[1] * (queries * keys - hidden))


@dataclass
class Way:
    """One way to compute an attention, in two phases.

    Attributes:
        forward: computes the output.
        backward: computes the gradients.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any]

    @classmethod
    def of(cls, attention: ContextAttention | PeerAttention, inputs: Sequence[Tensor], mask: Mask, layout: TokenLayout) -> Way:
        """The way of an attention.

        Args:
            attention: computes it.
            inputs: this rank's queries, keys, values and the gradient of the output.
            mask: of the sequence.
            layout: of the sequence.
        """
        q, k, v, grad = inputs
        outputs: list[Tensor] = []
        return cls(
            lambda: outputs.append(attention(q, k, v, mask, layout)),
            lambda: torch.autograd.grad(outputs.pop(), (q, k, v), grad),
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """The attention that is measured.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads.
        features: of a head.
        mask: of the sequence.
        seconds: that a sleeping kernel takes for a pair; 0: kernels compute.
    """

    heads: int
    kv_heads: int
    features: int
    mask: Mask
    seconds: float = 0.0

    def inputs(self, layout: TokenLayout, rank: int) -> list[Tensor]:
        """Random queries, keys, values and a gradient of the output, of one sample."""
        torch.manual_seed(rank)
        queries, keys = ((1, heads, layout.count(rank), self.features) for heads in (self.heads, self.kv_heads))
        return [torch.randn(shape, requires_grad=True) for shape in (queries, keys, keys)] + [torch.randn(queries)]

    def kernel(self, *arguments: Any) -> Kernel:
        """See :func:`~lightning_overlap.modes.context.kernel.kernel_for`."""
        return SleepingKernel(self.seconds) if self.seconds else kernel_for(*arguments)


def ways(case: Case, layout: TokenLayout, group: Group, apart: Group, **settings: Any) -> dict[str, Way]:
    """Returns the ways to measure a method, by name of the row.

    Args:
        case: what is computed.
        layout: which tokens each rank has.
        group: all ranks.
        apart: the same ranks; its transfers are skipped, and timed alone afterwards.
        settings: of :class:`ContextAttention`.
    """
    inputs = case.inputs(layout, group.rank)

    def way(of_group: Group, **others: Any) -> Way:
        attention = ContextAttention(of_group, kernels=case.kernel, **settings, **others)
        return Way.of(attention, inputs, case.mask, layout)

    skipped = Skipped(apart)
    compute = way(apart)
    calls: list[list[Callable[[], Pending | None]]] = []
    for phase in (compute.forward, compute.backward):
        phase()
        calls.append(list(skipped.calls))
        skipped.calls.clear()
    transfers = Way(*(partial(_transfer, of_phase) for of_phase in calls))
    return {"overlapped": way(group), "plain": way(group, overlapped=False), "compute": compute, "transfers": transfers}


def _transfer(calls: Sequence[Callable[[], Pending | None]]) -> None:
    for pending in [pending for call in calls if (pending := call()) is not None]:
        pending.wait()


def peer_ways(case: Case, rank: int, ranks: int) -> tuple[dict[str, Way], list[str]]:
    """The peers' ways, by name, and for each peer that cannot compute it the reason. Collective over the world."""
    made, refused = {}, []
    for name, make in attentions(dist.get_backend()).items():
        try:
            attention = made_by_all(make)
        except ConfigError as error:
            refused.append(f"{name} is left out: {error}")
        else:
            layout = ORDERS[attention.order](case.mask, ranks)
            made[name] = Way.of(attention, case.inputs(layout, rank), case.mask, layout)
    return made, refused


def measure(ways: Mapping[str, Way], repeats: int) -> dict[str, list[Row]]:
    """Seconds on the slowest rank by name, for each of :data:`PHASES`; interleaved. Collective over the world."""
    rows = {name: [Row(phase) for phase in PHASES] for name in ways}
    # The first run of all makes buffers and connections; the first one after other ways' has connections that were idle, which begin
    # slowly.
    for _, (name, way), timed in itertools.product(range(repeats), ways.items(), (False, True)):
        taken = []
        for phase in (way.forward, way.backward):
            dist.barrier()
            start = time.perf_counter()
            phase()
            taken.append(max(all_gather_objects(time.perf_counter() - start)))
        for row, seconds in zip(rows[name] if timed else [], [*taken, sum(taken)], strict=False):
            row.seconds.append(seconds)
    return rows


def sent(way: Way, group: Group) -> int:
    """Bytes that all ranks send in one run. Collective over the world."""
    log: list[Transfer] = []
    group.log = log
    way.forward()
    way.backward()
    group.log = None
    mine: int = sum(transfer.nbytes for transfer in log)
    return sum(all_gather_objects(mine))


def table(rows: Mapping[str, list[Row]], nbytes: Mapping[str, int]) -> str:
    """As text; times in milliseconds.

    Args:
        rows: by method and way, as in ``p2p: overlapped``; the limit is that of the method. A peer's is that of the first method.
        nbytes: by method, bytes that all ranks send.
    """
    median = {name: of_name[-1].median for name, of_name in rows.items()}
    limits = {method: max(median[f"{method}: {name}"] for name in ("compute", "transfers")) for method in nbytes}
    cells = []
    for name, of_name in rows.items():
        method, _, way = name.partition(": ")
        seconds = (f"{row.median * 1e3:.1f} ±{row.spread / 2:.0%}" for row in of_name)
        limit = limits.get(method, next(iter(limits.values())))
        megabytes = f"{nbytes[method] / 1e6:.1f}" if way == "overlapped" else ""
        cells.append((name, *seconds, f"{median[name] / limit:.2f}", megabytes))
    return as_text(("ms", *PHASES, "x limit", "MB sent"), cells, numbers=True)


def documents(tokens: int, mean: float) -> Tensor:
    """Numbers of the documents of a packed sequence, ``(1, tokens)``, whose lengths are lognormal, of a deviation of 1 in the log."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(tokens).log_normal_(math.log(mean) - 0.5, 1.0, generator=generator).ceil().long()
    return torch.arange(tokens).repeat_interleave(lengths)[None, :tokens].contiguous()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "heads": 8, "kv-heads": None, "features": 64, "pieces": 8, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["p2p"])
    parser.add_argument("--hierarchical-sizes", nargs=2, type=int, help="of a2a+p2p")
    parser.add_argument("--order", choices=ORDERS, default="balanced")
    parser.add_argument("--window", type=int)
    parser.add_argument("--documents", type=float, help="mean length of packed documents")
    parser.add_argument("--sleep", type=float, default=0.0, help="nanoseconds a pair of a query and a key, in forward")
    parser.add_argument("--peers", action="store_true", help="also measure other libraries")
    asked = parser.parse_args()
    if "a2a+p2p" in asked.methods and asked.hierarchical_sizes is None:
        parser.error("--methods a2a+p2p needs --hierarchical-sizes, such as 2 2 for 4 ranks")
    if asked.peers and (asked.sleep or asked.window or asked.documents):
        parser.error("--peers compute causal attention: leave out --sleep, --window and --documents")
    if asked.order == "documents" and not asked.documents:
        parser.error("--order documents needs --documents, such as 700")
    return asked


def run(asked: argparse.Namespace) -> str:
    """Measures what the command line asks for, and returns the table. Collective over the world."""
    ranks = range(dist.get_world_size())
    numbers = documents(asked.tokens, asked.documents) if asked.documents else None
    mask = Mask(asked.tokens, causal=True, window=asked.window, documents=numbers)
    kv_heads = asked.kv_heads or asked.heads
    case = Case(heads=asked.heads, kv_heads=kv_heads, features=asked.features, mask=mask, seconds=asked.sleep * 1e-9)
    layout = ORDERS[asked.order](mask, len(ranks))
    every: dict[str, Way] = {}
    groups: dict[str, Group] = {}
    for method in asked.methods:
        groups[method], apart = (make_group([ranks], f"{method} {name}", timedelta(minutes=5)) for name in ("attention", "transfers"))
        sizes = tuple(asked.hierarchical_sizes) if method == "a2a+p2p" else None
        of_method = ways(case, layout, groups[method], apart, method=method, pieces=asked.pieces, hierarchical_sizes=sizes)
        every |= {f"{method}: {name}": way for name, way in of_method.items()}
    by_peers, refused = peer_ways(case, dist.get_rank(), len(ranks)) if asked.peers else ({}, [])
    rows = measure({**every, **by_peers}, asked.repeats)
    nbytes = {method: sent(every[f"{method}: overlapped"], group) for method, group in groups.items()}
    return "\n".join([table(rows, nbytes), *refused])


def main() -> None:
    """Runs the command."""
    asked = _arguments()
    dist.init_process_group("gloo")
    result = run(asked)
    if dist.get_rank() == 0:
        print(result)
    for group in list(WORLD.groups):
        group.close()
    end_world()


if __name__ == "__main__":
    main()
