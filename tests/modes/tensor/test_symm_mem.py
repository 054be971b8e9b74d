"""The fused backend's autograd, with torch's own fallbacks of the two operators, which run on gloo too."""

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as fallbacks

from lightning_overlap import ConfigError, OverlapStrategy, TensorParallel
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import Choice
from lightning_overlap.facts import Facts
from lightning_overlap.modes.tensor import config, symm_mem
from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.modes.tensor.mode import TensorMode
from lightning_overlap.plan import resolve
from lightning_overlap.ranks.group import Group
from tests.helpers.sequences import compare
from tests.modes.tensor.group import tensor_group
from tests.modes.tensor.region import Region, different_cases
from tests.trainer.tensor.test_numbers import train


def slow_operators(group: Group) -> symm_mem.Operators:
    gather, reduce = fallbacks._fused_all_gather_matmul_fallback, fallbacks._fused_matmul_reduce_scatter_fallback
    return symm_mem.Operators(gather, reduce, group.process_group.group_name)


def differences(dtype: str) -> list[Any]:
    """Cases in which output, the input's gradient or a parameter's differ from those of the unsharded region."""
    group = tensor_group(dist.get_world_size())
    exchange, fused = Exchange(group, sharded=True), slow_operators(group)

    def connect(region: Region, tokens: int) -> Any:
        region.out.forward = partial(symm_mem.row_product, layer=region.out, fused=fused)  # type: ignore[method-assign]
        return partial(symm_mem.gather_input, layers=[region.q, region.k], fused=fused, exchange=exchange, name="region")

    return different_cases(exchange, connect, dtype)


@pytest.mark.parametrize(("size", "dtype"), [(2, "float64"), (4, "float64"), (2, "bfloat16")])
def test_a_sharded_region_is_the_unsharded_one(world: Any, size: int, dtype: str) -> None:
    assert world(size).run(differences, dtype) == [[]] * size


def trained(tokens: int) -> Any:
    used: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        return fallbacks._fused_all_gather_matmul_fallback(*args, **kwargs)

    def operators(group: Group) -> symm_mem.Operators:
        return symm_mem.Operators(count, slow_operators(group).matmul_reduce_scatter, group.process_group.group_name)

    runs = Choice("symm_mem", "symm_mem", "")
    with mock.patch.object(symm_mem, "operators", operators), mock.patch.object(config, "_backend", return_value=runs):
        strategy = {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True, backend="symm_mem")}
        found = train(strategy, {"tokens": tokens}, accumulate_grad_batches=2, gradient_clip_val=0.1)
    return {**found, "used": len(used)}


@pytest.mark.parametrize("tokens", [8, 9])
def test_training_is_close_to_one_process(world: Any, tokens: int) -> None:
    expected = train(None, {"tokens": tokens}, accumulate_grad_batches=2, gradient_clip_val=0.1)
    for found in world(2).run(trained, tokens):
        compare(found, expected)
        assert bool(found["used"]) == (tokens == 8)  # p2p for a length that the ranks do not divide


def test_it_is_refused_where_it_cannot_run() -> None:
    own = OverlapStrategy(tensor_parallel=TensorParallel(size=2, backend="symm_mem", sequence_parallel=False)).config
    with pytest.raises(ConfigError, match="it needs CUDA, and the device is cpu; it needs sequence_parallel"):
        resolve(own, Facts(world_size=2))
    own = OverlapConfig(tensor_parallel=TensorParallel(size=2, backend="symm_mem"))
    assert "symm_mem" in resolve(own, Facts(world_size=2, device="cuda")).explain()
    off = resolve(OverlapConfig(tensor_parallel=own.tensor_parallel, overlap="off"), Facts(world_size=2))
    assert off.choices["tensor"].backend.value == "p2p", "its plain twin, of every comparison"
    with pytest.raises(ConfigError, match="must be p2p, symm_mem or userbuffers"):
        TensorParallel(size=2, backend="nvlink")  # type: ignore[arg-type]


def test_the_operators_run_without_autocast() -> None:
    """Which would have their products in another dtype than the buffers that they write them to (seen on CUDA)."""
    seen: list[bool] = []

    def gather(*_: Any, **__: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return None, None

    fused = symm_mem.Operators(gather, gather, "group")
    with torch.autocast("cpu", torch.bfloat16):
        fused.gather(torch.zeros(2, 2), [])
        fused.reduce(torch.zeros(2, 2), torch.zeros(2, 2))
    assert seen == [False, False]


def test_torch_has_the_operators() -> None:
    fused = symm_mem.operators(mock.Mock())
    assert "group_name" in str(fused.all_gather_matmul.default._schema)
    assert "scatter_dim" in str(fused.matmul_reduce_scatter.default._schema)


@pytest.mark.parametrize("backend", ["p2p", "symm_mem", "userbuffers"])
def test_transfers_in_kernels_are_said_to_be_unseen(backend: str) -> None:
    mode: Any = object.__new__(TensorMode)
    mode.choices = SimpleNamespace(backend=Choice(backend, backend, ""))
    assert mode.uncounted_transfers.startswith(f"tensor_parallel.backend {backend} sends in kernels of its own") == (backend != "p2p")
