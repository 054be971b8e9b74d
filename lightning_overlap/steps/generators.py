"""Random number generators of the user's own, which no seed of torch, NumPy or Python reaches."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import nn


def pin_generators(module: nn.Module, seed: int) -> None:
    """Generators that are attributes of the module go on as decided by ``seed`` alone, each with numbers of its own."""
    numpy: Any = sys.modules.get("numpy")
    for number, value in enumerate(vars(module).values()):
        own = (seed + number) % 2**32
        if isinstance(value, torch.Generator):
            value.manual_seed(own)
        elif isinstance(value, random.Random) or (numpy and isinstance(value, numpy.random.RandomState)):
            value.seed(own)
        elif numpy and isinstance(value, numpy.random.Generator):
            value.bit_generator.state = type(value.bit_generator)(own).state
