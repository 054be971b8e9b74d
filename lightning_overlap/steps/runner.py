"""Runs one rank's actions of a schedule: forwards and backwards of microbatches, in the schedule's order.

    for each action:   receive its inputs   |   compute   |   send its outputs

Tensors between two stages of this rank are only stored. Tensors for other ranks go through a :class:`Transfers`. With one stage there
are neither: the runner computes the microbatches of an ordinary step.

A pair of actions runs in two lanes, after the inputs of both were received. Each sends its outputs when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol

from torch import Tensor

from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.steps.lanes import Lane, Lanes
from lightning_overlap.steps.schedule import Action, Schedule

Tensors = Sequence[Tensor]
"""The tensors that go from stage to stage for one microbatch: detached activations, with ``requires_grad`` if they get a gradient; or
the gradients of those activations."""


class Compute(Protocol):
    """Computes the actions of a schedule."""

    def forward(self, stage: int, microbatch: int, inputs: Tensors) -> Tensors | None:
        """Runs a stage's forward.

        Args:
            stage: the number of the stage.
            microbatch: the number of the microbatch.
            inputs: the activations of the previous stage; empty for stage 0.

        Returns:
            The activations for the next stage; None from the last stage.
        """

    def backward(self, action: Action, gradients: Tensors) -> Tensors:
        """Runs a stage's backward.

        Args:
            action: ``B`` for the complete backward, ``I`` for the gradients of inputs only.
            gradients: the gradients of the activations that ``forward`` returned; empty for the last stage.

        Returns:
            The gradients of those inputs that require one.
        """

    def weights(self, stage: int, microbatch: int) -> None:
        """Computes the gradients of weights, after an ``I``."""


class Transfers(Protocol):
    """Sends activations and gradients between ranks. An item has the name of the stage that computes the activations: ``F2.0`` are the
    activations of stage 2, microbatch 0, and ``B2.0`` their gradients."""

    def start_action(self, index: int) -> None:
        """Called before each action with its index, and after the last one with the number of actions."""

    def send(self, item: Action, tensors: Tensors) -> None:
        """Posts the send of an item to the rank that needs it."""

    def receive(self, item: Action) -> Tensors:
        """Waits for an item from another rank, and returns its tensors."""


class Runner:
    """Runs one rank's actions.

    Args:
        schedule: the schedule of all ranks.
        rank: the number of this rank in the schedule.
        transfers: the transfers between the ranks; None if the schedule has one rank.
    """

    def __init__(self, schedule: Schedule, rank: int, transfers: Transfers | None = None) -> None:
        assert schedule.ranks == 1 or transfers is not None, "a schedule of several ranks needs transfers"
        self.actions = schedule.actions[rank]
        self._units = schedule.units(rank)
        self._schedule = schedule
        self._transfers = transfers
        self._local: dict[Action, Tensors] = {}
        """Items that one stage of this rank has computed, and another one has not used yet."""
        self._trained: set[tuple[int, int]] = set()
        """The stages and microbatches whose activations get gradients."""

    def run(self, compute: Compute, timeline: Timeline | None = None, lanes: Lanes | None = None) -> None:
        """Runs all actions of one batch.

        Args:
            compute: computes the actions.
            timeline: records the time in which each action computes, without its waits.
            lanes: run the pairs of the schedule; None: their actions run one after the other.
        """
        self._local.clear()
        self._trained.clear()
        units = self._units if lanes is not None else [(action,) for action in self.actions]
        index = 0
        for unit in units:
            for _ in unit:
                self._start_action(index)
                index += 1
            first, *beside = [Lane(str(action), partial(self._run, action, self._inputs(action), compute)) for action in unit]
            if beside:
                assert lanes is not None, "without lanes no two actions run at a time"
                lanes.run(first, beside[0], timeline)
            else:
                with nullcontext() if timeline is None else timeline.during(first.name):
                    first.run()
        self._start_action(index)

    def _start_action(self, index: int) -> None:
        if self._transfers is not None:
            self._transfers.start_action(index)

    def _inputs(self, action: Action) -> Tensors:
        """Waits for what an action needs: the activations of the stage before it, or the gradients of its own."""
        kind, stage, microbatch = action
        if kind == "F":
            return self._receive(Action("F", stage - 1, microbatch)) if stage > 0 else ()
        if kind == "W" or (stage, microbatch) not in self._trained:
            return ()
        return self._receive(Action("B", stage, microbatch))

    def _run(self, action: Action, inputs: Tensors, compute: Compute) -> None:
        """Computes an action and sends its outputs."""
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "W":
            compute.weights(stage, microbatch)
        elif action.kind == "F":
            outputs = compute.forward(stage, microbatch, inputs)
            if outputs is not None:
                if any(x.requires_grad for x in outputs):
                    self._trained.add((stage, microbatch))
                self._send(action, outputs)
        elif input_gradients := compute.backward(action, inputs):
            self._send(Action("B", stage - 1, microbatch), input_gradients)

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
