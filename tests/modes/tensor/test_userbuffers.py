"""Transformer Engine's backend against a stand-in that has its signatures and computes in plain torch what its modules say they do."""

import inspect
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, PipelineParallel, TensorParallel
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import Choice
from lightning_overlap.facts import Facts
from lightning_overlap.modes.tensor import config, userbuffers
from lightning_overlap.modes.tensor.config import TensorFacts
from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.plan import resolve
from tests.helpers.sequences import compare
from tests.modes.tensor.group import tensor_group
from tests.modes.tensor.region import Region, different_cases
from tests.trainer.tensor.test_numbers import Net, train

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "transformer_engine.json").read_text())
EMPTY = inspect.Parameter.empty
SIGNATURES = {
    name.partition(":")[2]: inspect.Signature(
        [inspect.Parameter(p["name"], inspect.Parameter.POSITIONAL_OR_KEYWORD, default=p.get("default", EMPTY)) for p in parameters]
    )
    for name, parameters in GOLDEN["signatures"].items()
}


class Gather(Function):
    """Of the first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Scatter.apply(grad, ctx.group), None


class Scatter(Function):
    """The sum over the ranks, of which each has its part of the first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Gather.apply(grad, ctx.group), None


class Fake:
    """Transformer Engine, as far as it is known: every call is put down, and bound to its signature."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, tuple[str, ...]]] = []
        self.buffers: Any = None
        self.names: list[str] = []
        self.library = userbuffers.Library(partial(FakeLinear, self), self.initialize, self.destroy)

    def bind(self, what: str, args: Any, kwargs: Any) -> dict[str, Any]:
        self.calls.append((what, len(args), tuple(kwargs)))
        return SIGNATURES[what].bind(*args, **kwargs).arguments

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        given = self.bind("initialize_ub", args, kwargs)
        assert self.buffers is None, "they are initialized already"
        assert given["bootstrap_backend"] in ("nccl", "gloo", "mpi")
        assert given["shape"][0] % given["tp_size"] == 0
        dist.barrier()  # of the world, as the groups that it makes
        self.buffers = (*given["shape"], given["dtype"])

    def destroy(self, *args: Any, **kwargs: Any) -> None:
        self.bind("destroy_ub", args, kwargs)
        self.buffers = None


class FakeLinear(nn.Module):
    def __init__(self, fake: Fake, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = fake.bind("Linear.__init__", args, kwargs)
        assert fake.buffers is not None, "the buffers come first"
        assert given["sequence_parallel"]
        assert not given["bias"], "no part of what is compared below"
        assert given["ub_name"] in ("qkv", "fc1") if given["parallel_mode"] == "column" else ("proj", "fc2")
        self.fake, self.group, self.size = fake, given["tp_group"], given["tp_size"]
        self.column = given["parallel_mode"] == "column"
        out, features = given["out_features"], given["in_features"]
        parts = given.get("parameters_split")
        assert parts is None or sum(parts.values()) == out
        divided = {f"{part}_weight": n // self.size for part, n in parts.items()} if parts else {"weight": out}
        self.names = list(divided)
        assert given["device"] == "meta"
        for name, n in divided.items():
            shape = (n, features if self.column else features // self.size)
            setattr(self, name, nn.Parameter(torch.empty(shape, device="meta")))
        self.shapes = [getattr(self, name).shape for name in self.names]
        fake.names.append(given["ub_name"])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inp = self.fake.bind("Linear.forward", args, kwargs)["inp"]
        weights = [getattr(self, name) for name in self.names]
        assert [weight.shape for weight in weights] == self.shapes
        weight = torch.cat(weights).to(inp.dtype)
        assert inp.is_contiguous(), "it views it"
        x = Gather.apply(inp, self.group) if self.column else inp
        features = inp.shape[-1] if self.column else weight.shape[0]
        assert self.fake.buffers == (x.shape[:-1].numel(), features, inp.dtype)
        y = x @ weight.t()
        return y if self.column else Scatter.apply(y, self.group)


def differences(dtype: str) -> Any:
    """Cases in which output, the input's gradient or a parameter's differ from those of the unsharded region; and the calls."""
    exchange, fake = Exchange(tensor_group(dist.get_world_size()), sharded=True), Fake()

    def connect(region: Region, tokens: int) -> Any:
        engine, columns = userbuffers.UserbuffersLayers(fake.library, exchange), [region.q, region.k]
        region.out.forward = partial(engine.row_product, layer=region.out, name="out", region="region")  # type: ignore[method-assign]

        def gather(x: Tensor) -> Tensor:
            engine.start(x, tokens)
            assert engine.fits((*x.shape[:-2], tokens), 8, x, columns)
            return engine.gather_input(x, columns, tokens, "region")

        return gather

    return different_cases(exchange, connect, dtype), fake.calls


@pytest.mark.parametrize(("size", "dtype"), [(2, "float64"), (4, "float64"), (2, "bfloat16")])
def test_a_sharded_region_is_the_unsharded_one(world: Any, size: int, dtype: str) -> None:
    found = world(size).run(differences, dtype)
    assert [wrong for wrong, _ in found] == [[]] * size
    for what, positional, named in found[0][1]:
        SIGNATURES[what].bind(*range(positional), **dict.fromkeys(named))
    assert {what for what, _, _ in found[0][1]} == set(SIGNATURES), "all that is used of it, and no more"


def only_direct() -> float:
    """Where something reads the input twice and no column layer is called: the largest difference of its gradient."""
    group = tensor_group(dist.get_world_size())
    engine = userbuffers.UserbuffersLayers(Fake().library, Exchange(group, sharded=True))
    region = Region(True, torch.float64)
    region.shard(group.rank, group.size)
    own = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    engine.start(own, 4 * group.size)
    group.log = []
    handle = engine.gather_input(own, [region.q, region.k], 4 * group.size, "region")
    (handle.square().sum() / group.size + handle.sum() / group.size).backward()
    labels, group.log = [transfer.label for transfer in group.log], None
    assert labels == ["tensor.input[region]", "tensor.input_grad[region]"], "gathered once"
    assert own.grad is not None
    return (own.grad - 2 * own.detach() - 1).abs().max().item()


def test_the_input_is_read_by_something_else(world: Any) -> None:
    assert max(world(2).run(only_direct)) < 1e-12


RUNS = Choice("userbuffers", "userbuffers", "")


def smaller_batches(net: Net) -> DataLoader:
    return DataLoader(net.loader().dataset, batch_size=2)


def train_and_validate(*args: Any, **kwargs: Any) -> Any:
    with mock.patch.object(Net, "val_dataloader", smaller_batches):  # which do not fit
        return train(*args, **kwargs)


def trained(lengths: tuple[int, ...], model: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """Several times: a process has one set of buffers, of one shape."""
    fake, found = Fake(), []
    strategy = {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True, backend="userbuffers")}
    for tokens in lengths:
        fake.calls.clear()
        fake.names.clear()
        library = mock.patch.object(userbuffers, "library", return_value=fake.library)
        with library, mock.patch.object(config, "_backend", return_value=RUNS):
            told = train_and_validate(strategy, {**model, "tokens": tokens}, **trainer)
        assert fake.buffers is None, "given back at the end"
        called = [what for what, _, _ in fake.calls]
        found.append({**told, "counts": {what: called.count(what) for what in SIGNATURES}, "names": list(fake.names)})
    return found


TRAINERS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "accumulation and clipping": ((8, 6), {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "validated first": ((8,), {"bias": False}, {"num_sanity_val_steps": 1}),
    "recomputed": ((8,), {"recompute": False}, {}),
    "not divided": ((9,), {}, {}),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_training_is_close_to_one_process(world: Any, case: str) -> None:
    lengths, model, trainer = TRAINERS[case]
    expected = [train_and_validate(None, {**model, "tokens": tokens}, **trainer) for tokens in lengths]
    for found in world(2).run(trained, lengths, model, trainer):
        for told, alone, tokens in zip(found, expected, lengths, strict=True):
            compare(told, alone)
            assert told["weights"].keys() == alone["weights"].keys()
            assert told["counts"]["initialize_ub"] == 1
            layers = 0 if tokens % 2 else 3 * 2 * 2  # by block and region a column and a row layer; else p2p
            assert told["counts"]["Linear.__init__"] == layers
            assert told["counts"]["Linear.forward"] >= 5 * layers  # of five steps
            assert told["names"] == ([] if tokens % 2 else ["qkv", "proj", "fc1", "fc2"] * 3)


def test_what_does_not_fit_is_said_once() -> None:
    library = userbuffers.Library(mock.Mock(), mock.Mock(), mock.Mock())
    engine = userbuffers.UserbuffersLayers(library, Exchange(mock.Mock(size=2), sharded=True))
    layer, x = nn.Linear(8, 4), torch.zeros(3, 2, 8, requires_grad=True)
    assert not engine.fits((3, 4), 8, x, [layer]), "before the first step"
    engine.start(x, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.fits((3, 4), 8, x, [layer])
        with torch.no_grad():  # a validation may have other batches
            assert not engine.fits((3, 6), 8, x, [layer])
    with pytest.warns(UserWarning, match=r"for 12 tokens x 8 features in torch.float32; 18 .* in sequences of 6, go by p2p"):
        assert not engine.fits((3, 6), 8, x, [layer])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not engine.fits((4, 3), 8, x, [layer]), "as many tokens, which are not divided"
        assert not engine.fits((3, 4), 6, x, [layer])
        assert not engine.fits((3, 4), 8, x.detach(), [layer])
        assert not engine.fits((3, 4), 8, x.bfloat16(), [layer])
        layer.weight.requires_grad_(False)
        assert not engine.fits((3, 4), 8, x, [layer])
        with torch.no_grad():
            assert engine.fits((3, 4), 8, x, [layer])


def planned(tensor: dict[str, Any] | None = None, facts: dict[str, Any] | None = None, **given: Any) -> Any:
    own = TensorParallel(**{"size": 2, "backend": "userbuffers", **(tensor or {})})
    here = {"device": "cuda", "precision": "bf16-mixed", "transformer_engine": "2.20", **(facts or {})}
    return resolve(OverlapConfig(tensor_parallel=own, **given), Facts(world_size=4, **here))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"facts": {"device": "cpu"}}, "it needs CUDA, and the device is cpu"),
        ({"facts": {"transformer_engine": None}}, r"not installed: pip install 'lightning-overlap\[te\]'"),
        ({"facts": {"precision": "32-true"}}, "precision is 32-true: set precision: bf16-mixed or bf16-true"),
        ({"facts": {"of_modes": (TensorFacts("", (), 0, ("h.0.attn.c_attn",)),)}}, r"weights of h.0.attn.c_attn are \(in, out\)"),
        ({"tensor": {"sequence_parallel": False}}, "it needs sequence_parallel"),
        ({"tensor": {"overlap": False}}, "it cannot run without overlap, which is off"),
        ({"tensor": {"keep_gathered_input": True}}, "set keep_gathered_input: false"),
        ({"tensor": {"splits": 2}}, "set splits: auto"),
        ({"pipeline_parallel": PipelineParallel(size=2, microbatches=2)}, "set pipeline_parallel: 1"),
        ({"facts": {"device": "cpu"}, "tensor": {"splits": 2}}, "CUDA, and .*splits: auto.*Or use backend: p2p"),
    ],
)
def test_it_is_refused_where_it_cannot_run(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel.backend: userbuffers cannot run here: .*{words}"):
        planned(**given)


def test_the_plan_says_whose_layers_run() -> None:
    backend = planned().choices["tensor"].backend
    assert backend.value == "userbuffers"
    assert "linear layers of Transformer Engine 2.20, with its own transfers" in backend.why
    off = planned(overlap="off", facts={"device": "cpu"})
    assert off.choices["tensor"].backend.value == "p2p", "its plain twin, of every comparison"
