"""Models that are made on the meta device: each rank gives memory to what it holds of them, and to nothing else.

What it holds is initialised as torch's and Hugging Face's modules do it themselves: by ``reset_parameters()`` of a module, then by
``_init_weights(module)`` of it or of the nearest module around it. What ``__init__`` did to the numbers is not known any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.state.absent import absent_like, is_absent
from lightning_overlap.torch_seams import apply_to, buffers_of, parameters_of, version_of

_LOST = "_lightning_overlap_lost"
"""Attribute of a parameter whose values another rank has, from a fit."""


def is_deferred(module: nn.Module) -> bool:
    """Whether something of the module has no memory on this rank."""
    return any(tensor.is_meta or _is_elsewhere(tensor) for _, _, _, tensor in _tensors(module))


def forget(module: nn.Module) -> None:
    """Parameters that only another rank has, after a fit, are on the meta device again; nobody will initialise them anew."""

    def lose(_: str, tensor: Tensor) -> Tensor | None:
        if not _is_elsewhere(tensor):
            return None
        setattr(tensor, _LOST, True)
        return tensor.to("meta")

    _replace(module, lose)


def materialize(module: nn.Module, device: torch.device, holds: Callable[[str], bool]) -> list[str]:
    """Gives memory to what is on the meta device, and moves the rest to the device.

    Args:
        module: the user's. Its parameters on the meta device are replaced.
        device: this rank's.
        holds: whether this rank holds a parameter or buffer, by name. What it does not gets the memory of one element.

    Returns:
        The names of the parameters and buffers that got memory. They are NaN until :func:`initialize`, see
        :mod:`lightning_overlap.state.absent`.
    """
    made: list[str] = []

    def make(name: str, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            return None
        if not holds(name):
            # Buffers are shared between the ranks as a whole, and are small.
            return absent_like(tensor, device) if isinstance(tensor, nn.Parameter) else torch.zeros_like(tensor, device=device)
        made.append(name)
        return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0, device=device)

    _replace(module, make)
    apply_to(module, lambda tensor: tensor if is_absent(tensor) else tensor.to(device))  # module.to would copy what is absent
    return made


@torch.no_grad()
def initialize(module: nn.Module, names: Iterable[str], load: Callable[[], None]) -> list[str]:
    """Gives values to what :func:`materialize` has made.

    Args:
        module: the user's.
        names: of what was made.
        load: loads a checkpoint, if there is one, once modules have initialised themselves.

    Returns:
        The names of what has got none.
    """
    tensors = {name: tensor for name, _, _, tensor in _tensors(module)}
    before = {name: version_of(tensor) for name, tensor in tensors.items()}
    parts = dict(module.named_modules())
    owners = {name.rpartition(".")[0] for name in names if not hasattr(tensors[name], _LOST)}
    for path in reversed(parts):  # from the inside out, as constructors do
        if path not in owners:
            continue
        for own in ("reset_parameters", "_reset_parameters"):
            if callable(method := getattr(parts[path], own, None)):
                method()
        around = [*(path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)), ""]
        near = next((parts[place] for place in around if callable(getattr(parts.get(place), "_init_weights", None))), None)
        if near is not None:
            near._init_weights(parts[path])
    load()
    for name in names:
        vars(tensors[name]).pop(_LOST, None)

    def is_empty(tensor: Tensor, version: int) -> bool:
        return bool(tensor.isnan().any()) if tensor.is_floating_point() else version_of(tensor) == version

    return [name for name in names if tensors[name].numel() and is_empty(tensors[name], before[name])]


def without_values(names: Sequence[str]) -> ConfigError:
    """The error of parameters and buffers that have got no values."""
    more = f" and {len(names) - 8} more" if names[8:] else ""
    return ConfigError(
        f"{', '.join(names[:8])}{more} came from the meta device, and nothing gives values: there is no reset_parameters() of the "
        "module, no _init_weights(module) around it that does, and no checkpoint; or another rank has the values, from a fit. "
        "Pass ckpt_path=, give the module one of these methods, or register it outside of torch.device('meta')"
    )


def _is_elsewhere(tensor: Tensor) -> bool:
    # A buffer may be made like this by the user.
    return isinstance(tensor, nn.Parameter) and not tensor.is_meta and is_absent(tensor)


def _tensors(module: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str, Tensor]]:
    """Name, the module's dictionary, key and value of each parameter and buffer, of what is tied by each of its names."""
    for path, part in module.named_modules(remove_duplicate=False):
        for store in (parameters_of(part), buffers_of(part)):
            for key, tensor in store.items():
                if tensor is not None:
                    yield f"{path}.{key}".lstrip("."), store, key, tensor  # type: ignore[misc]


def _replace(module: nn.Module, make: Callable[[str, Tensor], Tensor | None]) -> None:
    """Puts what ``make`` gives for a name and a tensor in the tensor's places; None leaves it."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for name, store, key, tensor in list(_tensors(module)):
        if id(tensor) not in made:
            new = make(name, tensor)
            if new is None:
                continue
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad)
                vars(new).update(vars(tensor))
            made[id(tensor)] = (tensor, new)
        store[key] = made[id(tensor)][1]
