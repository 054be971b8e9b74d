"""Gathers the parameters, buffers and optimizer state of all stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_overlap.modes.pipeline.partition import Partition
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.shared_state import share


class StageState:
    """The state of a model in stages.

    Args:
        partition: the parameters and buffers, and the ranks that hold them.
        group: the pipeline's ranks.

    Attributes:
        was_complete: whether every rank had memory for the complete model at first. Otherwise each has made its own stages only.
    """

    def __init__(self, partition: Partition, group: Group) -> None:
        self._partition, self._group = partition, group
        self.was_complete = all(group.all_gather_objects(partition.is_complete))

    def send(self, is_sent: Callable[[str], bool]) -> None:
        """Sends parameters and buffers, chosen by name, from the ranks that hold them to all ranks. Collective."""
        for rank in range(self._group.size):
            share([self._partition.tensor(name) for name in self._partition.sent_by(rank) if is_sent(name)], self._group, rank)

    def gather(self, *, buffers: bool) -> list[str]:
        """Gathers the complete model on every rank. Collective.

        Args:
            buffers: gather the buffers too.

        Returns:
            The names of the parameters that were absent on this rank.
        """
        restored = self._partition.restore()
        self.send(lambda name: buffers or not self._partition.is_buffer(name))
        return restored

    def release(self, *, complete: bool) -> None:
        """Makes all parameters present, with values if every rank had the complete model. Collective, if ``complete``."""
        if complete and self.was_complete:
            self.gather(buffers=True)
            return
        self._partition.restore(allocate=self.was_complete)
        if complete:  # this rank never had the values of other stages' parameters; of buffers it had
            self.send(self._partition.is_buffer)

    def gather_model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`lightning_overlap.modes.base.Holder.gather_model_state`."""
        if self._group.ranks[0] != 0:
            return state  # only the pipeline with rank 0 saves
        names = set(self._partition.sent_by(self._group.rank))
        parts = self._group.gather_objects({name: state[name].cpu() for name in names if name in state and self._group.rank > 0})
        remote = {name: value for part in parts for name, value in part.items()}
        return {name: remote.get(self._partition.first_name(name), value) for name, value in state.items()}

    def gather_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`lightning_overlap.modes.base.Holder.gather_optimizer_state`."""
        if self._group.ranks[0] != 0:
            return state
        parts = self._group.gather_objects(state["state"])
        return {**state, "state": {number: value for part in reversed(parts) for number, value in part.items()}}

    def local_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`lightning_overlap.modes.base.Holder.local_optimizer_state`."""
        # Before the state is moved: other stages' state is never on this rank's device.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        absent = {id(parameter) for parameter in self._partition.absent_parameters().values()}
        numbers = {number for number, parameter in enumerate(parameters) if id(parameter) not in absent}
        return {**state, "state": {number: values for number, values in state["state"].items() if number in numbers}}
