"""Which tokens this rank has in one forward, and the masks of that forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.torch_seams import version_of


@dataclass(eq=False)
class LocalTokens:
    """The tokens of one sequence that this rank has in one forward.

    Attributes:
        tokens: length S of the sequence.
        positions: of this rank's tokens, ``(s,)``, int64, ascending.
        rank: this rank among those that have the other tokens; None: each rank has all tokens.
    """

    tokens: int
    positions: Tensor
    rank: int | None = None
    _latest: tuple[Tensor, int, Mask] | None = field(default=None, init=False, repr=False)

    @property
    def count(self) -> int:
        """The number of this rank's tokens."""
        return len(self.positions)

    def mask_of(self, bias: Tensor) -> Mask:
        """The mask of a tensor that the user passes: the same for all layers that are given the same tensor.

        Args:
            bias: broadcastable to ``(B, H, S, S)``, bool or additive.
        """
        version = 0 if bias.is_inference() else version_of(bias)
        if self._latest is None or self._latest[0] is not bias or self._latest[1] != version:
            self._latest = bias, version, Mask(self.tokens, bias=bias)
        return self._latest[2]
