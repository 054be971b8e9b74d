"""Runs one rank's actions of a schedule: forwards and backwards of microbatches, in the schedule's order.

    for each action:   receive its inputs   |   compute   |   send its outputs

Between two stages of one rank tensors are handed over directly. Between two ranks a :class:`Transfers` sends and receives them. With
one stage nothing is handed over: the runner then computes the microbatches of an ordinary step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

from torch import Tensor

from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.steps.schedule import Action, Schedule

Tensors = Sequence[Tensor]
"""The tensors that a stage hands on for one microbatch: activations, detached, ``requires_grad`` if they have a gradient; or the
gradients of those activations that have one."""


class Compute(Protocol):
    """What an action of a schedule computes."""

    def forward(self, stage: int, microbatch: int, inputs: Tensors) -> Tensors | None:
        """Runs a stage's forward.

        Args:
            stage: its number.
            microbatch: its number.
            inputs: the activations of the stage before; none for stage 0.

        Returns:
            The activations for the next stage; None from the last stage.
        """

    def backward(self, action: Action, gradients: Tensors) -> Tensors:
        """Runs a stage's backward: ``B`` the whole of it, ``I`` without the gradients of weights.

        Args:
            action: what to run.
            gradients: of the activations that the stage has handed on; none for the last stage.

        Returns:
            The gradients of the inputs that have one.
        """

    def weights(self, stage: int, microbatch: int) -> None:
        """Computes the gradients of weights that an ``I`` has left."""


class Transfers(Protocol):
    """Sends activations and gradients between ranks. An item is named by the stage whose activations it belongs to: ``F2.0`` are the
    activations after stage 2 of microbatch 0, ``B2.0`` their gradients."""

    def start_action(self, index: int) -> None:
        """Called before the rank's action number ``index``; once more, with the number of actions, after the last one."""

    def send(self, item: Action, tensors: Tensors) -> None:
        """Sends an item to the rank that needs it."""

    def receive(self, item: Action) -> Tensors:
        """Waits for an item of another rank."""


class Runner:
    """Runs one rank's actions.

    Args:
        schedule: of all ranks.
        rank: this one's number in the schedule.
        transfers: between the ranks; None if the schedule has one rank.
    """

    def __init__(self, schedule: Schedule, rank: int, transfers: Transfers | None = None) -> None:
        assert schedule.ranks == 1 or transfers is not None, "several ranks hand tensors on by transfers"
        self.actions = schedule.actions[rank]
        self._schedule = schedule
        self._transfers = transfers
        self._local: dict[Action, Tensors] = {}
        """Items on their way from one stage of this rank to another."""

    def run(self, compute: Compute, timeline: Timeline | None = None) -> None:
        """Runs all actions of one batch.

        Args:
            compute: what the actions compute.
            timeline: records when each action computes, without its waiting.
        """
        self._local.clear()
        trained: set[tuple[int, int]] = set()  # stages and microbatches whose activations will get gradients
        for index, action in enumerate(self.actions):
            stage, microbatch = action.stage, action.microbatch
            if self._transfers is not None:
                self._transfers.start_action(index)
            computing = nullcontext() if timeline is None else timeline.during(str(action))
            if action.kind == "F":
                inputs = self._receive(Action("F", stage - 1, microbatch)) if stage > 0 else ()
                with computing:
                    outputs = compute.forward(stage, microbatch, inputs)
                if outputs is not None:
                    if any(x.requires_grad for x in outputs):
                        trained.add((stage, microbatch))
                    self._send(Action("F", stage, microbatch), outputs)
            elif action.kind == "W":
                with computing:
                    compute.weights(stage, microbatch)
            else:
                gradients = self._receive(Action("B", stage, microbatch)) if (stage, microbatch) in trained else ()
                with computing:
                    of_inputs = compute.backward(action, gradients)
                if of_inputs:
                    self._send(Action("B", stage - 1, microbatch), of_inputs)
        if self._transfers is not None:
            self._transfers.start_action(len(self.actions))

    def _is_local(self, item: Action) -> bool:
        placement = self._schedule.placement
        return placement[item.stage] == placement[item.stage + 1]

    def _send(self, item: Action, tensors: Tensors) -> None:
        if self._is_local(item):
            self._local[item] = tensors
        else:
            assert self._transfers is not None, "the item belongs to another rank"
            self._transfers.send(item, tensors)

    def _receive(self, item: Action) -> Tensors:
        if self._is_local(item):
            return self._local.pop(item)
        assert self._transfers is not None, "the item comes from another rank"
        return self._transfers.receive(item)
