"""Random numbers where activations are cut over the ranks: all ranks draw the same, but for masks of dropout.

What a block decides at random (to be left out, to drop a sample) must be decided alike on all ranks, or they wait for each other; and
as one process would decide it. Masks of dropout must differ: ranks have other tokens, other heads. So the numbers inside are the
common ones, and are marked: torch's dropout functions, where they find the mark, draw this rank's own. The mark is in the seed that
a generator's state tells, and that nothing is drawn from. An activation checkpoint puts it back with the state: what runs again draws
the same again, wherever it runs.

A mask that a block draws by hand (``torch.bernoulli``) is the same on each rank, of other tokens: no rank has another chance.
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
from lightning_overlap.steps.forward import Forwards

_BITS = 47
_MARK = 1 << 63
"""Seeds from here to ``_MARK + (1 << _BITS)`` are ours: a user's are smaller, or negative, which are the largest."""
_FUNCTIONS = (
    *((F, name, 1) for name in ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")),
    *((torch, name, 1) for name in ("dropout", "dropout_", "native_dropout")),
    (F, "scaled_dot_product_attention", 4),
)
"""Those that draw masks, and the place of the probability in their arguments."""


@dataclass
class _Mark:
    """Whether one forward has marked the generator's state.

    Attributes:
        seed_before: the seed that the state told of before; None: it is not marked.
    """

    seed_before: int | None = None


class CommonNumbers:
    """Random numbers from :meth:`start` to :meth:`stop` are common to the ranks, and masks of dropout are this rank's own.

    Args:
        rank: tells this rank from the others.
        device: whose random numbers these are, besides the CPU's.
        forwards: tells which forward is computed: each starts and stops for itself.
    """

    def __init__(self, rank: int, device: torch.device, forwards: Forwards) -> None:
        self._rank = rank
        self._cuda = device if device.type == "cuda" else None
        self._forwards = forwards
        self._masking_now = False
        self.without_masks = False
        """Dropout is off, and draws nothing."""

    def start(self) -> None:
        """To be called at the same places on all ranks. Nothing, if they have started already."""
        mark = self._forwards.current.of(_Mark)
        if mark.seed_before is None:
            state = torch.default_generator.get_state()
            mark.seed_before = _seed_of(state)
            torch.default_generator.set_state(_with_seed(state, _MARK + mark.seed_before % (1 << _BITS)))

    def stop(self) -> None:
        """Nothing, if they have not started."""
        mark = self._forwards.current.of(_Mark)
        if mark.seed_before is not None:
            torch.default_generator.set_state(_with_seed(torch.default_generator.get_state(), mark.seed_before))
            mark.seed_before = None

    @contextmanager
    def masks(self) -> Iterator[None]:
        """Inside, torch's dropout functions find the mark. They are replaced for the whole process, at no cost for all others."""
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in _FUNCTIONS]
        for (owner, name, function), (*_, place) in zip(plain, _FUNCTIONS, strict=True):
            setattr(owner, name, self._masking(function, place))
        try:
            yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)

    def _masking(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def masking(*args: Any, **kwargs: Any) -> Any:
            # Compiled code cannot ask for the mark: its masks are common.
            if torch.compiler.is_compiling() or self._masking_now or self.without_masks or not _is_marked():
                return function(*args, **kwargs)
            probability = args[place] if len(args) > place else kwargs.get("p", kwargs.get("dropout_p", int(place == 1)))
            self._masking_now = True  # torch's functions may call each other, by the names that were replaced
            try:
                if not probability or not _is_cut(args[0] if args else kwargs.get("input")):
                    return function(*args, **kwargs)
                seed = int(torch.randint(1 << _BITS, (), device="cpu"))
                common = self._state()
                self._seed(seed + self._rank)
                try:
                    return function(*args, **kwargs)
                finally:
                    self._restore(common)
            finally:
                self._masking_now = False

        return masking

    def _state(self) -> tuple[Tensor, Tensor | None]:
        return torch.default_generator.get_state(), None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._cuda is not None:
            with torch.cuda.device(self._cuda):
                torch.cuda.manual_seed(seed)

    def _restore(self, state: tuple[Tensor, Tensor | None]) -> None:
        cpu, cuda = state
        torch.default_generator.set_state(cpu)
        if cuda is not None and self._cuda is not None:
            torch.cuda.set_rng_state(cuda, self._cuda)


def _seed_of(state: Tensor) -> int:
    """The seed that a state of the CPU's generator begins with."""
    return int(state[:8].view(torch.int64)) % (1 << 64)


def _with_seed(state: Tensor, seed: int) -> Tensor:
    """A state that gives the same numbers, and tells of another seed."""
    state = state.clone()
    state[:8].view(torch.int64).fill_(seed - (1 << 64) if seed >= 1 << 63 else seed)
    return state


def _is_marked() -> bool:
    return _MARK <= torch.default_generator.initial_seed() < _MARK + (1 << _BITS)


def _is_cut(x: Any) -> bool:
    """Whether ranks have different parts of what a mask is for: not the whole input of an attention or mlp, nor one number a sample,
    with which a sample is dropped."""
    # By features, not tokens: a rank may have one token, or none, where others have more, and all must answer alike.
    return not isinstance(x, StandIn) and (not isinstance(x, Tensor) or any(n > 1 for n in x.shape[1:]))
