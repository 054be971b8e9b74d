"""The blocking verbs of a group, for small tensors and objects between the steps of a fit."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.engine import Engine
from lightning_overlap.ranks.members import Members

T = TypeVar("T")


class BlockingVerbs:
    """Collectives that return their result. A rank that waits raises the announced errors of others.

    Args:
        members: the ranks.
        engine: runs the transfers.
    """

    def __init__(self, members: Members, engine: Engine) -> None:
        self.ranks = members.ranks
        self.size = members.size
        self.rank = members.rank
        self.name = members.name
        self._members = members
        self._engine = engine

    def barrier(self) -> None:
        """Returns when all members have called it."""
        self.sum(torch.zeros(1, device=self._engine.device))

    def sum(self, x: Tensor, op: Any = "sum") -> Tensor:
        """Reduces ``x`` over the group, in place.

        Args:
            x: the same shape and dtype on every member.
            op: torch's ``ReduceOp``, or its name.
        """
        if self.size > 1:
            op = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) else op
            self._engine.reduce(x, op)
        return x

    def agree(self, flag: bool, *, by_all: bool) -> bool:
        """Whether all members pass True, or, without ``by_all``, any member does."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([int(flag)], device=self._engine.device), "min" if by_all else "max"))

    def broadcast(self, x: Tensor, source: int = 0, *, on_host: bool = True) -> Tensor:
        """Copies ``x`` of the member ``source`` to all, in place. On NCCL, unless ``on_host``, only the stream waits."""
        if self.size > 1:
            self._engine.broadcast(x, source, on_host=on_host)
        return x

    def all_gather_alike(self, x: Tensor) -> list[Tensor]:
        """Returns every member's ``x``, all of one shape and dtype, by rank in the group."""
        if self.size == 1:
            return [x]
        received = [torch.empty_like(x) for _ in self.ranks]
        self._engine.gather_alike(x, received)
        return received

    def share_object(self, value: T, source: int = 0) -> T:
        """Returns the object of the member ``source``."""
        if self.size == 1:
            return value
        device, is_source = self._engine.device, self.rank == source
        data = self._pickled(value) if is_source else torch.empty(0, dtype=torch.uint8, device=device)
        length = int(self.broadcast(torch.tensor([data.numel()], device=device), source))
        received = self.broadcast(data if is_source else data.new_empty(length), source)
        return value if is_source else _unpickled(received)

    def all_gather_objects(self, value: T) -> list[T]:
        """Returns every member's object, by rank in the group."""
        if self.size == 1:
            return [value]
        padded, lengths = self._padded(value)
        return [_unpickled(data[:length]) for data, length in zip(self.all_gather_alike(padded), lengths, strict=True)]

    def gather_objects(self, value: T) -> list[T]:
        """Returns every member's object, by rank in the group, on the first member; an empty list on the others."""
        if self.size == 1:
            return [value]
        padded, lengths = self._padded(value)
        received = [torch.empty_like(padded) for _ in self.ranks] if self.rank == 0 else None
        self._engine.gather_first(padded, received)
        return [_unpickled(data[:length]) for data, length in zip(received or [], lengths, strict=False)]

    def _pickled(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._engine.device)

    def _padded(self, value: Any) -> tuple[Tensor, list[int]]:
        """Returns this member's object as bytes, padded to the longest of all members, and the lengths of all."""
        data = self._pickled(value)
        lengths = [int(length) for length in self.all_gather_alike(torch.tensor([data.numel()], device=self._engine.device))]
        return torch.cat([data, data.new_zeros(max(lengths) - data.numel())]), lengths


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())
