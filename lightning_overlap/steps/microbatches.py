"""Cuts a batch into microbatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import is_container, items, leaves, rebuild
from lightning_overlap.steps.step import Step

Dims = Mapping[str, int | None]
"""By place in the batch (``mask``, or ``1.mask`` in a tuple), along which dim something is cut; None: it is in every part."""
HOW_TO_SAY = "say what is cut, and what is not, PipelineParallel(batch_dims={'x': 0, 'mask': None}) say"


@dataclass(frozen=True)
class Microbatches:
    """The microbatches of one training step.

    Attributes:
        step: the user's.
        parts: the microbatches, as ``training_step`` gets them.
        shares: by microbatch, what its loss is multiplied by in the batch's loss. 0: the microbatch is left out.
    """

    step: Step
    parts: Sequence[Any]
    shares: Sequence[float]


def shapes_of(batch: Any) -> Hashable:
    """The shapes and dtypes of a batch's tensors, which decide the shapes of all that is computed from it."""
    return tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves(batch) if isinstance(leaf, Tensor))


def samples(batch: Any, dims: Dims | None = None) -> int:
    """The batch's size: the length that most of its tensors have in their first dim. Those inside of lists count last.

    Args:
        batch: the batch.
        dims: what the user says of it.

    Raises:
        ConfigError: the batch does not tell how many samples it has.
    """
    if named := _named(batch, dims or {}):
        if len(set(named.values())) > 1:
            raise ConfigError(f"pipeline_parallel.batch_dims cuts what has different numbers of samples: {_in_words(named)}")
        return next(iter(named.values()))
    tensors = {path: len(leaf) for path, leaf in _walk(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if not tensors:
        return _samples_in_lists(batch)
    longer = {path: length for path, length in tensors.items() if length > 1} or tensors  # a number may come as a tensor of one
    (size, most), *others = Counter(longer.values()).most_common()
    if others and others[0][1] == most:
        raise ConfigError(f"the batch does not tell how many samples it has: {_in_words(longer)} long: {HOW_TO_SAY}")
    return size


def refuse_other_dim(batch: Any, size: int, batch_size: int | None, dims: Dims) -> None:
    """Refuses a batch whose samples seem to be along another dim than the first one.

    Args:
        batch: a full batch.
        size: the number of samples, from the tensors' first dims.
        batch_size: the data loader's; None if it does not tell.
        dims: the dims of samples that the user names.

    Raises:
        ConfigError: ``size`` is not that of the data loader, and another dim of a tensor is.
    """
    if batch_size is None or size % batch_size == 0 or any(dim is not None for dim in dims.values()):
        return
    for path, leaf in _walk(batch):
        if isinstance(leaf, Tensor) and batch_size in leaf.shape[1:]:
            dim = 1 + list(leaf.shape[1:]).index(batch_size)
            raise ConfigError(
                f"{path or 'the batch'} has shape {tuple(leaf.shape)}, and the data loader's batch_size is {batch_size}: samples seem "
                f"to be along dim {dim}, but microbatches are taken along dim 0. Name the dim of samples: "
                f"PipelineParallel(batch_dims={{{path!r}: {dim}}}), or {{{path!r}: 0}} if it is the first one"
            )


def _samples_in_lists(batch: Any) -> int:
    lists = {path: value for path, value in _walk(batch) if isinstance(value, list | tuple)}
    lengths = {len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if not lengths:
        raise ConfigError("a batch without a tensor cannot be cut into microbatches: have the data loader collate tensors")
    if len(lengths) > 1:
        raise ConfigError(
            f"a batch of lists, whose tensors have the lengths {sorted(lengths)}, does not tell how many samples it has: have the "
            f"data loader put a tensor beside them that has one row for each sample, or {HOW_TO_SAY}"
        )
    if len({len(value) for value in lists.values()}) == 1 and not isinstance(batch, list | tuple):
        raise ConfigError(
            f"{', '.join(lists)} may be a list with an item for each sample, or one of columns: {HOW_TO_SAY}: 0 cuts the list itself"
        )
    return lengths.pop()


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a batch, by place. Lists and tuples are not gone into, but for the batch itself, which is one of columns."""
    if isinstance(value, list | tuple) and path:
        yield path, value
    elif is_container(value):
        for name, item in items(value):
            yield from _walk(item, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _named(batch: Any, dims: Dims) -> dict[str, int]:
    """By place that the user says is cut, how long it is.

    Raises:
        ConfigError: there is nothing at a place.
    """
    found: dict[str, int] = {}
    for path, dim in dims.items():
        value = batch
        for name in path.split(".") if path else ():  # an empty one names a batch that is a tensor
            value = dict(items(value)).get(name) if is_container(value) else None
        if value is None:
            known = ", ".join(path for path, _ in _walk(batch))
            raise ConfigError(f"pipeline_parallel.batch_dims names {path!r}, and the batch has {known}")
        if dim is not None:
            found[path] = value.shape[dim] if isinstance(value, Tensor) else len(value)
    return found


def _in_words(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{path or 'it'} is {length}" for path, length in lengths.items())


def cut(batch: Any, parts: int, dims: Dims | None = None) -> list[Any]:
    """The batch in so many parts along the first dim, of sizes that differ by one at most, the larger ones first.

    Tensors and lists whose length is the batch's are cut, in mappings, sequences and dataclasses; the rest is in every part.
    A sequence of tensors that are all to be cut is not: it is one of columns, as is the batch itself.

    Args:
        batch: the batch.
        parts: how many.
        dims: what the user says of it.
    """
    size = samples(batch, dims)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + size // parts + (i < size % parts))
    return [_narrow(batch, size, start, end, dims or {}, "") for start, end in pairwise(bounds)]


def in_every_part(batch: Any, dims: Dims | None = None) -> dict[str, tuple[int, ...]]:
    """Tensors with rows that :func:`cut` leaves whole, though nobody has said so, and their shapes."""
    size = samples(batch, dims)
    return {
        path: tuple(leaf.shape)
        for path, leaf in _walk(batch)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) not in (1, size) and path not in (dims or {})
    }


def _narrow(value: Any, size: int, start: int, end: int, dims: Dims, path: str) -> Any:
    if path in dims:
        return _slice(value, dims[path], start, end)
    if isinstance(value, Tensor):
        return value[start:end] if value.dim() and len(value) == size else value
    if not is_container(value):
        return value
    if isinstance(value, list | tuple) and path and len(value) == size and not hasattr(value, "_fields"):
        if not _are_columns(value, size):
            return value[start:end]
        if all(isinstance(item, Tensor) for item in value) and not any(name.startswith(f"{path}.") for name in dims):
            raise ConfigError(
                f"{path} has as many items as the batch has samples, {size}, and so has each of its items: {HOW_TO_SAY}: "
                f"{{{path!r}: 0}} cuts the list itself"
            )
    names = iter([name for name, _ in items(value)])

    def narrow(item: Any) -> Any:
        name = next(names)
        return _narrow(item, size, start, end, dims, f"{path}.{name}" if path else name)

    return rebuild(value, narrow)


def _slice(value: Any, dim: int | None, start: int, end: int) -> Any:
    if dim is None:
        return value
    return value.narrow(dim, start, end - start) if isinstance(value, Tensor) else value[start:end]


def _are_columns(items: Sequence[Any], size: int) -> bool:
    """Whether a sequence as long as the batch has what is to be cut in each of its items, and not an item for each sample."""

    def is_column(item: Any) -> bool:
        return isinstance(item, Tensor | list | tuple) and any(
            isinstance(x, Tensor) and x.dim() and len(x) == size for x in leaves(item)
        )

    return all(item is None or is_column(item) for item in items) and any(item is not None for item in items)
