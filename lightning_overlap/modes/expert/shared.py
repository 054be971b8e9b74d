"""Computes shared experts, which every token takes, while the tokens of the others travel. The user's block stays as it is.

A block calls its shared experts before it calls the router (Qwen2-MoE), or after the routed experts have returned (DeepSeek-V3). In
both cases they run while the first tokens travel, and their output is kept for the block's own call:

    block calls them last:   router, experts [post, SHARED, wait, ...], shared experts (returns what is kept)
    block calls them first:  shared experts [router, experts [post, SHARED, wait, ...]], router, experts (return what is kept)

Which one a block does, and with which tensors, is seen in a trial call on the meta device, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_overlap.model.copies import copy_to_meta
from lightning_overlap.model.expert_layers import ExpertLayer
from lightning_overlap.model.patches import Hook, replace_method
from lightning_overlap.steps.forward import Forwards
from lightning_overlap.torch_seams import is_view_of, version_of

RoutedExperts = Callable[..., Tensor]
"""Computes routed experts: hidden states ``(T, H)``, indices and weights ``(T, k)``, and ``shared``: what to compute while tokens
travel, or None."""


@dataclass(frozen=True)
class Order:
    """When a block calls its shared experts, and with what.

    Attributes:
        when: before the router, or after the routed experts.
        is_flat: whether they get the block's input with one dim of tokens, as the routed experts do.
        obstacle: why they cannot compute at another time; empty if they can.
    """

    when: Literal["before", "after"] = "after"
    is_flat: bool = False
    obstacle: str = ""


def order_of_calls(model: nn.Module, layer: ExpertLayer) -> Order:
    """Finds out how a block calls its shared experts: runs a copy of it on the meta device, where nothing is computed.

    Args:
        model: the user's.
        layer: the experts. They are not run.
    """
    if layer.shared is None:
        return Order(obstacle="the model has no shared experts")
    if layer.router is None:
        return Order(obstacle=f"the router of {layer.name} is not known: give it the role router in parallel_plan")
    block = copy_to_meta(model.get_submodule(layer.block))
    names = {"shared": layer.shared, "router": layer.router, "experts": layer.name}
    parts = {part: block.get_submodule(name[len(layer.block) + 1 :]) for part, name in names.items()}
    if any(isinstance(m, nn.Dropout) and m.p for part in ("shared", "router") for m in parts[part].modules()):
        return Order(obstacle=f"{layer.shared} or {layer.router} has dropout, whose masks depend on the order")
    down: Any = parts["experts"].down_proj
    features = down.shape[-1 if layer.module.is_transposed else 1]
    hidden = torch.empty(1, 2, features, device="meta", dtype=down.dtype, requires_grad=True).clone()
    calls = _record(parts)
    try:
        block(hidden)
    except Exception as error:  # a block may need anything: its failure is the finding
        return Order(obstacle=f"{layer.block} cannot be run apart from the model ({type(error).__name__}: {error})")
    return _order(layer, hidden, calls)


@dataclass(frozen=True)
class _Call:
    """A part's call in a trial call of the block: the name of the part, its positional arguments, its result."""

    part: str
    arguments: tuple[Any, ...]
    result: Any


def _order(layer: ExpertLayer, hidden: Tensor, calls: list[_Call]) -> Order:
    """Reads the calls of a trial call with the block's input ``hidden``."""
    obstacle = f"{layer.block} calls {layer.shared} in a way that is not known"
    by_part = {call.part: call for call in calls}
    order = [call.part for call in calls]
    if order not in (["router", "experts", "shared"], ["shared", "router", "experts"]):
        return Order(obstacle=f"{obstacle}: the order is {', '.join(order)}")
    shared, router, experts = (by_part[part] for part in ("shared", "router", "experts"))
    if [len(call.arguments) for call in (shared, experts)] != [1, 3]:
        return Order(obstacle=f"{obstacle}: with further arguments")
    (given,) = shared.arguments
    if order[0] == "router":
        if given is hidden or _is_flat(given, hidden):
            return Order("after", is_flat=given is not hidden)
        return Order(obstacle=f"{obstacle}: not with the input of {layer.block}")
    routed, indices, weights = experts.arguments
    is_routing = isinstance(router.result, tuple) and len(router.result) == 3
    if is_routing and indices is router.result[2] and weights is router.result[1] and routed is given and router.arguments == (given,):
        return Order("before")
    return Order(obstacle=f"{obstacle}: router and experts get other tensors")


def _is_flat(x: Any, base: Tensor) -> bool:
    """Whether ``x`` is a view of ``base`` with one dim of tokens."""
    is_view = isinstance(x, Tensor) and is_view_of(x, base) and x.requires_grad  # not detached
    return is_view and x.shape == (base.shape[:-1].numel(), base.shape[-1])


def _record(parts: dict[str, nn.Module]) -> list[_Call]:
    """Records the calls of modules, and has experts return hidden states without computing anything. Returns the calls to come."""
    calls: list[_Call] = []

    def run(part: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = torch.empty_like(args[0]) if part == "experts" else forward(*args, **kwargs)
        calls.append(_Call(part, (*args, *kwargs.values()), result))
        return result

    for part, module in parts.items():
        replace_method(module, "forward", partial(run, part, module.forward))
    return calls


class _Kept:
    """A result that was computed before the block called for it.

    Args:
        arguments: of the call that is to come.
        result: what it returns.
    """

    def __init__(self, arguments: tuple[Tensor, ...], result: Any) -> None:
        self._arguments, self.result = arguments, result
        self._versions = [version_of(x) for x in arguments]

    def fits(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call has these arguments, which nobody has changed in place."""
        if self._versions != [version_of(x) for x in self._arguments] or len(arguments) != len(self._arguments):
            return False
        return all(a is b or _is_same(a, b) for a, b in zip(arguments, self._arguments, strict=True))


def _is_same(a: Any, b: Tensor) -> bool:
    """Whether two tensors are views of the same elements."""
    if not isinstance(a, Tensor) or (a.shape, a.stride(), a.dtype, a.requires_grad) != (b.shape, b.stride(), b.dtype, b.requires_grad):
        return False
    return a.data_ptr() == b.data_ptr()


@dataclass
class _State:
    """The state of one forward.

    Attributes:
        inputs: by name of a block, its input.
        kept: by name of a module, what its next call returns.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, _Kept] = field(default_factory=dict)


def _apart(x: Tensor) -> Tensor:
    """The input of shared experts that are called first, as a node of its own.

    Wherever they compute, autograd first sums their gradients of ``x``, and adds the sum last, since the node is the oldest.
    """
    return x.view_as(x)


class SharedExperts:
    """The forwards of a block's parts, with which its shared experts compute while tokens travel.

    Args:
        model: the user's. Its parts have their own forwards.
        layer: the experts.
        order: how the block calls them, without an obstacle.
        dispatch: computes the routed experts.
        forwards: the forwards under way.
        overlapped: whether shared experts compute while tokens travel. Otherwise the block computes as it is, with the same bits.
    """

    def __init__(
        self, model: nn.Module, layer: ExpertLayer, order: Order, dispatch: RoutedExperts, forwards: Forwards, *, overlapped: bool
    ) -> None:
        assert layer.shared is not None, "without it there is an obstacle"
        assert layer.router is not None, "without it there is an obstacle"
        self._layer, self._order, self._dispatch, self._forwards, self._overlapped = layer, order, dispatch, forwards, overlapped
        self._block = model.get_submodule(layer.block)
        self._names = {"shared": layer.shared, "router": layer.router, "experts": layer.name}
        self._parts = {part: model.get_submodule(name) for part, name in self._names.items()}
        self._plain = {part: module.forward for part, module in self._parts.items()}

    def install(self) -> Iterator[Callable[[], None]]:
        """Replaces the forwards. Yields functions that put them back."""
        if not self._overlapped:
            if self._order.when == "before":
                yield replace_method(self._parts["shared"], "forward", lambda x: self._plain["shared"](_apart(x)))
            yield replace_method(self._parts["experts"], "forward", partial(self._dispatch, shared=None))
        elif self._order.when == "after":
            yield self._block.register_forward_pre_hook(Hook(self._keep_input), with_kwargs=True).remove
            yield replace_method(self._parts["shared"], "forward", self._run_shared)
            yield replace_method(self._parts["experts"], "forward", self._run_experts_with_shared)
        else:
            yield replace_method(self._parts["shared"], "forward", self._run_shared_first)
            yield replace_method(self._parts["router"], "forward", self._run_router)
            yield replace_method(self._parts["experts"], "forward", self._run_experts)

    @property
    def _state(self) -> _State:
        return self._forwards.current.of(_State)

    def _take(self, part: str, *arguments: Any) -> _Kept | None:
        """What was kept for this call of a part; None if nothing was, or something else."""
        kept = self._state.kept.pop(self._names[part], None)
        return kept if kept is not None and kept.fits(arguments) else None

    # -- after the routed experts ---------------------------------------------------------------------------------------

    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._state.inputs[self._layer.block] = next(iter((*args, *kwargs.values())))

    def _run_experts_with_shared(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        x = self._state.inputs.pop(self._layer.block)
        if torch.is_inference_mode_enabled():  # where changes in place are not seen
            return self._dispatch(hidden, indices, weights, shared=None)

        def compute_shared() -> None:
            given = x.flatten(0, -2) if self._order.is_flat else x
            self._state.kept[self._names["shared"]] = _Kept((given,), self._plain["shared"](given))

        try:
            return self._dispatch(hidden, indices, weights, shared=compute_shared)
        except BaseException:  # an activation checkpoint ends its second forward here, and the block does not call for what is kept
            self._state.kept.pop(self._names["shared"], None)
            raise

    def _run_shared(self, x: Tensor) -> Tensor:
        kept = self._take("shared", x)
        result: Tensor = self._plain["shared"](x) if kept is None else kept.result
        return result

    # -- before the router -----------------------------------------------------------------------------------------------

    def _run_shared_first(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():  # where changes in place are not seen
            result: Tensor = self._plain["shared"](x)
            return result
        given = _apart(x)
        results: list[Tensor] = []
        routing = self._plain["router"](x)
        _, weights, indices = routing
        output = self._dispatch(x, indices, weights, shared=lambda: results.append(self._plain["shared"](given)))
        self._state.kept[self._names["router"]] = _Kept((x,), routing)
        self._state.kept[self._names["experts"]] = _Kept((x, indices, weights), output)
        return results[0]

    def _run_router(self, x: Tensor) -> Any:
        kept = self._take("router", x)
        return self._plain["router"](x) if kept is None else kept.result

    def _run_experts(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        kept = self._take("experts", hidden, indices, weights)
        output: Tensor = self._dispatch(hidden, indices, weights, shared=None) if kept is None else kept.result
        return output
