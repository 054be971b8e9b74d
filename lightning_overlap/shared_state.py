"""What rank 0 has, everyone has: weights at setup, and buffers that training writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_overlap.comm import Group, everyone, world_size

AT_ONCE = 1 << 25
"""Bytes that are broadcast together: many small tensors cost one transfer, and no copy is larger."""


@torch.no_grad()
def share(tensors: Iterable[Tensor], group: Group | None = None, source: int = 0) -> None:
    """One rank's values, in place. Collective, blocking.

    Args:
        tensors: the same shapes everywhere.
        group: the ranks; by default all.
        source: the rank in the group whose values count.
    """
    if (group.size if group is not None else world_size()) == 1:
        return
    ranks = group or everyone()
    for together in _batches(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in together])
        ranks.broadcast(flat, source)
        if ranks.rank != source:
            for tensor, part in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        together = open_.setdefault((tensor.dtype, tensor.device), [])
        if together and sum(t.nbytes for t in together) + tensor.nbytes > AT_ONCE:
            yield list(together)
            together.clear()
        together.append(tensor)
    yield from filter(None, open_.values())


class SharedBuffers:
    """Buffers that the first step writes (running statistics, codebooks) are the first rank's before each later one, as in DDP.

    Which these are is agreed once, so that the masks and tables of a transformer cost nothing.

    Args:
        module: the user's.
        group: ranks that hold the same of it.
    """

    def __init__(self, module: nn.Module, group: Group) -> None:
        self._module = module
        self._group = group
        self._before: dict[str, tuple[int, int]] | None = None
        self._written: list[str] | None = None

    def before_forward(self) -> None:
        """To be called on every rank before each training step."""
        if self._before is None:
            self._before = self._state()
            return
        if self._written is None:
            now = self._state()
            everyone = self._group.all_gather_objects([name for name in now if now[name] != self._before.get(name)])
            modules = {name.rpartition(".")[0] for names in everyone for name in names}
            # All of a module's: torch does not see its own kernels write running statistics, only the count of batches beside them.
            self._written = sorted(name for name in now if name.rpartition(".")[0] in modules)
        if self._written:
            buffers = dict(self._module.named_buffers())
            share((buffers[name] for name in self._written), self._group)

    def _state(self) -> dict[str, tuple[int, int]]:
        return {name: (buffer.data_ptr(), buffer._version) for name, buffer in self._module.named_buffers()}
