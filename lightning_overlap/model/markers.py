"""Markers: attributes of a parameter by which one mode informs the others about it. They stay until the mode's release."""

from __future__ import annotations

from torch import Tensor

LATE_GRADIENT = "_lightning_overlap_late"
"""True: a mode completes the gradient in ``finish_backward`` (of a tied weight, say). Other modes must not reduce it before."""
STAGE = "_lightning_overlap_stage"
"""The number of the parameter's pipeline stage. Backward completes gradients of later stages first; forward reads their weights
last."""
COUNTED_ELSEWHERE = "_lightning_overlap_counted_elsewhere"
"""True: another rank has the same parameter and counts its gradient in the global norm. Its shards have the marker, too."""

EXPERT = "_lightning_overlap_expert"
"""True: the parameter belongs to this rank's experts. Its gradient is summed over the ranks with the same experts only."""


def has_late_gradient(parameter: Tensor) -> bool:
    """Whether a mode completes the parameter's gradient in ``finish_backward``."""
    return bool(getattr(parameter, LATE_GRADIENT, False))


def is_counted_elsewhere(parameter: Tensor) -> bool:
    """Whether another rank counts the parameter's gradient in the global norm."""
    return bool(getattr(parameter, COUNTED_ELSEWHERE, False))


def is_expert(parameter: Tensor) -> bool:
    """Whether the parameter belongs to experts that are spread over ranks. Its shards have the marker, too."""
    return bool(getattr(parameter, EXPERT, False))


def stage_of(parameter: Tensor) -> int:
    """The parameter's pipeline stage; 0 without a pipeline."""
    return int(getattr(parameter, STAGE, 0))


def clear_markers(parameter: Tensor) -> None:
    """Removes all markers of a parameter."""
    for marker in (LATE_GRADIENT, STAGE, COUNTED_ELSEWHERE, EXPERT):
        vars(parameter).pop(marker, None)
