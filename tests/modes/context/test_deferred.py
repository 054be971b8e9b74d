"""Values that are computed when they are read: the same numbers, later."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.deferred import DeferredValues, Deferring, value_layers
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.seam import install
from tests.helpers.rank_threads import on_ranks


def deferred(layer: nn.Linear, x: Tensor) -> Any:
    return DeferredValues.of(x, layer.weight, layer.bias)


READS: dict[str, Any] = {
    "views": lambda v: v.view(2, 3, 2, 4).transpose(1, 2),
    "reshaped": lambda v: v.unflatten(-1, (2, 4)).permute(0, 2, 1, 3).reshape(2, 2, 12),
    "views of torch": lambda v: torch.transpose(torch.reshape(v, (2, 3, -1, 4)), 1, 2),
    "arithmetic": lambda v: v * 2 + v,
    "in place": lambda v: v.mul_(2),
    "in place, then a view": lambda v: (v.mul_(2), v.view(2, 3, 2, 4))[1],
    "a view, then in place": lambda v: (v.view(2, 3, 2, 4), v.mul_(2))[0],
    "joined": lambda v: torch.cat([v, v.detach()], -1),
    "indexed": lambda v: v[:, 1:, ::2],
    "chunks": lambda v: v.chunk(2, -1)[1],
}


@pytest.mark.parametrize("name", READS)
def test_what_reads_it_gets_the_projections_output(name: str) -> None:
    results = []
    for call in (lambda layer, x: layer(x), deferred):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6).requires_grad_()
        y = READS[name](call(layer, x))
        shape, dtype, device, count = y.shape, y.dtype, y.device, y.numel()
        y.square().sum().backward()
        results.append([y.detach() + 0, x.grad, layer.weight.grad, layer.bias.grad])
        assert (shape, dtype, device, count) == (y.shape, y.dtype, y.device, y.numel())
    for one, other in zip(*results, strict=True):
        assert type(other) is Tensor
        assert torch.equal(one, other)


def test_it_is_computed_once_and_only_when_it_is_read() -> None:

    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    v = deferred(layer, x).view(2, 3, 2, 4)
    assert v.projection._output is None
    assert torch.equal(v + 0, v + 0)
    assert v.projection._output is not None
    assert v.projection._arguments is None, "the input is not kept longer than autograd keeps it"


def test_it_is_computed_as_where_it_was_called() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        v = deferred(layer, x)
        expected = layer(x)
    assert v.dtype == torch.bfloat16
    with torch.no_grad():
        v.norm()  # a log, which must not take the gradient away
    assert torch.equal(v + 0, expected)
    (v + 0).sum().backward()
    assert layer.weight.grad is not None


class Double(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_would_read_nothing_is_refused() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    with pytest.raises(ConfigError, match="a function that torch does not know"):
        Double.apply(deferred(layer, x)).sum().backward()
    v = deferred(layer, x)
    with pytest.raises(ConfigError, match="a checkpoint of a function reads"):
        checkpoint(torch.exp, v.view(-1), use_reentrant=False)
    x.add_(1)
    with pytest.raises(ConfigError, match="was changed in place after the call"):
        v + 0


class Attention(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 8 * count) for count in (heads, kv_heads, kv_heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(-2)


class Recorded(TorchFunctionMode):
    """Records products of the projection whose weight it is given, and where their gradients are made."""

    def __init__(self, events: list[tuple[str, str]], weight: Tensor) -> None:
        super().__init__()
        self.events, self.weight = events, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight and not isinstance(result, DeferredValues):
            self.events.append(("compute", "values"))
            result.register_hook(lambda _: self.events.append(("compute", "values")))
        return result


def attend(group: Any, original: Attention, method: dict[str, Any], defer: bool) -> Any:
    block, tokens = deepcopy(original), 24
    layout = TokenLayout.balanced(tokens, group.size)
    x = (
        torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(0))[:, layout.positions(group.rank)]
        .clone()
        .requires_grad_()
    )
    attention = ContextAttention(group, **method)
    install(
        {"blocks.0": block},
        lambda q, k, v, mask, options: attention(q, k, v, mask, layout, options),
        lambda: LocalTokens(tokens, layout.positions(group.rank), group.rank),
        deferred=value_layers(block) if defer else (),
    )
    with Recorded(group.events, block.v_proj.weight):
        y = block(x)
    forward = len(group.events)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())], group.events[:forward], group.events[forward:]


@pytest.mark.parametrize(
    ("size", "method"), [(2, {"method": "a2a"}), (4, {"method": "a2a"}), (4, {"method": "a2a+p2p", "hierarchical_sizes": (2, 2)})]
)
def test_the_first_queries_travel_under_the_projection_of_the_values_and_their_gradients_too(
    size: int, method: dict[str, Any]
) -> None:
    block = Attention()
    later, now = (on_ranks(size, partial(attend, original=block, method=method, defer=defer)) for defer in (True, False))
    for (one, forward, backward), (other, *_) in zip(later, now, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for events, label in ((forward, "context.first_heads"), (backward, "context.last_head_grads")):
            assert events.index(("post", label)) < events.index(("compute", "values")) < events.index(("wait", label))


def test_pieces_have_nothing_to_wait_for() -> None:
    block = Attention()
    later, now = (on_ranks(2, partial(attend, original=block, method={"method": "p2p"}, defer=defer)) for defer in (True, False))
    for (one, *_), (other, *_) in zip(later, now, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_values_that_no_attention_takes_are_complete_when_the_block_ends() -> None:
    class Block(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.v_proj(x * 2)

    block = Block()
    install(
        {"blocks.0": block},
        lambda q, *_: q,
        lambda: LocalTokens(6, torch.arange(6)),
        deferred=[block.v_proj],
        attentionless=frozenset(),
    )
    _, v = block(torch.randn(2, 6, 16))
    assert v.projection._arguments is None
    assert torch.equal(v + 0, v.complete())


def test_the_names_of_layers() -> None:
    block = nn.ModuleDict({"self_attn": Attention(), "mlp": nn.ModuleDict({"value": nn.Identity(), "v_proj": nn.LayerNorm(4)})})
    assert list(value_layers(block)) == [block["self_attn"].v_proj]


def test_which_calls_are_deferred() -> None:
    layer, other = nn.Linear(6, 8), nn.Linear(6, 8)
    deferring, x = Deferring([layer]), torch.randn(2, 6)
    assert deferring.takes(x, layer.weight, layer.bias)
    assert not deferring.takes(x, other.weight, other.bias)
    assert not deferring.takes(nn.Parameter(x), layer.weight)
    with torch.no_grad():
        assert not deferring.takes(x, layer.weight)
    hook = layer.register_full_backward_hook(lambda *_: None)
    assert not deferring.takes(x, layer.weight)
    hook.remove()
    assert deferring.takes(x, layer.weight)
