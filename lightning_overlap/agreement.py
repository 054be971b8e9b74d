"""What ranks must have alike when a fit is set up, in words that are compared between them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer


def model_in_words(module: nn.Module) -> dict[str, str]:
    """Shapes and dtypes of parameters and buffers, and the order in which they are registered."""
    words = {f"parameter {n}": f"{tuple(p.shape)} {p.dtype} requires_grad={p.requires_grad}" for n, p in module.named_parameters()}
    words |= {f"buffer {name}": f"{tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()}
    return {**words, "the order of parameters and buffers": _digest(words)}


def optimizers_in_words(optimizers: Sequence[Optimizer], module: nn.Module) -> dict[str, str]:
    """Classes, parameter groups and their settings (learning rates, ...), and which parameters each group has, in which order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    words = {"the number of optimizers": str(len(optimizers))}
    for number, optimizer in enumerate(optimizers):
        words[f"the class of optimizer {number}"] = type(optimizer).__name__
        for place, group in enumerate(optimizer.param_groups):
            where = f"group {place} of optimizer {number}"
            words |= {f"{key} in {where}": repr(value) for key, value in group.items() if key not in ("params", "param_names")}
            held = [names.get(id(parameter), "not the module's") for parameter in group["params"]]
            words[f"the parameters in {where}"] = f"{len(held)} ({', '.join(held[:3])}, ...; digest {_digest(held)})"
    return words


def _digest(words: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
