"""Copies values of one rank to the others: weights at setup, and buffers that training writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType

import torch
from torch import Tensor, nn

from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.world import everyone, world_size
from lightning_overlap.torch_seams import BatchNorm, buffers_of, version_of

BROADCAST_BYTES = 1 << 25
"""Size up to which tensors are broadcast together: many small tensors cost one transfer, and no copy is larger."""


@torch.no_grad()
def share(tensors: Iterable[Tensor], group: Group | None = None, source: int = 0) -> None:
    """Copies the values of one rank's tensors to the other ranks, in place. Collective, blocking.

    Args:
        tensors: the same shapes, dtypes and order on all ranks.
        group: the ranks; by default all.
        source: rank in the group of the rank whose values are copied.
    """
    if (group.size if group is not None else world_size()) == 1:
        return
    ranks = group or everyone()
    for together in _batches(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in together])
        ranks.broadcast(flat, source, on_host=False)
        if ranks.rank != source:
            for tensor, part in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
                with torch.inference_mode() if tensor.is_inference() else nullcontext():  # a tensor that a validation has made
                    tensor.data.copy_(part.view(tensor.shape))  # keeps the version, by which SharedBuffers notices writes of training


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        together = open_.setdefault((tensor.dtype, tensor.device), [])
        if together and sum(t.nbytes for t in together) + tensor.nbytes > BROADCAST_BYTES:
            yield list(together)
            together.clear()
        together.append(tensor)
    yield from filter(None, open_.values())


@contextmanager
def batch_norms_over(module: nn.Module, group: Group) -> Iterator[None]:
    """Inside, batch norms with ``sync_batchnorm=True`` sum over a group instead of all ranks.

    Args:
        module: the user's.
        group: ranks that see different data. Ranks that share a batch would count it several times, and ranks of another stage do not
            run the layer.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.SyncBatchNorm) and part.process_group is None]
    for layer in layers:
        if group.size > 1:
            layer.process_group = group.process_group
        else:  # it has no process group, and None means the world
            layer.forward = MethodType(BatchNorm.forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            layer.process_group = None
            vars(layer).pop("forward", None)


class SharedBuffers:
    """Copies buffers that training writes (running statistics, codebooks) from the first rank before each step, as DDP does.

    Ranks agree on these buffers, so that the masks and tables of a transformer cost nothing: after forward each step posts one number,
    whether it wrote a buffer that is not shared yet, and the next step reads it. A buffer that a hook writes for the first time
    after forward is therefore shared one step later than in DDP.

    Args:
        module: the user's.
        group: ranks that hold the same part of it.
        everyone: all ranks, on the CPU, so that reading the number does not wait for a device.
    """

    def __init__(self, module: nn.Module, group: Group, everyone: Group) -> None:
        self._holders = [(path, part) for path, part in module.named_modules() if buffers_of(part)]
        self._group = group
        self._everyone = everyone
        self._before = self._state()
        self._shared: list[str] = []
        self._news: Pending | None = None

    def before_forward(self) -> None:
        """Called on every rank before each training step."""
        if self._group.size == 1:
            return
        if self._news is None or self._news.wait().item():
            everyone = self._group.all_gather_objects(self._written())
            parts = {name.rpartition(".")[0] for names in [self._shared, *everyone] for name in names}
            # All buffers of a module: torch's kernels give a new version to their count of batches, but not to running statistics.
            self._shared = sorted(name for name in self._state() if name.rpartition(".")[0] in parts)
        if self._shared:
            share(self._named(self._shared), self._group)

    def after_forward(self) -> None:
        """Called on every rank after each training step."""
        if self._group.size > 1:
            news = not set(self._shared).issuperset(self._written())
            self._news = self._everyone.all_reduce(torch.tensor(int(news)), label="buffers")

    def finish(self) -> None:
        """Waits for the number that the last step has posted."""
        if self._news is not None:
            self._news.wait()

    def _named(self, names: Iterable[str]) -> list[Tensor]:
        buffers = {f"{path}.{key}": buffer for path, part in self._holders for key, buffer in buffers_of(part).items()}
        return [buffer for name in names if (buffer := buffers.get(name)) is not None]

    def _written(self) -> list[str]:
        """Returns the names of the buffers that were written since setup."""
        return [name for name, state in self._state().items() if state != self._before.get(name)]

    def _state(self) -> dict[str, tuple[int, int]]:
        return {
            f"{path}.{key}": (buffer.data_ptr(), 0 if buffer.is_inference() else version_of(buffer))
            for path, part in self._holders
            for key, buffer in buffers_of(part).items()
            if buffer is not None
        }
