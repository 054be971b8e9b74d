"""Converts optimizer state between shards and checkpoints.

A checkpoint holds the state of the unsharded optimizer: a state for each parameter, in the parameter's shape, with the numbers of
``torch.optim.Optimizer.state_dict``. So it can be loaded without this package, and on any number of ranks. fp32 main parameters are
saved in it under ``MAIN``, which other optimizers ignore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap.modes.data.buffers import LiveBucket, Segment, groups_of
from lightning_overlap.state.shards import Run

MAIN = "fp32_main_parameter"


def original_names(optimizer: Optimizer, buckets: Sequence[LiveBucket]) -> list[list[str | None]]:
    """Returns the names of the parameters in each of ``param_groups``; None for a parameter that is not trained."""
    name_of = {id(p): name for b in buckets for name, p in zip(b.names, b.parameters, strict=True)}
    return [[name_of.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _parts(bucket: LiveBucket, segment: Segment) -> list[tuple[str, torch.Size, int, int, int]]:
    """Lists the parts of parameters in a segment: name, the parameter's shape, [start, end) in the segment, start in the parameter."""
    parts = []
    for slot, name, shape in zip(bucket.layout.slots, bucket.names, bucket.shapes, strict=True):
        first = slot.start - bucket.layout.start
        start, end = max(first, segment.start), min(slot.end - bucket.layout.start, segment.end)
        if start < end:
            parts.append((name, shape, start - segment.start, end - segment.start, start - first))
    return parts


def shards(
    optimizer: Optimizer, buckets: Sequence[LiveBucket], saved: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns this rank's part of the state by parameter and key, without copies.

    A value in the parameter's shape is a :class:`Run` of the parameter; other values are as the optimizer has them.

    Args:
        optimizer: the sharded optimizer.
        buckets: its buckets.
        saved: for loading: a state by parameter and key. Memory for such a state is made first; its values that are not tensors are
            taken over.
    """
    if saved is not None:
        shaped = _shaped(buckets, saved)
        for bucket in buckets:
            for segment in bucket.segments:
                _make_room(optimizer, bucket, segment, saved, shaped)
    local: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        for segment in bucket.segments:
            state = dict(optimizer.state.get(segment.parameter, {}))
            if bucket.main is not None:
                state[MAIN] = segment.parameter
            for name, shape, start, end, offset in _parts(bucket, segment):
                local[name] = {}
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        value = value.detach()
                        if value.shape == segment.parameter.shape and value.dim() > 0:
                            value = Run(shape, offset, value.reshape(-1)[start:end])
                    local[name][key] = value
    return local


def _shaped(buckets: Sequence[LiveBucket], saved: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Returns the keys of values in their parameter's shape. Parameters without dimensions cannot tell: a count has none either."""
    shapes = {name: shape for bucket in buckets for name, shape in zip(bucket.names, bucket.shapes, strict=True)}
    return {
        key
        for name, state in saved.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape == shapes.get(name)
    }


def _make_room(
    optimizer: Optimizer, bucket: LiveBucket, segment: Segment, saved: Mapping[str, Mapping[str, Any]], shaped: set[str]
) -> None:
    parameter, group = segment.parameter.detach(), optimizer.param_groups[segment.group]
    if bucket.main is not None:
        parameter.view(-1).copy_(bucket.data[segment.start : segment.end])  # the checkpoint may have no main parameters
    state: dict[str, Any] = {}
    for name, shape, *_ in _parts(bucket, segment):
        for key, value in saved.get(name, {}).items():
            if key == MAIN:
                continue
            if not isinstance(value, Tensor):
                state[key] = value
            elif key in shaped and value.shape == shape:
                state.setdefault(key, torch.zeros_like(parameter, dtype=value.dtype))
            else:
                # torch keeps its count of steps on the CPU, unless a kernel reads it.
                on_cpu = key == "step" and not group.get("capturable") and not group.get("fused")
                state[key] = torch.empty_like(value, device="cpu" if on_cpu else parameter.device)
    optimizer.state.pop(segment.parameter, None)  # a checkpoint may have no state
    if state:
        optimizer.state[segment.parameter] = state


def gather(optimizer: Optimizer, buckets: Sequence[LiveBucket], names: Sequence[Sequence[str | None]]) -> dict[str, Any]:
    """Returns the unsharded optimizer's ``state_dict()``; a bucket's states are on the first rank of its group. Collective."""
    unsharded: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        local = {name: {key: _copy(value) for key, value in values.items()} for name, values in shards(optimizer, [bucket]).items()}
        for name, values in (item for part in bucket.group.gather_objects(local) for item in part.items()):
            state = unsharded.setdefault(name, {})
            for key, value in values.items():
                if isinstance(value, Run):
                    target = state.setdefault(key, torch.zeros(value.shape, dtype=value.flat.dtype))
                    value.of(target).copy_(value.flat)
                else:
                    state[key] = value
    numbered = [name for part in names for name in part]
    start, groups = 0, []
    for part, group_values in zip(names, optimizer.param_groups, strict=True):
        values = {key: value for key, value in group_values.items() if key != "params"}
        groups.append({**values, "params": list(range(start, start + len(part)))})
        start += len(part)
    return {
        "state": {i: unsharded[name] for i, name in enumerate(numbered) if name is not None and unsharded.get(name)},
        "param_groups": groups,
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Run):
        return value.copy()
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def load(
    optimizer: Optimizer,
    buckets: Sequence[LiveBucket],
    names: Sequence[Sequence[str | None]],
    state_dict: dict[str, Any],
) -> None:
    """Loads this rank's part of an unsharded ``state_dict()``.

    Raises:
        ValueError: the state has other parameter groups than this optimizer.
    """
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in saved] != [len(part) for part in names]:
        raise ValueError(
            f"the checkpoint's optimizer has parameter groups of {[len(g['params']) for g in saved]} parameters, "
            f"but this optimizer has groups of {[len(part) for part in names]}. Resume with the optimizer that was saved"
        )
    by_name: dict[str, dict[str, Any]] = {}
    for part, group, values in zip(names, optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key not in ("params", "param_names")})
        for name, number in zip(part, values["params"], strict=True):
            if name is not None:
                by_name[name] = state_dict["state"].get(number, {})
    for name, state in shards(optimizer, buckets, by_name).items():
        for key, target in state.items():
            value = by_name.get(name, {}).get(key)
            if isinstance(target, Run) and isinstance(value, Tensor):
                target.flat.copy_(target.of(value))
            elif isinstance(target, Tensor) and isinstance(value, Tensor):
                target.copy_(value)


def move(optimizer: Optimizer, old: Sequence[LiveBucket], new: Sequence[LiveBucket]) -> None:
    """Moves the state from the shards of old buckets to those of new ones. Collective; holds one unsharded value at a time."""
    before = shards(optimizer, old)
    saved: dict[str, dict[str, Any]] = {}
    group_of = {name: bucket.group for bucket in new for name in bucket.names}
    for group in groups_of(new):
        outlines = {name: {k: _outline(v) for k, v in s.items()} for name, s in before.items() if group_of[name] is group}
        for name, outline in (item for each in group.all_gather_objects(outlines) for item in each.items()):
            saved.setdefault(name, {}).update(outline)
    optimizer.state.clear()
    after = shards(optimizer, new, saved)
    for name, outline in saved.items():
        for key, value in outline.items():
            target = after.get(name, {}).get(key)
            if isinstance(value, Tensor) and value.is_meta:
                unsharded = torch.zeros(value.shape, dtype=value.dtype, device=new[0].data.device)
                if name in before:
                    before[name][key].of(unsharded).copy_(before[name][key].flat)
                group_of[name].all_reduce(unsharded, label=f"data.move[{name}.{key}]").wait()
                if target is not None:
                    target.flat.copy_(target.of(unsharded))
            elif isinstance(target, Tensor):
                target.copy_(value)


def _outline(value: Any) -> Any:
    """Returns a value to send to other ranks: a tensor without memory in the place of a run."""
    if isinstance(value, Run):
        return torch.empty(value.shape, dtype=value.flat.dtype, device="meta")
    return value.cpu() if isinstance(value, Tensor) else value
