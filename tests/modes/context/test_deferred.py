"""Values that are computed when they are read: the same numbers, later."""

from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.deferred import DeferredValues, Deferring, value_layers
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.seam import install
from tests.helpers.hugging import MODELS
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
    "a hook": lambda v: hooked(v),
    "a hook of a view, which is viewed": lambda v: hooked(v.view(2, 3, 2, 4)).transpose(1, 2),
    "without gradients": lambda v: (read_under(torch.no_grad(), v), v.view(-1))[1],
    "in inference": lambda v: (read_under(torch.inference_mode(), v.view(-1)), v.view(2, 24))[1],
    "other numbers": lambda v: v.view(torch.int32).view(torch.float32) + v,
}


def hooked(v: Tensor) -> Tensor:
    v.register_hook(lambda grad: 3 * grad)
    return v


def read_under(context: Any, v: Tensor) -> None:
    with context:
        v.norm()


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
    with mock.patch.object(F, "linear", side_effect=F.linear) as linear:
        v = deferred(layer, x)
        view = v.view(2, 3, 2, 4)
        assert not linear.call_count
        assert torch.equal(view + 0, view + 0)
        assert torch.equal(v.view(-1), view.reshape(-1))
        view.retain_grad()
        (2 * view).sum().backward()
    assert linear.call_count == 1
    assert torch.equal(view.grad, torch.full((2, 3, 2, 4), 2.0))


def test_it_is_computed_as_where_it_was_called() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        v = deferred(layer, x)
        expected = layer(x)
    assert v.dtype == torch.bfloat16
    assert torch.equal(v + 0, expected)


class Double(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_would_read_nothing_is_refused() -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    with pytest.raises(ConfigError, match=r"copy them before \(v = v.clone\(\)\)"):
        Double.apply(deferred(layer, x)).sum().backward()
    v = deferred(layer, x)
    with pytest.raises(ConfigError, match="a checkpoint of a function is called with"):
        checkpoint(torch.exp, v.view(-1), use_reentrant=False)
    checkpoint(torch.exp, deferred(layer, x).clone(), use_reentrant=False).sum().backward()


@pytest.mark.parametrize(
    "change", [lambda layer, x: x.add_(1), lambda layer, x: layer.weight.mul_(2), lambda layer, x: layer.bias.mul_(2)]
)
def test_what_was_changed_since_is_refused(change: Any) -> None:
    layer, x = nn.Linear(6, 8), torch.randn(2, 3, 6)
    v = deferred(layer, x)
    with torch.no_grad():
        change(layer, x)
    with pytest.raises(ConfigError, match="was changed in place between the projection and the attention"):
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
        deferred=[block.v_proj] if defer else (),
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


def test_layers_of_transformers() -> None:
    block = MODELS["llama"]().model.layers[0]
    assert list(value_layers(block)) == [block.self_attn.v_proj]
    assert not list(value_layers(Attention()))


def test_which_calls_are_deferred() -> None:
    layer, other = nn.Linear(6, 8), nn.Linear(6, 8)
    deferring, x = Deferring([layer]), torch.randn(2, 6)
    assert deferring.takes(x, layer.weight, layer.bias)
    assert not deferring.takes(x, other.weight, other.bias)
    assert not deferring.takes(nn.Parameter(x), layer.weight)
    with torch.no_grad():
        assert not deferring.takes(x, layer.weight)
    assert not deferring.takes(x[:, :5], layer.weight), "torch's error comes where the layer is called"
    assert not deferring.takes(x.double(), layer.weight)
    hooks = [layer.register_forward_hook, layer.register_full_backward_hook, layer.register_full_backward_pre_hook]
    for register in (*hooks, register_module_forward_hook, register_module_full_backward_hook):
        hook = register(lambda *_: None)
        assert not deferring.takes(x, layer.weight)
        hook.remove()
        assert deferring.takes(x, layer.weight)
