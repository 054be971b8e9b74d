"""Random numbers for sharded activations: all ranks draw the same numbers, except dropout masks.

A random decision of a block (to skip itself, to drop a sample) must be the same on all ranks, otherwise they wait for each other; and
it must be the one that a single process takes. Dropout masks must differ, because ranks have different tokens or heads. So inside the
blocks all ranks use common numbers, and the generator's state is marked. Torch's dropout functions look for the mark, and draw numbers
of this rank if they find it. The mark is a seed in the generator's state, which no number is drawn from. An activation checkpoint
restores it with the state, so its second forward draws the same numbers, in whichever thread it runs.

A mask that a block draws itself (``torch.bernoulli``) is the same on each rank, for different tokens. Its probability is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap.model.stand_in import StandIn
from lightning_overlap.steps.dropout import DROPOUTS, SEEDS, drops_samples, rank_numbers
from lightning_overlap.steps.forward import Forwards

_MARK = 1 << 63
"""Seeds from ``_MARK`` to ``_MARK + SEEDS`` are marks. A user's seed is smaller; or negative, which becomes larger."""
_FUNCTIONS = (*((owner, name, 1) for owner, name in DROPOUTS), (F, "scaled_dot_product_attention", 4))
"""Functions that draw masks: owner, name, and the position of the probability in the arguments."""


@dataclass
class _Mark:
    """Whether one forward has marked the generator's state.

    Attributes:
        seed_before: the seed in the state before the mark; None: the state is not marked.
        is_masking: whether it draws a mask now. (Attention may wait for other ranks meanwhile, and another forward run.)
    """

    seed_before: int | None = None
    is_masking: bool = False


class CommonNumbers:
    """Makes random numbers common to the ranks from :meth:`start` to :meth:`stop`, except dropout masks.

    Args:
        rank: this rank in the tensor group.
        device: its random numbers are common too, besides the CPU's.
        forwards: the forwards under way, each of which starts and stops by itself.

    Attributes:
        without_masks: dropout is off, and draws nothing.
    """

    def __init__(self, rank: int, device: torch.device, forwards: Forwards) -> None:
        self._rank = rank
        self._device = device
        self._forwards = forwards
        self.without_masks = False

    def start(self) -> None:
        """Marks the generator's state, unless it is marked. All ranks must call it at the same points."""
        mark = self._forwards.current.of(_Mark)
        if mark.seed_before is None:
            state = torch.default_generator.get_state()
            mark.seed_before = _seed_of(state)
            torch.default_generator.set_state(_with_seed(state, _MARK + mark.seed_before % SEEDS))

    def stop(self) -> None:
        """Removes the mark, if there is one."""
        mark = self._forwards.current.of(_Mark)
        if mark.seed_before is not None:
            torch.default_generator.set_state(_with_seed(torch.default_generator.get_state(), mark.seed_before))
            mark.seed_before = None

    @contextmanager
    def masks(self) -> Iterator[None]:
        """Inside, torch's dropout functions look for the mark. They are replaced in the whole process."""
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in _FUNCTIONS]
        for (owner, name, function), (*_, position) in zip(plain, _FUNCTIONS, strict=True):
            setattr(owner, name, self._masking(function, position))
        try:
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)

    def _masking(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        """A dropout function that draws this rank's mask if the generator's state is marked."""

        @functools.wraps(function)
        def masking(*args: Any, **kwargs: Any) -> Any:
            # Compiled code cannot read the mark: its masks are common.
            if torch.compiler.is_compiling() or self.without_masks or not _is_marked():
                return function(*args, **kwargs)
            mark = self._forwards.current.of(_Mark)
            if mark.is_masking:
                return function(*args, **kwargs)
            probability = args[position] if len(args) > position else kwargs.get("p", kwargs.get("dropout_p", int(position == 1)))
            mark.is_masking = True  # torch's functions may call each other by the replaced names
            try:
                if not probability or not _is_sharded(args[0] if args else kwargs.get("input")):
                    return function(*args, **kwargs)
                with rank_numbers(self._rank, self._device):
                    return function(*args, **kwargs)
            finally:
                mark.is_masking = False

        return masking


def _seed_of(state: Tensor) -> int:
    """The seed in a state of the CPU's generator."""
    return int(state[:8].view(torch.int64)) % (1 << 64)


def _with_seed(state: Tensor, seed: int) -> Tensor:
    """A state with another seed, from which the same numbers are drawn."""
    state = state.clone()
    state[:8].view(torch.int64).fill_(seed - (1 << 64) if seed >= 1 << 63 else seed)
    return state


def _is_marked() -> bool:
    return _MARK <= torch.default_generator.initial_seed() < _MARK + SEEDS


def _is_sharded(x: Any) -> bool:
    """Whether ranks have different parts of the tensor that a mask is for. They have the same complete input of an attention or mlp,
    and the same single number for each sample, which drops samples."""
    return not isinstance(x, StandIn) and not drops_samples(x)
