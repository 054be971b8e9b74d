"""Splits a batch into microbatches."""

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
"""The dim of samples, by path in the batch (``mask``, or ``1.mask`` in a tuple). None: each microbatch gets the unsplit tensor."""
REMEDY = "name the dim of samples, or None for what has no samples, for example PipelineParallel(batch_dims={'x': 0, 'mask': None})"
"""What to do, for errors."""


@dataclass(frozen=True)
class Microbatches:
    """The microbatches of one training step.

    Attributes:
        step: the user's step.
        parts: the microbatches, the arguments of ``training_step``.
        shares: the factor of each microbatch's loss in the loss of the batch. 0: no backward of the microbatch is run.
    """

    step: Step
    parts: Sequence[Any]
    shares: Sequence[float]


def shapes_of(batch: Any) -> Hashable:
    """Returns the shapes and dtypes of a batch's tensors. Batches with equal ones have activations of equal shapes."""
    return tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves(batch) if isinstance(leaf, Tensor))


def count_samples(batch: Any, dims: Dims | None = None) -> int:
    """Returns the number of samples: the most frequent length of the first dim of the batch's tensors.

    Tensors inside lists are considered only if there are no others.

    Args:
        batch: the batch.
        dims: the dims of samples that the user names. They decide alone.

    Raises:
        ConfigError: the number is ambiguous.
    """
    if named := _named(batch, dims or {}):
        if len(set(named.values())) > 1:
            raise ConfigError(f"pipeline_parallel.batch_dims names dims of different lengths: {_describe(named)}")
        return next(iter(named.values()))
    tensors = {path: len(leaf) for path, leaf in _walk(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if not tensors:
        return _samples_in_lists(batch)
    longer = {path: length for path, length in tensors.items() if length > 1} or tensors  # a tensor of length 1 may be a scalar
    (size, most), *others = Counter(longer.values()).most_common()
    if others and others[0][1] == most:
        raise ConfigError(f"the number of samples in the batch is ambiguous, {_describe(longer)}: {REMEDY}")
    return size


def refuse_other_dim(batch: Any, size: int, batch_size: int | None, dims: Dims) -> None:
    """Refuses a batch whose samples seem to be along another dim than the first one.

    Args:
        batch: a full batch.
        size: the number of samples, from :func:`count_samples`.
        batch_size: the data loader's batch size, or None if it is unknown.
        dims: the dims of samples that the user names.

    Raises:
        ConfigError: ``size`` is not ``batch_size``, but another dim of a tensor has that length.
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
        raise ConfigError("a batch without a tensor cannot be split into microbatches: have the data loader collate tensors")
    if len(lengths) > 1:
        raise ConfigError(
            f"the number of samples in the batch is ambiguous: it has only lists, of tensors of the lengths {sorted(lengths)}. Have "
            f"the data loader add a tensor with one row for each sample, or {REMEDY}"
        )
    if len({len(value) for value in lists.values()}) == 1 and not isinstance(batch, list | tuple):
        raise ConfigError(
            f"{', '.join(lists)} may be a list with an item for each sample, or a list of columns: {REMEDY}. 0 splits the list itself"
        )
    return lengths.pop()


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the paths and leaves of a batch. A list or tuple in it is a leaf; a batch that is one is a list of columns."""
    if isinstance(value, list | tuple) and path:
        yield path, value
    elif is_container(value):
        for name, item in items(value):
            yield from _walk(item, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _named(batch: Any, dims: Dims) -> dict[str, int]:
    """Returns the number of samples along each dim that the user names, by path.

    Raises:
        ConfigError: the batch has no such path.
    """
    lengths: dict[str, int] = {}
    for path, dim in dims.items():
        value = batch
        for name in path.split(".") if path else ():  # the empty path names a batch that is a tensor
            value = dict(items(value)).get(name) if is_container(value) else None
        if value is None:
            known = ", ".join(path for path, _ in _walk(batch))
            raise ConfigError(f"pipeline_parallel.batch_dims names {path!r}, but the batch has {known}")
        if dim is not None:
            lengths[path] = value.shape[dim] if isinstance(value, Tensor) else len(value)
    return lengths


def _describe(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{path or 'the batch'} has {length}" for path, length in lengths.items())


def split_batch(batch: Any, count: int, dims: Dims | None = None) -> list[Any]:
    """Splits the samples of a batch into microbatches whose sizes differ by one at most, the larger ones first.

    Tensors and lists with as many items as the batch has samples are split along their first dim, in nested containers too. All
    other values are in each microbatch. A sequence of tensors that are all split is itself not split: it is a list of columns, as is
    a batch that is a sequence.

    Args:
        batch: the batch.
        count: the number of microbatches.
        dims: the dims of samples that the user names.

    Raises:
        ConfigError: the number of samples, or whether a list has an item for each sample, is ambiguous.
    """
    size = count_samples(batch, dims)
    bounds = [0]
    for i in range(count):
        bounds.append(bounds[-1] + size // count + (i < size % count))
    return [_narrow(batch, size, start, end, dims or {}, "") for start, end in pairwise(bounds)]


def unsplit_tensors(batch: Any, dims: Dims | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tensors with rows that :func:`split_batch` does not split, and that the user does not name in ``dims``."""
    size = count_samples(batch, dims)
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
                f"{path} has as many items as the batch has samples, {size}, and so has each of its items: {REMEDY}. "
                f"{{{path!r}: 0}} splits the list itself"
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
    """Whether each item of a sequence has values of all samples; otherwise the sequence has an item for each sample."""

    def is_column(item: Any) -> bool:
        return isinstance(item, Tensor | list | tuple) and any(
            isinstance(x, Tensor) and x.dim() and len(x) == size for x in leaves(item)
        )

    return all(item is None or is_column(item) for item in items) and any(item is not None for item in items)
