"""Finds out, by stepping copies of an optimizer, whether it works on flat shards and on some of its parameters at a time."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.facts import OptimizerFacts, StateSize
from lightning_overlap.model.trees import plain_tensors
from lightning_overlap.torch_seams import forget_step_hooks, has_step_hooks, tree_leaves

SHAPES = ((80, 64), (4, 6)), ((80, 64), (64, 48))
"""Shapes of the two test matrices: large and small, because some optimizers treat them differently; if that fails, two large ones."""
STEPS = 10
"""How many steps a trial takes. A behaviour that begins later is not found."""


def examine(optimizer: Optimizer) -> OptimizerFacts:
    """Steps copies of the optimizer, with its own hyperparameters, on two matrices: together, one alone, and as flat shards.

    Elementwise optimizers (SGD, Adam, AdamW, Lion, ...) give the same numbers each time. Optimizers that read a whole matrix (Muon,
    Adafactor, Shampoo, LAMB), or draw random numbers, give others on shards, and keep unsharded parameters. Optimizers that read all
    parameters at once (for a norm over all of them) give others on one matrix alone.
    """
    name = type(optimizer).__name__
    methods = methods_that_read_state(type(optimizer))

    def facts(reason: str, *, independent: bool = True, elementwise: bool = False, separable: bool = False) -> OptimizerFacts:
        state = max((trial.state for trial in trials), key=lambda size: size.of(4)) if trials else None
        return OptimizerFacts(name, independent, elementwise, separable, f"{name} {reason}", methods=methods, state=state)

    trials: list[_Trial] = []
    if isinstance(optimizer, torch.optim.LBFGS):
        return facts("evaluates the loss inside its step", independent=False)
    trials, refusal = _find_trials(optimizer)
    if refusal:
        return OptimizerFacts(name, False, False, False, f"{name} {refusal}", known=False, methods=methods)

    def alike(parts: Callable[[_Trial], Sequence[slice]], *, apart: bool = False) -> bool:
        return all(_alike(trial, parts(trial), apart=apart) for trial in trials)

    if not alike(lambda trial: trial.matrices[:1]):
        return facts("looks at all parameters at once", independent=False)
    if not alike(lambda trial: trial.shards):
        return facts("does not update each element on its own")
    if has_step_hooks(optimizer):
        return facts("has step hooks, to be called once a step", elementwise=True)
    if not alike(lambda trial: trial.shards, apart=True):
        return facts("cannot step a part of its parameters at a time", elementwise=True)
    return facts("updates each element on its own", elementwise=True, separable=True)


@dataclass(frozen=True)
class _Trial:
    """One group of the optimizer on two matrices.

    Attributes:
        optimizer: the user's, of which copies are stepped.
        group: hyperparameters.
        shapes: of the matrices.
        device: of the matrices.
        result: the two matrices, flattened, after some steps.
        state: what the optimizer then keeps for each of their elements.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    device: torch.device
    result: Tensor
    state: StateSize

    @property
    def matrices(self) -> list[slice]:
        return _matrices(self.shapes)

    @property
    def shards(self) -> list[slice]:
        """Slices that divide each matrix into small and large flat shards."""
        first, second = self.matrices
        bounds = [0, 24, first.stop // 2, first.stop, first.stop + 12, second.stop]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _matrices(shapes: Sequence[tuple[int, int]]) -> list[slice]:
    first, second = map(math.prod, shapes)
    return [slice(0, first), slice(first, first + second)]


def _find_trials(optimizer: Optimizer) -> tuple[list[_Trial], str]:
    """Returns a trial of each group, on matrices that the optimizer accepts; or why there is none, with the optimizer's error."""
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    devices = [torch.device("cpu"), *([device] if device.type not in ("cpu", "meta") else [])]
    refusal = ""
    for device in devices:
        for shapes in SHAPES:
            trials = []
            for group in _different([_only(group, device) for group in optimizer.param_groups if group["params"]]):
                try:
                    result = _steps(optimizer, group, shapes, _matrices(shapes), device)
                except Exception as error:
                    # Ranks compare the message, and have different addresses and devices.
                    message = re.sub(r"0x[0-9a-f]+", "0x...", re.sub(r"cuda:\d+", "cuda", str(error).strip()))
                    refusal = f"fails on test matrices ({type(error).__name__}: {message.partition(chr(10))[0]})"
                    break
                if result is None:
                    refusal = f"changes nothing in {STEPS} test steps"
                    break
                trials.append(_Trial(optimizer, group, shapes, device, *result))
            else:
                return trials, ""
    return [], f"{refusal}, so it is unknown which elements an update reads"


def _different(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops groups that differ from another one only in the values of nonzero numbers, such as learning rates of layers."""

    def kind(value: Any) -> Any:
        if isinstance(value, float | Tensor):
            return bool((torch.as_tensor(value) != 0).any())
        return [kind(item) for item in value] if isinstance(value, tuple | list) else repr(value)

    return list({repr({key: kind(value) for key, value in group.items()}): group for group in groups}.values())


def _only(group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns a group's hyperparameters; a learning rate of 0 (of a warmup) is replaced, because it would hide the update."""
    kept = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if kept.get("lr") is not None and not float(kept["lr"]):
        kept["lr"] = 1e-2
    if device.type == "cpu" and kept.get("capturable"):
        kept["capturable"] = False  # torch refuses it on the CPU, and the update is the same
    return kept


def _alike(trial: _Trial, parts: Sequence[slice], *, apart: bool) -> bool:
    try:
        result = _steps(trial.optimizer, trial.group, trial.shapes, parts, trial.device, apart=apart)
    except Exception:
        return False  # it accepts matrices, and not a shard of one
    return result is not None and torch.allclose(trial.result[: len(result[0])], result[0], rtol=1e-6, atol=1e-7)


def _steps(
    optimizer: Optimizer,
    group: dict[str, Any],
    shapes: Sequence[tuple[int, int]],
    parts: Sequence[slice],
    device: torch.device,
    *,
    apart: bool = False,
) -> tuple[Tensor, StateSize] | None:
    """Returns parts of two flattened matrices after some steps, concatenated, and the state for each element.

    None if the optimizer changes nothing.

    Args:
        optimizer: the user's optimizer, of which a copy is stepped.
        group: hyperparameters.
        shapes: of the two matrices.
        parts: slices that become the parameters: matrices or flat shards.
        device: of the parameters.
        apart: step each parameter in a call of its own.

    Raises:
        Exception: the optimizer's own.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = _matrices(shapes)
    size = matrices[-1].stop
    start, *gradients = (torch.randn(size, generator=generator).to(device) for _ in range(STEPS + 1))

    def split(x: Tensor) -> list[Tensor]:
        return [x[part].view(shapes[matrices.index(part)]).clone() if part in matrices else x[part].clone() for part in parts]

    parameters = [nn.Parameter(piece) for piece in split(start)]
    probe: Any = object.__new__(type(optimizer))  # copy.copy drops attributes that Optimizer.__getstate__ does not list
    vars(probe).update({k: copy.copy(v) if isinstance(v, list | dict | set) else v for k, v in vars(optimizer).items()})
    probe.state = defaultdict(dict)
    probe.param_groups = [{**copy.deepcopy(group), "params": parameters}]
    forget_step_hooks(probe)
    step = type(optimizer).step
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if callable(train := getattr(probe, "train", None)):
            train()  # schedule-free optimizers refuse to step otherwise
        for gradient in gradients:
            for parameter, piece in zip(parameters, split(gradient), strict=True):
                parameter.grad = piece
            for together in [[p] for p in parameters] if apart else [parameters]:
                probe.param_groups[0]["params"] = together
                step(probe)
    result = torch.cat([parameter.detach().flatten() for parameter in parameters])
    if result.equal(start[: len(result)]):
        return None
    kept = list(plain_tensors(tree_leaves(list(probe.state.values()))))
    numbers = sum(x.numel() for x in kept if x.dtype == start.dtype)
    others = sum(x.nbytes for x in kept if x.dtype != start.dtype)
    return result, StateSize(round(numbers / len(result), 2), round(others / len(result), 2))


def methods_that_read_state(kind: type[Optimizer]) -> tuple[str, ...]:
    """Lists public methods of an optimizer class that read its state and that its step does not call.

    For example ``train`` and ``eval`` of a schedule-free optimizer, which swap weights and averages outside of the step.
    """
    # torch's own classes have only share_memory, which is harmless.
    classes = [each for each in kind.__mro__ if not each.__module__.startswith(("torch.", "builtins"))]
    codes: dict[str, list[CodeType]] = {}
    for each in reversed(classes):
        for name, value in vars(each).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value):
                codes.setdefault(name, []).append(inspect.unwrap(value).__code__)  # super() may call an earlier one
    used = {name: {n for code in several for n in names_in(code)} for name, several in codes.items()}

    def reached(name: str) -> set[str]:
        visited, pending = set(), [name]
        while pending:
            if (current := pending.pop()) not in visited:
                visited.add(current)
                pending += [other for other in used.get(current, ()) if other in used]
        return visited

    known = {*dir(Optimizer), *reached("step")}
    public = [name for name in used if not name.startswith("_") and name not in known]
    return tuple(sorted(name for name in public if any("state" in used[other] for other in reached(name))))


def names_in(code: CodeType) -> set[str]:
    """Returns the names of attributes and globals in a function and in functions defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *(name for each in inner for name in names_in(each))}
