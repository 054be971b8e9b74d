"""How much of the transfers of experts runs under their products.

Run it on two ranks, each on a host with a link of its own: torchrun --nproc-per-node 2 -m examples.measure_experts

For one layer of experts, forward and backward: with overlap, without, the products without transfers, the transfers alone.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.modes.expert.dispatch import ExpertDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.nn.moe import Experts
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.world import make_group


class NoLink:
    """A group whose transfers take no time: a rank receives rows of its own."""

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size = group, group.rank, group.size

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        if label == "expert.counts":  # products have the sizes that they have with transfers
            return self.group.all_to_all(x, send_sizes, receive_sizes, key=key, label=label)
        rows = x.new_zeros(sum(receive_sizes), *x.shape[1:])
        rows[: len(x)] = x[: len(rows)]
        return self.group.completed(rows, label=label)


class OnlyLink:
    """A group that records its transfers, so that they can be made again without anything else."""

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size = group, group.rank, group.size
        self.transfers: list[tuple[Tensor, Any, Any]] = []
        self.nbytes = 0

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        self.transfers.append((x.detach().clone(), send_sizes, receive_sizes))
        return self.group.all_to_all(x, send_sizes, receive_sizes, key=key, label=label)

    def run(self) -> None:
        """Makes all transfers, each as soon as the link is free."""
        pending = [self.group.all_to_all(*each, key=i, label="again") for i, each in enumerate(self.transfers)]
        self.nbytes = sum(each.transfer.nbytes for each in pending)
        for each in pending:
            each.wait()


def routing(tokens: int, experts: int, choices: int, skew: float) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token. Without skew, all experts get the same number; else expert i about ``exp(-skew * i)``."""
    if skew == 0:
        indices = (torch.arange(tokens * choices) % experts).view(tokens, choices)
    else:
        noise = -torch.empty(tokens, experts).exponential_().log()
        indices = (noise - skew * torch.arange(experts)).topk(choices, -1).indices
    return indices[torch.randperm(tokens)], torch.rand(tokens, choices)


def step(dispatch: ExpertDispatch, layer: Experts, hidden: Tensor, where: tuple[Tensor, Tensor]) -> None:
    """Forward and backward of the layer."""
    layer.zero_grad()
    dispatch(hidden, *where, LocalExperts(layer)).backward(hidden.detach())


def measure(group: Group, variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank, by repeat. In each repeat all variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            group.barrier()
            start = time.perf_counter()
            run()
            duration = torch.tensor(time.perf_counter() - start)
            if repeat:
                times[name].append(float(group.sum(duration, "max")) * 1e3)
    return times


def report(group: Group, arguments: argparse.Namespace, skew: float) -> None:
    """Measures one routing and prints a row."""
    torch.manual_seed(group.rank)
    where = routing(arguments.tokens, arguments.experts, arguments.choices, skew)
    layout = Layout(arguments.experts, group.size, arguments.split, arguments.parts)
    one_part = Layout(arguments.experts, group.size, "experts", 1)
    layer = Experts(len(layout.experts_of(group.rank)), arguments.width, 4 * arguments.width)
    hidden = (torch.randn(arguments.tokens, arguments.width) / 10).requires_grad_()
    link, idle = OnlyLink(group), NoLink(group)

    def variant(ranks: Any, layout: Layout, overlap: bool) -> Callable[[], None]:
        dispatch = ExpertDispatch(ranks, layout, overlap=overlap, delay_wgrad=overlap and arguments.delay_wgrad)
        return lambda: step(dispatch, layer, hidden, where)

    variant(link, layout, True)()
    overlapped, waits = variant(group, layout, True), []

    def logged() -> None:
        group.log = []
        overlapped()
        waits.append(sum(end - start for start, end in (each.waited for each in group.log if each.waited)) * 1e3)
        group.log = None

    times = measure(
        group,
        {
            "overlapped": logged,
            "plain": variant(group, one_part, False),
            "compute": variant(idle, layout, True),
            "compute, one part": variant(idle, one_part, False),
            "exchange": link.run,
        },
        arguments.repeats,
    )
    waited = float(group.sum(torch.tensor(statistics.median(waits)), "max"))
    nbytes = float(group.sum(torch.tensor(float(link.nbytes)), "max"))
    if group.rank == 0:
        print(f"skew {skew}; overlapped waits for transfers {waited:.0f} ms; the busiest direction carries {nbytes / 1e6:.1f} MB")
        print_row("median ", {name: statistics.median(each) for name, each in times.items()})
        print_row("fastest", {name: min(each) for name, each in times.items()})


def print_row(what: str, times: dict[str, float]) -> None:
    """Prints times in milliseconds, and what follows from them."""
    limit = max(times["compute, one part"], times["exchange"])
    print(
        f"  {what}: {', '.join(f'{name} {value:.0f}' for name, value in times.items())}; "
        f"overlapped {times['overlapped'] / limit:.2f} x limit, plain {times['plain'] / times['overlapped']:.2f} x overlapped, hidden "
        f"{1 - (times['overlapped'] - times['compute']) / times['exchange']:.0%}, splitting "
        f"{times['compute'] / times['compute, one part'] - 1:+.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--choices", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--split", default="experts+local")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--delay-wgrad", action="store_true")
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = make_group([list(range(dist.get_world_size()))], "expert", datetime.timedelta(seconds=60), gathers=False)
    for skew in arguments.skew:
        report(group, arguments, skew)
    group.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
