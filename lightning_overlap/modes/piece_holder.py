"""A mode under which a rank holds pieces of some parameters, each of which is sharded along a dim."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_overlap.modes.base import Holder
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import GroupName
from lightning_overlap.state.absent import is_absent
from lightning_overlap.state.pieces import Partition, Piece
from lightning_overlap.state.shards import Place


class PieceHolder(Holder):
    """Saves and loads the pieces of a :class:`~lightning_overlap.state.pieces.Partition`.

    Attributes:
        holders: name of the group over which parameters are sharded.
        replicas: name of the group of the ranks that hold the same pieces.
        group: the ranks over which parameters are sharded.
        partition: the sharded parameters, from :meth:`parallelize` on.
    """

    holders: ClassVar[GroupName]
    replicas: ClassVar[GroupName]
    group: Group
    partition: Partition
    _install: Callable[[], None]
    """Makes the model compute with this rank's pieces, from :meth:`parallelize` on."""

    @abstractmethod
    def _uninstall(self) -> None:
        """Makes the model compute as the user wrote it."""

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        try:
            self._uninstall()
            with self.partition.unsharded():
                yield
        finally:
            self._install()

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Shards the state that an optimizer creates in its constructor (Adagrad), like its parameter."""
        for optimizer in optimizers:
            for parameter, values in optimizer.state.items():
                if (piece := self.partition.pieces.get(id(parameter))) is None:
                    continue
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.shape == piece.shape:
                        values[key] = piece.of(value, self.group.rank, self.group.size).clone()

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        piece = self.partition.piece(name)
        return tensor if piece is None else piece.of(tensor, self.group.rank, self.group.size)

    def gather_model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self.partition.is_sharded or not self._saves:
            return state
        unsharded: dict[str, Any] = {}
        gathered: dict[int, Tensor] = {}
        for name, value in state.items():
            piece = self.partition.piece(name)
            if piece is not None and not is_absent(value):
                if id(piece) not in gathered:
                    gathered[id(piece)] = self.partition.gather(piece, value)
                value = gathered[id(piece)] if self.group.rank == 0 else value
            unsharded[name] = value
        return unsharded

    def gather_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not self._saves:
            return state
        return self._change_state(optimizer, state, lambda piece, value: self.partition.gather(piece, value).cpu(), is_sharded=True)

    def local_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        rank, size = self.group.rank, self.group.size
        return self._change_state(optimizer, state, lambda piece, value: piece.of(value, rank, size).clone(), is_sharded=False)

    @property
    def _saves(self) -> bool:
        """Whether this rank's group gathers for a checkpoint: other groups hold the same pieces."""
        return self.mesh.index(self.replicas) == 0

    def _change_state(
        self, optimizer: Optimizer, state: dict[str, Any], change: Callable[[Piece, Tensor], Tensor], *, is_sharded: bool
    ) -> dict[str, Any]:
        """Applies ``change`` to the tensors of a state dict that have the shape of a sharded parameter.

        Args:
            optimizer: whose state it is.
            state: its ``state_dict()``.
            change: gets the parameter's piece and the tensor.
            is_sharded: whether these tensors have the piece's shape or the unsharded shape.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changed: dict[int, dict[str, Any]] = {}
        for number in sorted(state["state"]):
            values = state["state"][number]
            if number < len(parameters) and (piece := self.partition.pieces.get(id(parameters[number]))) is not None:
                shape = piece.shape_of(self.group.rank, self.group.size) if is_sharded else piece.shape
                values = {
                    key: change(piece, value) if isinstance(value, Tensor) and value.shape == shape else value
                    for key, value in values.items()
                }
            changed[number] = values
        return {**state, "state": changed}

    def layout_of(self, name: str) -> bool:
        """Whether the tensor is sharded."""
        return self.partition.piece(name) is not None

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        return self.mesh.index(self.holders, rank) if layout else ()

    def sharers_of(self, layout: Hashable) -> GroupName | None:
        return self.replicas if layout else None

    def place_of(self, name: str) -> Place | None:
        piece = self.partition.piece(name)
        return None if piece is None else piece.place(self.group.rank, self.group.size)
