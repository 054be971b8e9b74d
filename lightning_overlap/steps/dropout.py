"""Dropout of tensors that are sharded over ranks: a rank draws masks of its own, and all other random numbers stay common.

So a later decision at random (to skip a block, say) is the same on all ranks, though they have drawn masks of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DROPOUTS: tuple[tuple[Any, str], ...] = (
    *((F, name) for name in ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")),
    *((torch, name) for name in ("dropout", "dropout_", "native_dropout")),
)
"""Torch's functions that drop numbers of a tensor, ``(input, p, training)``: owner and name."""
DROPOUT_FUNCTIONS = frozenset(getattr(owner, name) for owner, name in DROPOUTS)
SEEDS = 1 << 47
"""Seeds of masks are smaller than this, before the rank is added."""


def original(function: Any) -> Any:
    """The one of :data:`DROPOUTS` for which a function stands for a time: torch looks itself up by its name. Else the function."""
    wrapped = getattr(function, "__wrapped__", None)
    return wrapped if wrapped in DROPOUT_FUNCTIONS else function


def drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of one of :data:`DROPOUTS` may drop something."""
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(probability) and training is not False


def drops_samples(x: Any) -> bool:
    """Whether a mask for ``x`` has a number a sample, so that samples are dropped: all ranks must drop the same ones."""
    # Judged by features: a rank may have one token or none while others have more, and all ranks must get the same answer.
    return isinstance(x, Tensor) and not any(n > 1 for n in x.shape[1:])


@contextmanager
def rank_numbers(rank: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws this rank's numbers. All ranks must enter it, with common numbers, and have common ones afterwards.

    Args:
        rank: this rank's number.
        device: whose generator is used, besides the CPU's.
    """
    seed = int(torch.randint(SEEDS, (), device="cpu")) + rank
    common = torch.default_generator.get_state()
    common_on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    torch.default_generator.manual_seed(seed)
    if common_on_device is not None:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(common)
        if common_on_device is not None:
            torch.cuda.set_rng_state(common_on_device, device)
