"""Sharded linear layers against unsharded ones: values and gradients, in real worlds."""

import gc
import itertools
import weakref
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_overlap.modes.tensor.config import METHODS
from lightning_overlap.modes.tensor.gemm import Exchange, growing
from lightning_overlap.modes.tensor.linear import gather_input, prepare_input
from lightning_overlap.modes.tensor.row import row_product
from lightning_overlap.ranks.group import Pending
from tests.modes.tensor.group import tensor_group
from tests.modes.tensor.region import Region, result_pairs


def largest_difference(settings: dict[str, Any], tokens: int, leading: tuple[int, ...], bias: bool, dtype: str, direct: bool) -> float:
    """Of output, the input's gradient and every parameter's, to the unsharded region."""
    exchange = Exchange(tensor_group(dist.get_world_size()), **settings)

    def connect(region: Region, tokens: int) -> Any:
        region.out.forward = partial(row_product, layer=region.out, exchange=exchange, name="region")  # type: ignore[method-assign]
        columns = [region.q, region.k]
        return lambda x: gather_input(x, columns, prepare_input(columns, exchange, "region"), tokens)

    pairs = result_pairs(exchange, connect, tokens, leading, bias, dtype, direct)
    return max((p.double() - q.double()).abs().max().item() if p.numel() else 0.0 for p, q in pairs)


def in_every_way(sharded: bool) -> list[Any]:
    """What differs, in which ways."""
    ways = [{}, {"overlapped": False}, {"splits": 3}, {"splits": 2, "keep_gathered": True}]
    shapes: list[tuple[int, tuple[int, ...]]] = [(8, (1,)), (7, (2,)), (9, ()), (1, (3,)), (5, (2, 2))]
    settings = [{"sharded": sharded, **way} for way in ways]
    several = itertools.product(settings, shapes, [True, False], [True, False])
    found = [(case, largest_difference(case[0], *case[1], case[2], "float64", case[3])) for case in several]
    return [(case, difference) for case, difference in found if difference > 1e-11]


OTHERS = [(product, method) for product, known in METHODS.items() for method in list(known)[1:]]
"""Methods that are no product's default."""


def by_every_method() -> list[Any]:
    """Which ones give something else."""
    ways: list[dict[str, str]] = [*({product: method} for product, method in OTHERS), dict(OTHERS)]
    several = itertools.product(ways, [(7, (2,)), (9, ())])
    found = [
        (way, largest_difference({"sharded": True, "splits": 3, "methods": way}, *shape, True, "float64", True))
        for way, shape in several
    ]
    return [(way, difference) for way, difference in found if difference > 1e-11]


@pytest.mark.parametrize("size", [2, 4])
def test_numbers_do_not_depend_on_the_method(world: Any, size: int) -> None:
    assert world(size).run(by_every_method) == [[]] * size


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_region_is_the_unsharded_one(world: Any, size: int, sharded: bool) -> None:
    assert world(size).run(in_every_way, sharded) == [[]] * size


def only_direct() -> float:
    """Where no column layer is called, but something else reads the input: the largest difference of its gradient."""
    group = tensor_group(dist.get_world_size())
    exchange = Exchange(group, sharded=True)
    region = Region(True, torch.float64)
    own = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    columns = [region.q, region.k]
    handle = gather_input(own * 1, columns, prepare_input(columns, exchange, "region"), 4 * group.size)
    (handle.square().sum() / group.size).backward()
    assert own.grad is not None
    return (own.grad - 2 * own.detach()).abs().max().item()


def test_a_region_whose_columns_are_left_out(world: Any) -> None:
    assert max(world(2).run(only_direct)) < 1e-12


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_in_lower_precision(world: Any, dtype: str, close: float) -> None:
    for overlapped in (True, False):
        settings = {"sharded": True, "overlapped": overlapped}
        assert max(world(2).run(largest_difference, settings, 6, (2,), True, dtype, False)) < close


def transfers(settings: dict[str, Any], beside: bool) -> list[str]:
    group = tensor_group(dist.get_world_size())
    group.log = []
    try:
        largest_difference(settings, 8, (1,), False, "float32", beside)
        return [transfer.label.removeprefix("tensor.").removesuffix("[region]") for transfer in group.log]
    finally:
        group.log = None


def test_what_is_transferred_and_in_which_order(world: Any) -> None:
    forward, backward = ["input", "output"], ["output_grad", "input", "input_grad"]
    assert world(2).run(transfers, {"sharded": True}, False)[0] == forward + backward  # one gather for both columns
    assert world(2).run(transfers, {"sharded": True, "keep_gathered": True}, False)[0] == [*forward, "output_grad", "input_grad"]
    assert world(2).run(transfers, {"sharded": False}, False)[0] == ["output", "input_grad"]


class Products(TorchDispatchMode):
    """Puts down matrix products among what is posted and waited for."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.append("product")
        return func(*args, **(kwargs or {}))


def order(overlapped: bool, prepared: bool, methods: dict[str, str] | None = None) -> list[str]:
    """Of one forward and backward of two regions, one after the other, on two ranks."""
    group = tensor_group(2)
    exchange = Exchange(group, sharded=True, overlapped=overlapped, splits=1, methods=methods or {})
    first, second = Region(False, torch.float32), Region(False, torch.float32)
    seen: list[str] = []
    prepared_inputs: list[Any] = [None, None]

    def label(transfer: Any) -> str:
        return str(transfer.label.removeprefix("tensor."))

    def wait(pending: Any) -> Any:
        if pending._finish is not None:
            seen.append(f"wait {label(pending.transfer)}")
        return real_wait(pending)

    def note(*args: Any) -> Any:
        transfer = real_note(*args)
        seen.append(f"post {label(transfer)}")
        return transfer

    def make(number: int) -> None:
        prepared_inputs[number] = prepare_input([regions[number].q, regions[number].k], exchange, f"{number}")

    def run(number: int, x: Tensor) -> Tensor:
        region = regions[number]
        if prepared_inputs[number] is None:
            make(number)
        handle = gather_input(x, [region.q, region.k], prepared_inputs[number], 8)
        between = partial(make, 1) if prepared and number == 0 else lambda: None
        more = {"input_state": handle.state, "local_input": handle.gathered.local, "between": between}
        region.out.forward = partial(row_product, layer=region.out, exchange=exchange, name=f"{number}", **more)  # type: ignore[method-assign]
        return region(handle, False)

    regions = [first, second]
    for region in regions:
        region.shard(group.rank, 2)
    x = torch.randn(4, 8, requires_grad=True)
    real_wait, real_note = Pending.wait, group.note
    with mock.patch.object(Pending, "wait", wait), mock.patch.object(group, "note", note), Products(seen):
        y = run(1, run(0, x * 1))
        seen.append("backward")
        y.sum().backward()
    return seen


def test_each_transfer_runs_beside_products(world: Any) -> None:
    said = world(2).run(order, True, True)[0]
    assert said == [
        *["post input[0]", *["product"] * 1, "wait input[0]", *["product"] * 3],  # this rank's tokens, then the others'
        *[*["product"] * 1, "post output[0]", *["product"] * 1, "wait output[0]"],  # the others' tokens, then this rank's
        *["post input[1]", *["product"] * 1, "wait input[1]", *["product"] * 3],
        *[*["product"] * 1, "post output[1]", *["product"] * 1, "wait output[1]"],
        "backward",
        *["post output_grad[1]", "post input[1]", *["product"] * 2, "wait output_grad[1]", *["product"] * 2],
        *[*["product"] * 2, "post input_grad[1]", *["product"] * 2],  # of both layers, the others' tokens first
        *[*["product"] * 2, "wait input_grad[1]"],  # the weights' gradients from this rank's tokens
        *["post output_grad[0]", "post input[0]", *["product"] * 2],
        *["wait input[1]", *["product"] * 2],  # from the others' tokens, under the gather of the layer before
        *["wait output_grad[0]", *["product"] * 2],
        *[*["product"] * 2, "post input_grad[0]", *["product"] * 2],
        *[*["product"] * 2, "wait input_grad[0]", "wait input[0]", *["product"] * 2],  # nothing comes before this region
    ]


def test_the_plain_twin_waits_where_it_posts(world: Any) -> None:
    said = world(2).run(order, False, False)[0]
    posts = [i for i, what in enumerate(said) if what.startswith("post")]
    assert len(posts) == 10
    assert all(said[i + 1] == said[i].replace("post", "wait") for i in posts)


def at_once(said: list[str]) -> set[str]:
    """What is waited for where it is posted, on the way there and back."""
    back = said.index("backward")
    posted = [(i, what.removeprefix("post ")) for i, what in enumerate(said) if what.startswith("post")]
    return {f"{what[:-3]} {'back' if i > back else 'there'}" for i, what in posted if said[i + 1] == f"wait {what}"}


@pytest.mark.parametrize(
    ("product", "transfer"),
    [
        ("column_fprop", "input there"),
        ("column_dgrad", "input_grad back"),
        ("column_wgrad", "input back"),
        ("row_fprop", "output there"),
        ("row_dgrad", "output_grad back"),
    ],
)
def test_a_product_by_itself_can_be_plain(world: Any, product: str, transfer: str) -> None:
    assert at_once(world(2).run(order, True, True, {product: "plain"})[0]) == {transfer}


def test_an_inputs_gradient_in_bulk(world: Any) -> None:
    said = world(2).run(order, True, True, {"column_dgrad": "bulk"})[0]
    at = said.index("post input_grad[1]")
    assert said[at - 7 : at + 4] == [
        *["wait output_grad[1]", *["product"] * 2],  # the row layer's
        *[*["product"] * 4, "post input_grad[1]"],  # of both layers, both ranks' tokens
        *[*["product"] * 2, "wait input_grad[1]"],  # the weights' gradients from this rank's tokens
    ]
    assert not at_once(said)


def pieces(methods: dict[str, str]) -> list[str]:
    """Labels of the transfers of which there is one piece, although three were asked for."""
    sent = transfers({"sharded": True, "splits": 3, "methods": methods}, False)
    return sorted(label for label in set(sent) if sent.count(label) % 3)


def test_only_what_is_multiplied_in_pieces_is_sent_in_pieces(world: Any) -> None:
    assert world(2).run(pieces, {})[0] == ["input"]  # three pieces and, in backward, one
    assert world(2).run(pieces, {"column_dgrad": "bulk", "row_fprop": "plain"})[0] == ["input", "input_grad", "output"]


@pytest.mark.parametrize(
    ("n", "pieces", "size", "offsets"),
    [(150, 4, 2, (0, 10, 30, 70, 150)), (1, 3, 2, (0, 0, 0, 1)), (8, 4, 1, (0, 2, 4, 6, 8)), (176, 4, 4, (0, 27, 63, 111, 176))],
)
def test_pieces_grow_as_fast_as_they_can_be_computed(n: int, pieces: int, size: int, offsets: tuple[int, ...]) -> None:
    assert growing(n, pieces, size) == offsets


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:  # type: ignore[override]
        raise ValueError("in the middle of a backward")


def _fails(found: Tensor, own: Tensor) -> None:
    with pytest.raises(ValueError, match="in the middle"):
        found.sum().backward()
    torch.ones(1, requires_grad=True).backward()  # torch lets go of what a failed backward had still to do in the next one


ENDS: dict[str, Any] = {
    "backward": lambda found, own: found.sum().backward(),
    "of the input only": lambda found, own: torch.autograd.grad(found.sum(), own),
    "no backward": lambda found, own: None,
    "a backward that fails": _fails,
}


def what_is_left(settings: dict[str, Any]) -> list[str]:
    """Ends after which an input's state, and so the graph of its step, is still in memory."""
    group = tensor_group(dist.get_world_size())
    exchange = Exchange(group, **settings)
    kept = []
    for name, end in ENDS.items():
        with torch.autocast("cpu", torch.bfloat16):
            region = Region(True, torch.float32)
            region.shard(group.rank, group.size)
            columns = [region.q, region.k]
            own = torch.randn(*((4, 8) if exchange.sharded else (4 * group.size, 8)), requires_grad=True)
            prepared = prepare_input(columns, exchange, "region")
            handle = gather_input(own * 1, columns, prepared, 4 * group.size)
            region.out.forward = partial(  # type: ignore[method-assign]
                row_product,
                layer=region.out,
                exchange=exchange,
                name="region",
                input_state=handle.state,
                local_input=handle.gathered.local,
            )
            if end is _fails:
                region.q.register_forward_hook(lambda _, __, y: _Fails.apply(y))
            end(region(handle, direct=True), own)
        never_read = prepare_input(columns, exchange, "region")
        states = [weakref.ref(prepared.state), weakref.ref(never_read.state)]
        del prepared, handle, region, never_read
        gc.collect()
        kept += [name] if any(state() is not None for state in states) else []
    return kept


@pytest.mark.parametrize("sharded", [True, False])
def test_no_state_of_an_input_is_left(world: Any, sharded: bool) -> None:
    ways: list[dict[str, Any]] = [{}, {"overlapped": False}, {"keep_gathered": True}, {"methods": dict(OTHERS)}]
    for way in ways:
        assert world(2).run(what_is_left, {"sharded": sharded, **way}) == [[], []], way
