"""Optimizer state between shards and checkpoints.

A checkpoint holds what the user's optimizer would hold unsharded: a state for each parameter, in the parameter's shape,
numbered as ``torch.optim.Optimizer.state_dict`` numbers them. So it loads into plain training, and into any other number
of ranks. fp32 main parameters travel with it under ``MAIN``, which other optimizers leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap.comm import Group
from lightning_overlap.modes.data.buffers import LiveBucket, Segment

MAIN = "fp32_main_parameter"


def original_names(optimizer: Optimizer, buckets: Sequence[LiveBucket]) -> list[list[str | None]]:
    """The names of the optimizer's parameters by group, before it is repointed; None for one that is not trained."""
    name_of = {id(p): name for b in buckets for name, p in zip(b.names, b.parameters, strict=True)}
    return [[name_of.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _pieces(bucket: LiveBucket, segment: Segment) -> list[tuple[str, torch.Size, int, int, int]]:
    """The parameters in a segment: name, shape, and [start, end) of the segment, and where that starts in the parameter."""
    found = []
    for slot, name, parameter in zip(bucket.layout.slots, bucket.names, bucket.parameters, strict=True):
        first = slot.start - bucket.layout.start
        start, end = max(first, segment.start), min(slot.end - bucket.layout.start, segment.end)
        if start < end:
            found.append((name, parameter.shape, start - segment.start, end - segment.start, start - first))
    return found


def gather(optimizer: Optimizer, buckets: Sequence[LiveBucket], names: Sequence[Sequence[str | None]], group: Group) -> dict[str, Any]:
    """The unsharded optimizer's ``state_dict()`` on the group's first rank; the others get one without states."""
    first = group.rank == 0
    whole: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        mine = [
            (name, shape, offset, {key: _cut(value, s, start, end) for key, value in _state(optimizer, bucket, s).items()})
            for s in bucket.segments
            for name, shape, start, end, offset in _pieces(bucket, s)
        ]
        parts: list[Any] | None = [None] * group.size if first else None
        dist.gather_object(mine, parts, dst=group.ranks[0], group=group.reduces)
        for name, shape, offset, values in (piece for part in parts or () for piece in part):
            state = whole.setdefault(name, {})
            for key, value in values.items():
                if not isinstance(value, _Flat):
                    state[key] = value
                    continue
                target = state.setdefault(key, torch.zeros(shape, dtype=value.tensor.dtype))
                target.view(-1)[offset : offset + value.tensor.numel()] = value.tensor
    numbered = [name for part in names for name in part]
    start, groups = 0, []
    for part, group_values in zip(names, optimizer.param_groups, strict=True):
        values = {key: value for key, value in group_values.items() if key != "params"}
        groups.append({**values, "params": list(range(start, start + len(part)))})
        start += len(part)
    return {
        "state": {i: whole[name] for i, name in enumerate(numbered) if name is not None and name in whole},
        "param_groups": groups,
    }


class _Flat:
    """A part of a state tensor that has its parameter's shape, to be told from one that has not (a count of steps)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _state(optimizer: Optimizer, bucket: LiveBucket, segment: Segment) -> dict[str, Any]:
    state = dict(optimizer.state.get(segment.parameter, {}))
    if bucket.main is not None and state:
        state[MAIN] = segment.parameter.detach()
    return state


def _cut(value: Any, segment: Segment, start: int, end: int) -> Any:
    if isinstance(value, Tensor) and value.shape == segment.parameter.shape and value.dim() > 0:
        return _Flat(value.detach().reshape(-1)[start:end].cpu().clone())
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def load(
    optimizer: Optimizer,
    buckets: Sequence[LiveBucket],
    names: Sequence[Sequence[str | None]],
    state_dict: dict[str, Any],
) -> None:
    """Takes this rank's share of an unsharded ``state_dict()``.

    Raises:
        ValueError: the groups are not those of this optimizer.
    """
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in saved] != [len(part) for part in names]:
        raise ValueError(
            f"the checkpoint's optimizer has parameter groups of {[len(g['params']) for g in saved]} parameters, "
            f"this one of {[len(part) for part in names]}: resume with the optimizer that was saved"
        )
    by_name: dict[str, dict[str, Any]] = {}
    for part, group, values in zip(names, optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key not in ("params", "param_names")})
        for name, number in zip(part, values["params"], strict=True):
            if name is not None:
                by_name[name] = state_dict["state"].get(number, {})
    for bucket in buckets:
        for segment in bucket.segments:
            _load_segment(optimizer, bucket, segment, by_name)


def _load_segment(optimizer: Optimizer, bucket: LiveBucket, segment: Segment, by_name: dict[str, dict[str, Any]]) -> None:
    flat = segment.parameter.detach().view(-1)
    if bucket.main is not None:
        flat.copy_(bucket.data[segment.start : segment.end])  # where the checkpoint has no main parameters
    state: dict[str, Any] = {}
    for name, shape, start, end, offset in _pieces(bucket, segment):
        for key, value in by_name.get(name, {}).items():
            part = value
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
                part = value.reshape(-1)[offset : offset + end - start].to(flat.device)
                if key == MAIN:
                    if bucket.main is not None:
                        flat[start:end] = part
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(segment.parameter, dtype=value.dtype)
                state[key].view(-1)[start:end] = part
            else:
                state[key] = part.clone() if isinstance(part, Tensor) else part
    optimizer.state.pop(segment.parameter, None)  # a checkpoint without state is a fresh start
    if state:
        optimizer.state[segment.parameter] = state
