"""The products that are timed are the uncut layers' ones, whoever multiplies."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lightning_overlap.bench.peers.tensor_products import MLP, PEER, PRODUCTS, Numbers, measure, table, ways
from lightning_overlap.ranks.world import make_group

SHAPES = (8, 6, 16)


def timed(splits):
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [make_group([range(size)], name, timedelta(seconds=60)) for name in ("products", "transfers")]
    runs = ways(*groups, *SHAPES, splits)
    whole, given = MLP(*SHAPES[1:]), Numbers(rank, size, *SHAPES)
    tokens, features = (slice(n * rank // size, n * (rank + 1) // size) for n in (SHAPES[0], SHAPES[2]))
    y, of_x, of_up, of_down = given.both_ways(whole, whole, given.x, given.grad)
    expected = [
        [whole.up(given.x)[..., features].detach()],
        [F.linear(given.h, whole.down.weight)[:, tokens].detach()],
        [y[:, tokens], of_x[:, tokens], of_up[features], of_down[:, features]],
    ]
    for name in ("overlapped", "plain", PEER):
        for product, run, right in zip(PRODUCTS, runs[name], expected, strict=True):
            found = [t.clone() for t in run()]
            torch.testing.assert_close(found, right, msg=lambda m, n=name, p=product: f"{n}, {p}: {m}")
    torch.testing.assert_close(runs["GEMM"][0](), expected[0])  # the others are this rank's summands
    rows = measure(runs, steps=1, repeats=2)
    sent = [len(run()) for run in runs["transfer"]]
    for group in groups:
        group.close()
    return {name: [len(row.seconds) for row in of_name] for name, of_name in rows.items()}, table(rows), sent


def test_every_way_gives_the_numbers_of_the_uncut_layers(world):
    for counts, told, sent in world(2).run(timed, 2):
        assert counts == {name: [2, 2, 2] for name in ("overlapped", "plain", "GEMM", "transfer", PEER)}
        assert all(words in told for words in (*PRODUCTS, "overlapped / max(GEMM, transfer)", "torch's / overlapped"))
        assert sent == [2, 2, 2 + 2 + 2 + 1 + 2]  # in two pieces, but for the input that is gathered again
