"""Random numbers of a step that runs in parts.

Each rank calls ``training_step`` itself, and all must draw the same random numbers. So generators are seeded by the step's key, the
microbatch's number and the block's number: the rank and the order of the computation have no influence.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_SEEDS = 2**63 - 1


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restores the state of torch's (CPU and ``device``), NumPy's and Python's generators at the end."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def seed_all(*key: int) -> None:
    """Seeds torch's, NumPy's and Python's generators from ``key``."""
    seed = random.Random(repr(key)).getrandbits(63)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    seed_torch(seed)


def seed_torch(seed: int) -> None:
    """Seeds torch's generators."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # else torch.manual_seed would queue the call, with its traceback
        torch.cuda.manual_seed_all(seed)


def seed_generators(module: nn.Module, *key: int) -> None:
    """Seeds generators that are attributes of the module, each with another seed. No global seed reaches them."""
    first = random.Random(repr(key)).getrandbits(32)
    numpy: Any = sys.modules.get("numpy")
    for number, value in enumerate(vars(module).values()):
        seed = (first + number) % 2**32
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random) or (numpy and isinstance(value, numpy.random.RandomState)):
            value.seed(seed)
        elif numpy and isinstance(value, numpy.random.Generator):
            value.bit_generator.state = type(value.bit_generator)(seed).state


def seed_backward(key: Sequence[int], microbatch: int, stage: int) -> None:
    """Seeds torch's generators for the backward of a stage: what ran before, or runs beside it in a lane, has no influence."""
    seed_torch(hash((*key, microbatch, -1 - stage)) & _SEEDS)


def block_seeder(key: Sequence[int], microbatch: int) -> Callable[[int], None]:
    """Returns a function that seeds torch's generators for a block, from the step's key, the microbatch and the block's number."""
    return lambda block: seed_torch(hash((*key, microbatch, block)) & _SEEDS)
