"""A rank's stages: the user's training_step on one microbatch, cut at the stage's first and last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.block_stack import BlockStack, Pass
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.base import Step
from lightning_overlap.modes.pipeline.random_state import pin, pin_torch
from lightning_overlap.modes.pipeline.runtime import Form
from lightning_overlap.modes.pipeline.schedule import Action
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients

SEEDS = 2**63 - 1


class _LetGo(torch.autograd.Function):
    """The root of a stage's backward, which keeps the graph and not the hidden states that have been sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(1).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Stages:
    """Runs a schedule's actions for one batch.

    Args:
        stack: the model's blocks.
        stages: by stage, its blocks.
        step: the user's, on a microbatch.
        parts: the microbatches.
        before: modules before the blocks with buffers, whose stage is the first one.
        shares: by microbatch, its part of the batch's loss.
        weight_gradients: what a schedule that splits backward needs.
        actions: the rank's, all of them.
        backward_done: called after the last backward; weights' gradients that it has left may follow.
        check: look whether the loss is a number, which it is not if a parameter of another rank was used.
    """

    def __init__(
        self,
        stack: BlockStack,
        stages: Sequence[range],
        step: Step,
        parts: Sequence[Any],
        before: Sequence[nn.Module],
        shares: Sequence[float],
        weight_gradients: WeightGradients | None,
        actions: Sequence[Action],
        backward_done: Callable[[], None],
        *,
        check: bool,
    ) -> None:
        self._stack = stack
        self._stages = stages
        self._step = step
        self._parts = parts
        self._before = before
        self._shares = shares
        self._seed = step.place
        self._weight_gradients = weight_gradients
        self._actions = frozenset(actions)
        self._finals = finals(actions)
        self._last_backward = [action for action in actions if action.kind in "BI"][-1]
        self._backward_done = backward_done
        self._check = check
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._deferred: dict[tuple[int, int], Any] = {}
        self.losses: dict[int, Tensor] = {}
        """By microbatch, where the last stage is."""
        self._backward = False

    def forward(self, stage: int, microbatch: int, received: Tensor | None, form: Form | None) -> tuple[Tensor, Form] | None:
        """See :class:`lightning_overlap.modes.pipeline.runtime.Compute`."""
        last = stage == len(self._stages) - 1
        if received is not None and form is not None:
            received = received.detach().requires_grad_(form.trained and torch.is_grad_enabled())
        blocks = self._stages[stage]
        if not blocks and received is not None and not last and form is not None:
            self._kept[stage, microbatch] = received, received
            return received.detach(), form
        sent: list[Tensor] = []
        how = Pass(
            run=frozenset(blocks),
            stop=self._stack.size if last else blocks.stop if blocks else 0,
            before=block_seeds(self._seed, microbatch),
            items=form.items if form is not None else None,
        )
        if received is not None:
            entered = received
            if blocks:
                how.enter = {blocks.start: lambda _: entered}
            else:
                how.last = lambda _: entered
        if not last:
            how.leave = {blocks[-1] if blocks else -1: sent.append}
        pin(*self._seed, microbatch)
        loss: Tensor | None = None
        # Every stage comes by the code before the blocks, and a rank may have several: it counts once.
        aside = self._step.aside(() if stage == 0 else self._before, metrics=not last)
        with self._stack.passing(how), self._splitting(stage, microbatch), aside:
            loss = self._step.forward(self._parts[microbatch], microbatch)
        if last:
            if loss is None:
                raise ConfigError("training_step gave no loss: a microbatch of a pipeline cannot be left out")
            if self._check and loss.isnan().any():
                raise ConfigError(
                    "the loss of one of the first batches is not a number. If it is one without a pipeline, a parameter is used on a "
                    f"stage that does not hold it: what is registered before {self._stack.name} is held by the first stage, what is "
                    "registered after it by the last. Register modules in the order of their use, and tie a head by "
                    "`head.weight = tokens.weight`."
                )
            self._kept[stage, microbatch] = received, loss
            self.losses[microbatch] = loss.detach()
            return None
        (out,) = sent
        self._kept[stage, microbatch] = received, _LetGo.apply(out) if out.requires_grad else out
        return out.detach(), Form(tuple(out.shape), out.dtype, out.requires_grad, how.items or 0)

    def _splitting(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """Whether linear layers' weights get their gradients in an action of their own."""
        if self._weight_gradients is None or Action("W", stage, microbatch) not in self._actions:
            return nullcontext()
        return self._weight_gradients.splitting()

    def backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        """See :class:`lightning_overlap.modes.pipeline.runtime.Compute`."""
        stage, microbatch = action.stage, action.microbatch
        received, out = self._kept.pop((stage, microbatch))
        if not self._backward:
            self._backward = True
            self._step.start_backward()
        with self._completing(action):
            if action.kind == "I":
                assert self._weight_gradients is not None, "the schedule splits backward"
                with self._weight_gradients.recording() as deferred:
                    self._run_backward(stage, out, gradient, microbatch)
                self._deferred[stage, microbatch] = deferred
            else:
                self._run_backward(stage, out, gradient, microbatch)
        if action == self._last_backward:
            self._backward_done()
        return received.grad if received is not None and received.requires_grad else None

    def _run_backward(self, stage: int, out: Tensor, gradient: Tensor | None, microbatch: int) -> None:
        if stage == len(self._stages) - 1:
            self._step.backward(out, self._shares[microbatch])
        elif out.requires_grad:
            torch.autograd.backward(out, gradient)

    def weights(self, stage: int, microbatch: int) -> None:
        """See :class:`lightning_overlap.modes.pipeline.runtime.Compute`."""
        assert self._weight_gradients is not None, "the schedule splits backward"
        with self._completing(Action("W", stage, microbatch)):
            self._weight_gradients.run(self._deferred.pop((stage, microbatch)))

    def _completing(self, action: Action) -> AbstractContextManager[None]:
        return nullcontext() if action in self._finals else self._step.hold()

    def finish(self) -> None:
        """After the last action.

        Raises:
            ConfigError: nothing in the model is trained.
        """
        if not self._backward:
            raise ConfigError("no stage of this rank ran a backward: nothing of its model is trained; use fewer stages")
        self._step.finish_backward()


def block_seeds(seed: Sequence[int], microbatch: int) -> Callable[[int], None]:
    """Told a block's number, pins its random numbers: those of the microbatch and the block, wherever they are run."""
    return lambda block: pin_torch(hash((*seed, microbatch, block)) & SEEDS)


def finals(actions: Sequence[Action]) -> frozenset[Action]:
    """The actions of a rank after which gradients of a stage are complete: its last backward, its last weights.

    Where a stage's last backward computes weights' gradients too, and others of these still come, neither is: what is complete
    with it would be told apart from what is not only by parameter, and is complete at the end at the latest.
    """
    found: set[Action] = set()
    for stage in {action.stage for action in actions}:
        own = [a for a in actions if a.stage == stage]
        backwards = [a for a in own if a.kind in "BI"]
        products = [a for a in own if a.kind in "BW"]
        if backwards[-1].kind == "I" or backwards[-1] == products[-1]:
            found.add(backwards[-1])
        if products and products[-1].kind == "W":
            found.add(products[-1])
    return frozenset(found)
