"""What an optimizer does, found by trying it: may it see flat pieces, and may it step a part of its parameters at a time?"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.facts import OptimizerFacts

SHAPE = (4, 6)


def examine(optimizer: Optimizer) -> OptimizerFacts:
    """Steps copies of the optimizer, with its own hyperparameters, on two small matrices: together, alone, and cut in pieces.

    Elementwise optimizers (SGD, Adam, AdamW, Lion, ...) always give the same numbers. Those that look at a whole matrix (Muon,
    Adafactor, Shampoo, LAMB) do not when it is cut, and neither do those whose steps draw random numbers: they keep whole
    parameters. Those that look at all parameters at once (a norm over all of them) differ when one is alone.
    """
    name = type(optimizer).__name__

    def facts(reason: str, *, independent: bool = True, elementwise: bool = False, separable: bool = False) -> OptimizerFacts:
        return OptimizerFacts(name, independent, elementwise, separable, f"{name} {reason}")

    if isinstance(optimizer, torch.optim.LBFGS):
        return facts("evaluates the loss inside its step", independent=False)
    groups = [_only(group) for group in optimizer.param_groups if group["params"]]
    matrices, pieces = [slice(0, 24), slice(24, 48)], [slice(0, 12), slice(12, 24), slice(24, 48)]
    whole = [_steps(optimizer, group, matrices) for group in groups]

    def alike(parts: Sequence[slice], *, apart: bool = False) -> bool:
        return all(_alike(w, _steps(optimizer, g, parts, apart=apart)) for w, g in zip(whole, groups, strict=True))

    if all(w is not None for w in whole) and not alike(matrices[:1]):
        return facts("looks at all parameters at once", independent=False)
    if not alike(pieces):
        return facts("does not update each element on its own")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return facts("has step hooks, to be called once a step", elementwise=True)
    if not alike(pieces, apart=True):
        return facts("cannot step a part of its parameters at a time", elementwise=True)
    return facts("updates each element on its own", elementwise=True, separable=True)


def _only(group: dict[str, Any]) -> dict[str, Any]:
    """A group's hyperparameters; a schedule that warms up from zero would hide what a step does."""
    kept = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if kept.get("lr") is not None and not float(kept["lr"]):
        kept["lr"] = 1e-2
    return kept


def _alike(whole: Tensor | None, parts: Tensor | None) -> bool:
    return whole is not None and parts is not None and torch.allclose(whole[: len(parts)], parts, rtol=1e-6, atol=1e-7)


def _steps(optimizer: Optimizer, group: dict[str, Any], parts: Sequence[slice], *, apart: bool = False) -> Tensor | None:
    """The parts of two flattened matrices after three steps; None if the optimizer refuses them, or leaves them as they are.

    Args:
        optimizer: the user's, of which a copy is stepped.
        group: hyperparameters.
        parts: what its parameters are: whole matrices, or flat pieces.
        apart: each parameter is stepped by a call of its own.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(48, generator=generator)
    gradients = [torch.randn(48, generator=generator) for _ in range(3)]

    def cut(x: Tensor) -> list[Tensor]:
        return [x[part].view(SHAPE).clone() if part.stop - part.start == 24 else x[part].clone() for part in parts]

    parameters = [nn.Parameter(piece) for piece in cut(start)]
    probe = copy.copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**copy.deepcopy(group), "params": parameters}]
    probe._optimizer_step_pre_hooks, probe._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    step = type(optimizer).step
    random_state = torch.get_rng_state()
    try:
        for gradient in gradients:
            for parameter, piece in zip(parameters, cut(gradient), strict=True):
                parameter.grad = piece
            for together in [[p] for p in parameters] if apart else [parameters]:
                probe.param_groups[0]["params"] = together
                step(probe)  # type: ignore[call-arg]
    except Exception:
        return None  # it needs a matrix, and says so in its own way: not elementwise
    finally:
        torch.set_rng_state(random_state)
    result = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return None if result.equal(start[: len(result)]) else result
