"""Materializes models that were made on the meta device: each rank gives memory only to the tensors that it holds.

Their values come from the modules, as torch and Hugging Face initialize them: from ``reset_parameters()`` of a module, then from
``_init_weights(module)`` of the module or of the nearest module around it. Values that ``__init__`` set on the meta device are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.state.absent import absent_like, is_absent
from lightning_overlap.torch_seams import apply_to, buffers_of, parameters_of, version_of

_LOST = "_lightning_overlap_lost"
"""Attribute of a parameter whose values are on another rank, after a fit."""


def is_deferred(module: nn.Module) -> bool:
    """Whether a parameter or buffer of the module has no memory on this rank."""
    return any(tensor.is_meta or _is_absent_parameter(tensor) for _, _, _, tensor in _tensors(module))


def move_absent_to_meta(module: nn.Module) -> None:
    """Moves parameters that only another rank has, after a fit, to the meta device, marked: :func:`initialize` must not reset them."""

    def move(_: str, tensor: Tensor) -> Tensor | None:
        if not _is_absent_parameter(tensor):
            return None
        setattr(tensor, _LOST, True)
        return tensor.to("meta")

    _replace(module, move)


def materialize(module: nn.Module, device: torch.device, holds: Callable[[str], bool]) -> list[str]:
    """Gives memory to tensors on the meta device, and moves all others to the device.

    Args:
        module: the user's module. Its parameters on the meta device are replaced.
        device: this rank's device.
        holds: whether this rank holds a parameter or buffer, by name. Each other parameter gets the memory of one element.

    Returns:
        The names of the tensors that got memory. They are NaN until :func:`initialize`, see :mod:`lightning_overlap.state.absent`.
    """
    names: list[str] = []

    def make(name: str, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            return None
        if not holds(name):
            # Buffers are small, and ranks share them unsharded.
            return absent_like(tensor, device) if isinstance(tensor, nn.Parameter) else torch.zeros_like(tensor, device=device)
        names.append(name)
        return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0, device=device)

    _replace(module, make)
    apply_to(module, lambda tensor: tensor if is_absent(tensor) else tensor.to(device))  # module.to gives memory
    return names


@torch.no_grad()
def initialize(module: nn.Module, names: Iterable[str], load: Callable[[], None]) -> list[str]:
    """Gives values to the tensors that :func:`materialize` gave memory.

    Args:
        module: the user's module.
        names: the names that :func:`materialize` returned.
        load: loads a checkpoint, if there is one. Called after modules have initialized themselves.

    Returns:
        The names of the tensors that got no values.
    """
    tensors = {name: tensor for name, _, _, tensor in _tensors(module)}
    before = {name: version_of(tensor) for name, tensor in tensors.items()}
    modules = dict(module.named_modules())
    owners = {name.rpartition(".")[0] for name in names if not hasattr(tensors[name], _LOST)}
    for path in reversed(modules):  # inner modules first, as in constructors
        if path not in owners:
            continue
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(method := getattr(modules[path], name, None)):
                method()
        around = [*(path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)), ""]
        nearest = next((modules[outer] for outer in around if callable(getattr(modules.get(outer), "_init_weights", None))), None)
        if nearest is not None:
            nearest._init_weights(modules[path])
    load()
    for name in names:
        vars(tensors[name]).pop(_LOST, None)

    def is_empty(tensor: Tensor, version: int) -> bool:
        return bool(tensor.isnan().any()) if tensor.is_floating_point() else version_of(tensor) == version

    return [name for name in names if tensors[name].numel() and is_empty(tensors[name], before[name])]


def no_values_error(names: Sequence[str]) -> ConfigError:
    """Returns the error of parameters and buffers for which :func:`initialize` found no values."""
    more = f" and {len(names) - 8} more" if names[8:] else ""
    return ConfigError(
        f"{', '.join(names[:8])}{more} came from the meta device and got no values: neither reset_parameters() of the module, nor "
        "_init_weights(module) of a module around it, nor a checkpoint sets them. After a fit, another rank may have the values. "
        "Pass ckpt_path=, give the module one of these methods, or create it outside of torch.device('meta')"
    )


def _is_absent_parameter(tensor: Tensor) -> bool:
    # A user may expand a buffer like an absent tensor.
    return isinstance(tensor, nn.Parameter) and not tensor.is_meta and is_absent(tensor)


def _tensors(module: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor]]:
    """Yields the name, the module's dictionary, the key and the value of each parameter and buffer; tied ones once for each name."""
    for path, submodule in module.named_modules(remove_duplicate=False):
        for store in (parameters_of(submodule), buffers_of(submodule)):
            for key, tensor in store.items():
                if tensor is not None:
                    yield f"{path}.{key}".lstrip("."), store, key, tensor  # type: ignore[misc]


def _replace(module: nn.Module, make: Callable[[str, Tensor], Tensor | None]) -> None:
    """Replaces each tensor by the result of ``make(name, tensor)``, under all of its names; None keeps it."""
    replacements: dict[int, tuple[Tensor, Tensor]] = {}
    for name, store, key, tensor in list(_tensors(module)):
        if id(tensor) not in replacements:
            new = make(name, tensor)
            if new is None:
                continue
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad)
                vars(new).update(vars(tensor))
            replacements[id(tensor)] = (tensor, new)
        store[key] = replacements[id(tensor)][1]
