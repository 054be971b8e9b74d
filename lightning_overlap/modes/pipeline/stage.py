"""A rank's stages: the user's training_step on one microbatch, cut at the stage's first and last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_stack import BlockStack, Pass
from lightning_overlap.modes.pipeline.flow import Flow
from lightning_overlap.modes.pipeline.runtime import Form, Forms, Tensors
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients
from lightning_overlap.steps.random_state import pin, pin_torch
from lightning_overlap.steps.schedule import Action
from lightning_overlap.steps.step import Step

SEEDS = 2**63 - 1


class _LetGo(torch.autograd.Function):
    """A root of a stage's backward, which keeps the graph and not the tensor that has been sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Stages:
    """Runs a schedule's actions for one batch.

    Args:
        stack: the model's blocks.
        flow: what goes from stage to stage.
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
        flow: Flow,
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
        self._flow = flow
        self._last = len(flow.stages) - 1
        self._step = step
        self._parts = parts
        self._before = before
        self._shares = shares
        self._seed = step.key
        self._weight_gradients = weight_gradients
        self._actions = frozenset(actions)
        self._finals = finals(actions)
        self._last_backward = [action for action in actions if action.kind in "BI"][-1]
        self._backward_done = backward_done
        self._check = check
        self._kept: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        """By stage and microbatch: what it has received, and the roots of its backward."""
        self._deferred: dict[tuple[int, int], Any] = {}
        self.losses: dict[int, Tensor] = {}
        """By microbatch, where the last stage is."""
        self._backward = False

    def forward(self, stage: int, microbatch: int, received: Tensors, forms: Forms) -> tuple[Tensors, Forms] | None:
        """See :class:`lightning_overlap.modes.pipeline.runtime.Compute`."""
        last = stage == self._last
        came = self._flow.after(stage - 1) if stage > 0 else ()
        grads = torch.is_grad_enabled()
        entered = [x.detach().requires_grad_(form.trained and grads) for x, form in zip(received, forms, strict=True)]
        carried = dict(zip(came, entered, strict=True))
        blocks = self._flow.stages[stage]
        leaving = self._flow.after(stage)
        if not blocks and 0 < stage < self._last:
            roots = [carried[leaf] for leaf in leaving]
            self._kept[stage, microbatch] = entered, roots
            return [x.detach() for x in roots], tuple(map(Form.of, roots))
        how = Pass(
            run=frozenset(blocks),
            stop=self._stack.size if last else blocks.stop,
            carried=carried,
            outputs=dict(self._flow.outputs),
            first=stage == 0,
            wanted=frozenset(leaving).__contains__,
            before=block_seeds(self._seed, microbatch),
        )
        pin(*self._seed, microbatch)
        loss: Tensor | None = None
        # Every stage comes by the code before the blocks, and a rank may have several: it counts once.
        aside = self._step.aside(() if stage == 0 else self._before, metrics=not last)
        with self._stack.passing(how), self._splitting(stage, microbatch), aside:
            loss = self._step.forward(self._parts[microbatch], microbatch)
        if last:
            if loss is None:
                raise ConfigError("training_step gave no loss: a microbatch of a pipeline cannot be left out")
            if self._check and self._shares[microbatch] and loss.isnan().any():
                raise ConfigError(
                    f"the loss of microbatch {microbatch} of one of the first batches is not a number. If it is one without a "
                    "pipeline, a parameter is used on a stage that does not hold it: what is registered before "
                    f"{self._stack.name} is held by the first stage, what is registered after it by the last. Register modules in the "
                    "order of their use, and tie a head by `head.weight = tokens.weight`. A mean over labels is not a number where a "
                    "microbatch has no label that counts: set pipeline_parallel.microbatch_weight to labels or causal_labels."
                )
            self._kept[stage, microbatch] = entered, [loss]
            self.losses[microbatch] = loss.detach()
            return None
        out = [how.find(leaf) for leaf in leaving]
        how.let_go()  # activation checkpoints keep the pass
        self._kept[stage, microbatch] = entered, [_LetGo.apply(x) if x.requires_grad else x for x in out]
        return [x.detach() for x in out], tuple(map(Form.of, out))

    def _splitting(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """Whether linear layers' weights get their gradients in an action of their own."""
        if self._weight_gradients is None or Action("W", stage, microbatch) not in self._actions:
            return nullcontext()
        return self._weight_gradients.splitting()

    def backward(self, action: Action, gradients: Tensors) -> Tensors:
        """See :class:`lightning_overlap.modes.pipeline.runtime.Compute`."""
        stage, microbatch = action.stage, action.microbatch
        received, roots = self._kept.pop((stage, microbatch))
        if not self._backward:
            self._backward = True
            self._step.start_backward()
        with self._completing(action):
            if action.kind == "I":
                assert self._weight_gradients is not None, "the schedule splits backward"
                with self._weight_gradients.recording() as deferred:
                    self._run_backward(stage, roots, gradients, microbatch)
                self._deferred[stage, microbatch] = deferred
            else:
                self._run_backward(stage, roots, gradients, microbatch)
        if action == self._last_backward:
            self._backward_done()
        return [x.grad if x.grad is not None else torch.zeros_like(x) for x in received if x.requires_grad]

    def _run_backward(self, stage: int, roots: Sequence[Tensor], gradients: Tensors, microbatch: int) -> None:
        if stage == self._last:
            if self._shares[microbatch]:  # a loss that is not a number stays so if it counts for 0
                self._step.backward(roots[0], self._shares[microbatch])
        elif gradients:
            torch.autograd.backward([root for root in roots if root.requires_grad], gradients)

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
