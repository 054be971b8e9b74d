"""The only file that uses private names of torch. They are checked at import, and each has a function or a name here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function, Variable, profiler
from torch.nn.modules import module as modules
from torch.optim import Optimizer

TensorKind = TypeVar("TensorKind", bound=Tensor)
SUPPORTED = "lightning_overlap supports the versions of torch in its requirements: install one of these."
try:
    from torch._C import DisableTorchFunctionSubclass as WithoutSubclasses
    from torch._C import _autograd as autograd
    from torch._C import _distributed_c10d as c10d
    from torch._dynamo import OptimizedModule as CompiledModule
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as IndexedByTensors
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormatEncoding
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode
    from torch.utils._pytree import tree_leaves, tree_map
    from torch.utils.flop_counter import flop_registry
except ImportError as error:
    raise ImportError(f"lightning_overlap needs a name that this version of torch lacks ({error}). {SUPPORTED}") from error

__all__ = [
    "BatchNorm",
    "CompiledModule",
    "DispatchMode",
    "IndexedByTensors",
    "MemoryFormatEncoding",
    "WithoutSubclasses",
    "c10d",
    "tree_leaves",
    "tree_map",
]

PRIVATE_NAMES: tuple[tuple[Any, str, str], ...] = (
    (nn.Module(), "_parameters", "guarded, so that weights are complete before a read"),
    (nn.Module(), "_buffers", "buffers by module, which may register others"),
    (nn.Module(), "_modules", "the blocks of a list that a stand-in replaces"),
    (nn.Module(), "_apply", "moves all but absent parameters to a device"),
    (nn.Module(), "_forward_hooks", "called with the output of a module"),
    (nn.Module(), "_backward_hooks", "a function of autograd is called with the output of a module"),
    (nn.Module(), "_backward_pre_hooks", "the same"),
    (modules, "_global_forward_hooks", "the same for all modules"),
    (modules, "_global_backward_hooks", "the same"),
    (modules, "_global_backward_pre_hooks", "the same"),
    (nn.Module(), "_compiled_call_impl", "shows that a module was compiled in place"),
    (Tensor, "_version", "counts the writes to a tensor"),
    (Tensor, "_make_wrapper_subclass", "a tensor without memory"),
    (Tensor, "_base", "the tensor of which another one is a view"),
    (getattr(Function, "_backward_cls", None), "_forward_cls", "the Function of a node of autograd's graph"),
    (Variable, "_execution_engine", "calls a function at the end of a backward"),
    (autograd, "_top_saved_tensors_default_hooks", "tells that a checkpoint was entered"),
    (torch._C, "_current_graph_task_id", "tells that this thread runs a backward"),
    (torch.overrides, "_get_current_function_mode_stack", "a lane's thread computes under the caller's function modes"),
    (torch.overrides, "_push_mode", "the same"),
    (torch.overrides, "_pop_mode", "the same"),
    (profiler, "_is_profiler_enabled", "shows whether a profiler runs: a span costs 20 microseconds even if none does"),
    (Optimizer, "register_step_pre_hook", "fills _optimizer_step_pre_hooks"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", "attention that also gives the log-sum-exp of its logits"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", "its gradients from a merged log-sum-exp"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention", "its formula of operations, and its backward's"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention_backward", "the same"),
    (torch.ops.aten, "_grouped_mm", "has no formula of operations"),
    (torch.ops.aten, "_scaled_dot_product_efficient_attention", "the same on CUDA"),
    (torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", "its gradients"),
    (dist.distributed_c10d, "_get_default_store", "the store of the world, over which errors are announced"),
    (dist.distributed_c10d, "_world", "the count of groups, from which torch makes their names"),
)
"""The object with the attribute, its name, its use."""
for _owner, _name, _use in PRIVATE_NAMES:
    if not hasattr(_owner, _name):
        raise ImportError(f"this version of torch has no {_name} of {_owner!r} ({_use}). {SUPPORTED}")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the module's dictionary of parameters, without those of its submodules."""
    return module._parameters


def set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Replaces the module's dictionary of parameters."""
    module._parameters = parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns the module's dictionary of buffers, without those of its submodules."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """Returns the module's dictionary of its direct submodules."""
    return module._modules


def apply_to(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces each parameter and buffer of the module by the result of a function, as ``module.to`` does."""
    module._apply(function)


def reads_output(module: nn.Module) -> bool:
    """Whether hooks read the output of a module, or a function of autograd is called with it, which calls hooks in backward."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def is_guard_failure(error: Exception) -> bool:
    """Whether torch has compiled a function for a tensor that it then does not know again: a placeholder."""
    return isinstance(error, AssertionError) and str(error).startswith("Guard failed on the same frame")


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has compiled the module or its call."""
    return isinstance(module, CompiledModule) or module._compiled_call_impl is not None


def is_node_of(node: Any, kind: type[Function]) -> bool:
    """Whether a node of autograd's graph (a ``grad_fn``) is the backward of a Function of this kind."""
    function = getattr(node, "_forward_cls", None)  # nodes of torch's own functions have none
    return function is not None and issubclass(function, kind)


def version_of(tensor: Tensor) -> int:
    """Returns the number of in-place writes to a tensor."""
    return tensor._version


def without_memory(kind: type[TensorKind], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> TensorKind:
    """A tensor of a subclass that has a shape and no memory. It needs a gradient: a hook tells where one comes."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device, requires_grad=True)


def is_in_backward() -> bool:
    """Whether this thread runs a backward, in which an activation checkpoint computes a part of the forward again."""
    return torch._C._current_graph_task_id() != -1


def is_view_of(view: Tensor, base: Tensor) -> bool:
    """Whether a tensor is a view of another one, which is no view itself."""
    return view._base is base


def after_backward(function: Callable[[], None]) -> None:
    """Calls a function at the end of the backward under way. Call it inside a backward."""
    Variable._execution_engine.queue_callback(function)


def saved_tensor_hooks() -> Any:
    """What autograd calls now for each tensor that it saves: an activation checkpoint's functions, for one; None: nothing."""
    return autograd._top_saved_tensors_default_hooks(False)


def function_modes() -> list[Any]:
    """Returns the function modes of this thread (``torch.set_default_device`` is one), the outermost first."""
    return torch.overrides._get_current_function_mode_stack()


@contextmanager
def running_function_mode(mode: Any) -> Iterator[None]:
    """Inside, this thread computes under a function mode that another thread has entered."""
    torch.overrides._push_mode(mode)
    try:
        yield
    finally:
        torch.overrides._pop_mode()


def dispatch_modes() -> list[DispatchMode]:
    """Returns the dispatch modes of this thread (a counter of operations is one), the outermost first."""
    return _get_current_dispatch_mode_stack()


@contextmanager
def running_dispatch_mode(mode: DispatchMode) -> Iterator[None]:
    """Inside, this thread computes under a dispatch mode that another thread has entered."""
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode()


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Returns functions that count an operator's floating-point operations: of its arguments and, as ``out_val``, its result.

    They are those of ``torch.utils.flop_counter``, which lacks attention on the CPU, products in groups and products that are added in
    place (torch 2.13).
    """
    aten = torch.ops.aten
    return {
        aten.addmm_: flop_registry[aten.addmm],
        aten.baddbmm_: flop_registry[aten.baddbmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
        aten._grouped_mm: _grouped_product_flops,
        **flop_registry,
    }


def _grouped_product_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    rows = a.shape[-2] if b.dim() == 2 else a.numel() // a.shape[-1]  # groups share the columns of a matrix in two dims
    return 2 * rows * a.shape[-1] * b.shape[-1]


def is_profiled() -> bool:
    """Whether torch's profiler runs, or another profiler that records its spans."""
    return profiler._is_profiler_enabled


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer has hooks before or after its step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def forget_step_hooks(optimizer: Optimizer) -> None:
    """Removes the hooks of an optimizer's step."""
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float, grad: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Attention on the CPU.

    Args:
        q: ``(B, H, q, D)``, not empty, float16, bfloat16, float32 or float64.
        k: ``(B, heads, k, D)``, where H is a multiple of the heads.
        v: as ``k``.
        causal: query i sees the keys up to i.
        bias: added to the logits, broadcastable to them, of the dtype of ``q``.
        scale: the logits are multiplied by it.
        grad: None, or the output's gradient, the output and the log-sum-exp, both of all keys, of which these may be a part.

    Returns:
        Without ``grad`` the output ``(B, H, q, D)`` and the log-sum-exp ``(B, H, q)``, fp32 or fp64, which is 0 where a query sees
        nothing; with it the gradients of ``q``, ``k`` and ``v``.
    """
    if grad is None:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad[0], q, k, v, *grad[1:], 0.0, causal, attn_mask=bias, scale=scale)


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float, grad: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """As :func:`flash_attention`, on CUDA, of as many heads of ``k`` as of ``q``; ``bias`` is of the shape of the logits.

    Its log-sum-exp is padded to a multiple of 32 queries, and infinite where a query sees nothing.
    """
    if grad is None:
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        return operator(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    state = torch.zeros((), dtype=torch.long, device=q.device)  # of dropout's random numbers, which are not drawn
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    return backward(grad[0], q, k, v, bias, *grad[1:], state, state, 0.0, wanted, causal, scale=scale)[:3]


def default_store() -> Any:
    """Returns the store of the process group of all ranks."""
    return dist.distributed_c10d._get_default_store()


def group_count() -> int:
    """Returns the number of groups of this process, from which torch makes the next group's name."""
    return dist.distributed_c10d._world.group_count


def set_group_count(count: int) -> None:
    """Sets the number from which torch makes the next group's name. Ranks must agree on it."""
    dist.distributed_c10d._world.group_count = count


def start_fake_world(rank: int, size: int) -> None:
    """Makes a world of which this process is the only rank, and whose transfers do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def register_symmetric_memory() -> None:
    """Registers torch's operators of symmetric memory."""
    import torch.distributed._symmetric_memory  # noqa: F401
