"""The parameters that a rank updates, and clipping of gradients by their norm over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap.model.markers import is_counted_elsewhere, is_expert
from lightning_overlap.modes.base import OptimizerHolder, OverlapMode, Squares


def stepped_parameters(optimizer: Optimizer, modes: Sequence[OverlapMode]) -> Iterable[Tensor]:
    """Returns the parameters that a step updates on this rank: shards with their gradients, or the user's parameters."""
    for mode in modes:
        if isinstance(mode, OptimizerHolder) and (parameters := mode.stepped_parameters(optimizer)) is not None:
            return parameters
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_by_norm(parameters: Iterable[Tensor], modes: Sequence[OverlapMode], limit: float, device: torch.device) -> None:
    """Scales gradients, in place, so that their norm over all ranks is at most the limit. Collective.

    Args:
        parameters: of this rank; see :func:`stepped_parameters`.
        modes: sum the squares over ranks that hold different parts of the gradients.
        limit: the largest norm.
        device: of this rank. The norm is computed there, and the host does not wait for it.
    """
    stepped = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    counted = [(parameter, grad) for parameter, grad in stepped if not is_counted_elsewhere(parameter)]
    squares = Squares(
        dense=_sum_of_squares([grad for parameter, grad in counted if not is_expert(parameter)], device),
        experts=_sum_of_squares([grad for parameter, grad in counted if is_expert(parameter)], device),
    )
    for mode in modes:
        squares = mode.reduce_norm(squares)
    # A tensor, as in torch.nn.utils.clip_grad_norm_, so that the host does not wait for the device.
    scale = (limit / ((squares.dense + squares.experts).sqrt() + 1e-6)).clamp(max=1.0)
    for _, grad in stepped:
        grad.mul_(scale)


def _sum_of_squares(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sums the squares of gradients in fp64, where the sum does not overflow."""
    return torch.stack([_squares(grad) for grad in grads]).sum() if grads else torch.zeros((), dtype=torch.float64, device=device)


def _squares(grad: Tensor) -> Tensor:
    """Sums the squared absolute values of a gradient in fp64, where neither the squares nor the sum overflow."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    values = torch.view_as_real(values) if values.is_complex() else values
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return norm.double() ** 2
