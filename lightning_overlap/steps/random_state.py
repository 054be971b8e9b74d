"""Random numbers of a pipeline: each rank runs training_step for itself, and all must draw the same."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves no trace outside."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def pin(*place: int) -> None:
    """Torch, numpy and Python go on as decided by ``place`` alone."""
    seed = random.Random(repr(place)).getrandbits(63)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    pin_torch(seed)


def pin_torch(seed: int) -> None:
    """Torch alone."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed would put down a whole traceback where it is not
        torch.cuda.manual_seed_all(seed)
