"""The peers of context parallelism train what we train, or say why not; what is timed of an attention is all of it."""

import argparse
import copy
import sys
import threading
import time
import types
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.nn import functional as F

from examples.measure_attention import ORDERS, Case, Way, documents, run
from lightning_overlap import ContextParallel, OverlapStrategy
from lightning_overlap.bench.measure import measure
from lightning_overlap.bench.peers.context import PeerAttention, Ulysses, _RingAttention, peers
from lightning_overlap.bench.runs import Runs
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.deferred import DeferredValues
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from tests.helpers.models import Transformer
from tests.helpers.rank_threads import on_ranks
from tests.helpers.sequences import token_samples

TRAINER = {"accelerator": "cpu", "use_distributed_sampler": False, "plugins": [TorchElasticEnvironment()]}


class Net(Transformer):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(token_samples(), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def overlap_strategy():
    warnings.simplefilter("ignore")
    strategy = OverlapStrategy(context_parallel=ContextParallel(size=dist.get_world_size()), process_group_backend="gloo")
    strategy.parallel_devices = [torch.device("cpu")] * dist.get_world_size()
    seed_everything(1, verbose=False)
    return strategy


class GatheringAttention(torch.nn.Module):
    """Stands in for DeepSpeed's DistributedAttention, where DeepSpeed is not installed: all tokens are gathered."""

    def __init__(self, local_attention, sequence_process_group, scatter_idx=2, gather_idx=0):
        super().__init__()
        self.local, self.group, self.dim = local_attention, sequence_process_group, gather_idx

    def forward(self, query, key, value, batch_dim_idx, **options):
        assert batch_dim_idx == 0
        whole = [torch.cat(dist.nn.functional.all_gather(x.contiguous(), self.group), self.dim) for x in (query, key, value)]
        return self.local(*whole, **options).chunk(dist.get_world_size(), self.dim)[dist.get_rank()]


def stand_in_for_deepspeed(monkeypatch):
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        comm, layer = types.ModuleType("deepspeed.comm"), types.ModuleType("deepspeed.sequence.layer")
        comm.init_distributed, layer.DistributedAttention = lambda backend, verbose: None, GatheringAttention
        for module in (types.ModuleType("deepspeed"), types.ModuleType("deepspeed.sequence"), comm, layer):
            monkeypatch.setitem(sys.modules, module.__name__, module)


def trained_by_both():
    strategy = overlap_strategy()
    runs = Runs(Net(), None, strategy, {**TRAINER, "devices": dist.get_world_size()})
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_deepspeed(monkeypatch)
        ulysses = peers(strategy.config, dist.get_world_size(), "gloo")["DeepSpeed Ulysses"][0]()
    weights, counts = [], []
    for each in (runs.ours(), ulysses):
        module = copy.deepcopy(runs.model)
        with mock.patch.object(Ulysses, "compute", autospec=True, side_effect=Ulysses.compute) as compute:
            runs.fit(each, 3, Callback(), module)
        counts.append(compute.call_count)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert not weights[0].equal(torch.cat([p.detach().flatten() for p in runs.model.parameters()])), "something was trained"
    assert counts[0] == 0 < counts[1]
    return weights


def test_the_same_weights(world):
    for ours, theirs in world(2).run(trained_by_both):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def bench():
    strategy = overlap_strategy()
    trainer = {**TRAINER, "devices": dist.get_world_size()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:  # one rank alone lacks it
            monkeypatch.setitem(sys.modules, "deepspeed", None)
        else:
            stand_in_for_deepspeed(monkeypatch)
        measured = measure(Net(), None, strategy, trainer, steps=1, warmup=1, repeats=2, with_peers=True)
    return measured.table()


def test_what_cannot_be_measured_is_said_and_the_rest_is_measured(world):
    for table in world(2).run(bench):
        assert "DeepSpeed Ulysses is left out: DeepSpeed cannot be imported" in table
        assert "torch context_parallel is left out: torch's context_parallel has no causal attention on this device" in table
        assert "medians of 2 runs" in table


def test_torchs_backward_runs_inside_of_its_context():
    inside = []

    def enter(function):
        inside.append(True)
        with torch.enable_grad():
            return function()

    given = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 2, 5, 8)
    results = []
    for output in (_RingAttention.apply(*given, enter, {"is_causal": True}), F.scaled_dot_product_attention(*given, is_causal=True)):
        results.append([output, *torch.autograd.grad(output, given, grad)])
    torch.testing.assert_close(*results)
    assert len(inside) == 2


class Alone(PeerAttention):
    """A peer of one rank."""

    order = "contiguous"

    def compute(self, q, k, v, **options):
        return _RingAttention.apply(q, k, v, lambda function: torch.enable_grad()(function)(), options)


def test_values_that_a_model_of_transformers_gives_later_are_computed_first():
    x, layer = torch.randn(1, 5, 16, requires_grad=True), torch.nn.Linear(16, 16)
    q, k = torch.randn(2, 1, 2, 5, 8)
    results = []
    for v in (DeferredValues.of(x, layer.weight, layer.bias), layer(x)):
        output = Alone()(q, k, v.view(1, 5, 2, 8).transpose(1, 2), Mask(5, causal=True), TokenLayout.contiguous(5, 1))
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, layer.weight])])
    torch.testing.assert_close(*results)


# -- attention alone ---------------------------------------------------------------------------------------------------


SLEPT = {}
"""By thread, which is a rank, the seconds of each sleep."""


def timed(methods, sizes):
    asked = {"tokens": 64, "heads": 4, "kv_heads": None, "features": 8, "pieces": 4, "repeats": 1, "hierarchical_sizes": sizes}
    others = {"order": "balanced", "window": None, "documents": None, "sleep": 0.0, "peers": True}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_deepspeed(monkeypatch)
        return run(argparse.Namespace(methods=methods, **asked, **others))


def test_each_method_is_timed_with_its_transfers(world):
    # Of a causal mask p2p sends a quarter less than all keys and values, and their gradients; a2a four exchanges of a quarter.
    whole = 2 * 2 * 4 * 64 * 8 * 4 / 1e6
    for table in world(2).run(timed, ["p2p", "a2a"], None):
        rows = {row.split("  ")[0]: row.split()[-1] for row in table.splitlines()}
        assert [name for name in rows if ": " in name][:8] == [
            f"{method}: {way}" for method in ("p2p", "a2a") for way in ("overlapped", "plain", "compute", "transfers")
        ]
        assert float(rows["p2p: overlapped"]) == pytest.approx(0.75 * whole, abs=0.05)
        assert "DeepSpeed Ulysses" in rows
        assert "torch context_parallel is left out" in table


def sleeps(group, order):
    """Seconds that a rank sleeps in forward and in backward: a nanosecond a pair of a query and a key, and a head."""
    case = Case(heads=4, kv_heads=2, features=8, mask=Mask(512, causal=True), seconds=1e-9)
    attention = ContextAttention(group, kernels=case.kernel)
    layout = ORDERS[order](case.mask, group.size)
    way = Way.of(attention, case.inputs(layout, group.rank), case.mask, layout)
    SLEPT[threading.get_ident()] = slept = []
    way.forward()
    forward = sum(slept)
    slept.clear()
    way.backward()
    return forward, sum(slept)


def test_sleep_is_as_long_as_the_work_of_the_ranks(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: SLEPT[threading.get_ident()].append(seconds))
    pairs = 4 * 512 * 512 / 2
    for order, longest in (("balanced", 1.0), ("contiguous", 1.75)):  # of the mean: 3.5 of the 8 half chunks, on the last of 4 ranks
        forward, backward = zip(*on_ranks(4, sleeps, order), strict=True)
        assert sum(forward) == pytest.approx(pairs * 1e-9)
        assert sum(backward) == pytest.approx(2.5 * pairs * 1e-9)
        assert max(forward) * 4 == pytest.approx(longest * sum(forward))
        assert max(backward) * 4 == pytest.approx(longest * sum(backward))


def test_documents_are_lognormal():
    lengths = documents(200_000, 500.0).unique(return_counts=True)[1].double()
    assert lengths.mean().item() == pytest.approx(500, rel=0.15)
    assert lengths.log().std().item() == pytest.approx(1, rel=0.15)
