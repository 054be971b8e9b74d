"""Times the products of tensor parallelism alone, each with its transfer.

    torchrun --nproc-per-node 2 -m lightning_overlap.bench.peers.tensor_products --tokens 2048 --width 1024 --hidden 4096

The row overlapped is the code that trains. Its limit is the longer of the same product without transfers and the transfers alone. The
peer is torch's tensor parallelism on the same layers, with sharded tokens before and after them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_overlap.bench.rows import Row
from lightning_overlap.bench.skip import Skipped
from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.modes.tensor.linear import PendingInput, gather_input, prepare_input
from lightning_overlap.modes.tensor.row import row_product
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import all_gather_objects, end_world, make_group
from lightning_overlap.state.pieces import shares
from lightning_overlap.tables import as_text

Run = Callable[[], list[Tensor]]
PRODUCTS = ("all-gather + GEMM", "GEMM + reduce-scatter", "MLP, both ways")
PEER = "torch's tensor parallelism"


class MLP(nn.Module):
    """The layers to shard: a column layer and a row layer, the same on all ranks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def share(self, rank: int, size: int) -> MLP:
        """Keeps only this rank's part of the weights, and returns itself."""
        low, high = shares(len(self.up.weight), size)[rank : rank + 2]
        self.up.weight = nn.Parameter(self.up.weight[low:high].detach().clone())
        self.down.weight = nn.Parameter(self.down.weight[:, low:high].detach().clone())
        return self


class Numbers:
    """The inputs of all products: all tokens, and this rank's part of tokens and features."""

    def __init__(self, rank: int, size: int, tokens: int, width: int, hidden: int) -> None:
        random = torch.Generator().manual_seed(1)
        self.x, self.h, self.grad = (torch.randn(1, tokens, n, generator=random) for n in (width, hidden, width))
        mine, features = slice(*shares(tokens, size)[rank : rank + 2]), slice(*shares(hidden, size)[rank : rank + 2])
        self.own_x, self.own_grad = self.x[:, mine].clone(), self.grad[:, mine].clone()
        self.own_h = self.h[..., features].clone()

    @staticmethod
    def both_ways(forward: Callable[[Tensor], Tensor], mlp: MLP, x: Tensor, grad: Tensor) -> list[Tensor]:
        """Returns the output and the gradients of input and weights."""
        x = x.detach().requires_grad_()
        y = forward(x)
        return [y.detach(), *torch.autograd.grad(y, [x, mlp.up.weight, mlp.down.weight], grad)]


def _ours(exchange: Exchange, mlp: MLP, given: Numbers) -> list[Run]:
    tokens = given.x.shape[-2]

    def gather(x: Tensor) -> PendingInput:
        return gather_input(x, [mlp.up], prepare_input([mlp.up], exchange, "mlp"), tokens)

    def forward(x: Tensor) -> Tensor:
        handle = gather(x)
        y = F.gelu(mlp.up(handle))
        return row_product(y, mlp.down, exchange, "mlp", input_state=handle.state, local_input=handle.gathered.local)

    return [
        torch.no_grad()(lambda: [mlp.up(gather(given.own_x))]),
        torch.no_grad()(lambda: [row_product(given.own_h, mlp.down, exchange, "mlp")]),
        lambda: given.both_ways(forward, mlp, given.own_x, given.own_grad),
    ]


def _torchs(mlp: MLP, given: Numbers, x: Tensor, grad: Tensor) -> list[Run]:
    def both() -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t for t in given.both_ways(mlp, mlp, x, grad)]

    return [torch.no_grad()(lambda: [mlp.up(x)]), torch.no_grad()(lambda: [mlp.down(given.own_h)]), both]


def ways(group: Group, apart: Group, tokens: int, width: int, hidden: int, splits: int | None = None) -> dict[str, list[Run]]:
    """Returns functions, by name of the row, that run each of :data:`PRODUCTS`.

    Args:
        group: all ranks.
        apart: the same ranks; its transfers are skipped, and timed alone afterwards.
        tokens: tokens of a sequence, a multiple of the ranks.
        width: features of the hidden states.
        hidden: features inside the MLP, a multiple of the ranks.
        splits: as in :class:`Exchange`.
    """
    rank, size = group.rank, group.size
    given = Numbers(rank, size, tokens, width, hidden)
    mlp = MLP(width, hidden).share(rank, size)
    skipped = Skipped(apart)
    alone: list[Run] = []
    for run in _ours(Exchange(apart, sharded=True, splits=splits), mlp, given):
        run()
        alone.append(partial(lambda calls: [p.wait() for call in calls if (p := call()) is not None], list(skipped.calls)))
        skipped.calls.clear()
    cut = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    peer = parallelize_module(MLP(width, hidden), init_device_mesh("cpu", (size,)), cut)
    return {
        "overlapped": _ours(Exchange(group, sharded=True, splits=splits), mlp, given),
        "plain": _ours(Exchange(group, sharded=True, overlapped=False), mlp, given),
        "GEMM": _torchs(mlp, given, given.x, given.grad),
        "transfer": alone,
        PEER: _torchs(peer, given, given.own_x, given.own_grad),  # type: ignore[arg-type]
    }


def measure(runs: Mapping[str, list[Run]], steps: int, repeats: int) -> dict[str, list[Row]]:
    """Seconds of a run on the slowest rank, interleaved; by name, for each product. Collective."""
    rows = {name: [Row(name) for _ in of_name] for name, of_name in runs.items()}
    for repeat, number, name in itertools.product(range(repeats + 1), range(len(PRODUCTS)), runs):
        dist.barrier()
        for step in range(steps + 1):
            if step == 1:  # a connection that was idle begins slowly
                start = time.perf_counter()
            for result in runs[name][number]():
                result.flatten()[0].item()  # torch's may still be on its way
        seconds = max(all_gather_objects((time.perf_counter() - start) / steps))
        if repeat > 0:  # the first one makes buffers and connections
            rows[name][number].seconds.append(seconds)
    return rows


def table(rows: Mapping[str, list[Row]]) -> str:
    """As text; times in milliseconds."""
    cells = [(name, *(f"{row.median * 1e3:.1f} ±{row.spread / 2:.0%}" for row in of_name)) for name, of_name in rows.items()]
    median = {name: [row.median for row in of_name] for name, of_name in rows.items()}
    limits = [max(pair) for pair in zip(median["GEMM"], median["transfer"], strict=True)]
    for name, above, below in (
        ("overlapped / max(GEMM, transfer)", median["overlapped"], limits),
        ("plain / overlapped", median["plain"], median["overlapped"]),
        ("torch's / overlapped", median[PEER], median["overlapped"]),
    ):
        cells.append((name, *(f"{a / b:.2f}" for a, b in zip(above, below, strict=True))))
    return as_text(("ms", *PRODUCTS), cells, numbers=True)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2048, "width": 1024, "hidden": 4096, "steps": 4, "repeats": 5, "splits": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    if asked.tokens % size or asked.hidden % size:
        parser.error(f"--tokens {asked.tokens} and --hidden {asked.hidden} must be multiples of the {size} ranks")
    group, apart = (make_group([range(size)], name, timedelta(minutes=5)) for name in ("products", "transfers"))
    runs = ways(group, apart, asked.tokens, asked.width, asked.hidden, asked.splits)
    result = table(measure(runs, asked.steps, asked.repeats))
    if group.rank == 0:
        print(result)
    for each in (group, apart):
        each.close()
    end_world()


if __name__ == "__main__":
    main()
