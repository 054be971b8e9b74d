"""What an optimizer does, found by trying it: may it see flat pieces, and may it step a part of its parameters at a time?"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.facts import OptimizerFacts


def examine(optimizer: Optimizer) -> OptimizerFacts:
    """Steps a copy of the optimizer, with its own hyperparameters, on a small matrix: whole, and in two flat pieces.

    Elementwise optimizers (SGD, Adam, AdamW, Lion, ...) give the same numbers. Those that look at a whole matrix (Muon,
    Adafactor, Shampoo, LAMB) do not, and neither do those whose steps draw random numbers: they keep whole parameters.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        return OptimizerFacts(name, elementwise=False, separable=False, reason="L-BFGS evaluates the loss inside its step")
    groups = [_only(group) for group in optimizer.param_groups if group["params"]]
    whole = [_steps(optimizer, group, pieces=False, apart=False) for group in groups]
    if not all(_alike(w, _steps(optimizer, g, pieces=True, apart=False)) for w, g in zip(whole, groups, strict=True)):
        return OptimizerFacts(name, elementwise=False, separable=False, reason=f"{name} does not update each element on its own")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(optimizer, "_optimizer_step_post_hooks", None)
    if hooks:
        return OptimizerFacts(name, elementwise=True, separable=False, reason=f"{name} has step hooks, to be called once a step")
    if not all(_alike(w, _steps(optimizer, g, pieces=True, apart=True)) for w, g in zip(whole, groups, strict=True)):
        return OptimizerFacts(name, elementwise=True, separable=False, reason=f"{name} cannot step a part of its parameters at a time")
    return OptimizerFacts(name, elementwise=True, separable=True, reason=f"{name} updates each element on its own")


def _only(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _alike(whole: Tensor | None, pieces: Tensor | None) -> bool:
    return whole is not None and pieces is not None and torch.allclose(whole, pieces, rtol=1e-6, atol=1e-7)


def _steps(optimizer: Optimizer, group: dict[str, Any], *, pieces: bool, apart: bool) -> Tensor | None:
    """The matrix after three steps; None if the optimizer refuses it."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(3)]

    def cut(x: Tensor) -> list[Tensor]:
        return [piece.clone() for piece in x.flatten().split(12)] if pieces else [x.clone()]

    parameters = [nn.Parameter(piece) for piece in cut(start)]
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**copy.deepcopy(group), "params": parameters}]
    step = type(optimizer).step
    random_state = torch.get_rng_state()
    try:
        for gradient in gradients:
            for parameter, piece in zip(parameters, cut(gradient), strict=True):
                parameter.grad = piece
            if not apart:
                step(probe)  # type: ignore[call-arg]
                continue
            for parameter in parameters:
                probe.param_groups[0]["params"] = [parameter]
                step(probe)  # type: ignore[call-arg]
    except Exception:
        return None  # it needs a matrix, and says so in its own way: not elementwise
    finally:
        torch.set_rng_state(random_state)
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
