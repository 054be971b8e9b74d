"""What an attention computes beside the products of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionOptions:
    """The options of one attention.

    Attributes:
        scale: the logits are multiplied by it; None: ``1 / sqrt(D)``.
        dropout: probability with which a pair is dropped, by numbers of torch's generator.
        softcap: the logits become ``softcap * tanh(logits / softcap)``, before the mask; None: they stay.
        sinks: ``(H,)``, a logit a head that takes weight and has no value. Its gradient is that of this rank's tokens and heads.
            None: there are none.
    """

    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = AttentionOptions()
"""Logits scaled as usual, and nothing else."""
