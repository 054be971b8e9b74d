"""Private names of torch that nothing public stands in for, checked at import."""

from __future__ import annotations

from typing import Any

from torch.autograd import Function

if not hasattr(getattr(Function, "_backward_cls", None), "_forward_cls"):
    raise ImportError(
        "this version of torch has no Function._backward_cls._forward_cls (by which a node of autograd's graph tells its Function). "
        "lightning_overlap supports torch>=2.13,<2.14: install one of these."
    )


def is_node_of(node: Any, kind: type[Function]) -> bool:
    """Whether a node of autograd's graph (a ``grad_fn``) is the backward of a Function of this kind."""
    function = getattr(node, "_forward_cls", None)  # nodes of torch's own functions have none
    return function is not None and issubclass(function, kind)
