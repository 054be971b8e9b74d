"""Runs the user's training_step on one microbatch, from the first to the last block of a stage, forward and backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import Pass
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.snapshots import written_attributes
from lightning_overlap.modes.pipeline.flow import Flow
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients
from lightning_overlap.nn.moe import COUNTS
from lightning_overlap.steps.forward import Forward, Forwards
from lightning_overlap.steps.microbatches import Microbatches
from lightning_overlap.steps.random_state import block_seeder, seed_all, seed_backward
from lightning_overlap.steps.runner import Tensors
from lightning_overlap.steps.schedule import Action


class _Release(torch.autograd.Function):
    """Makes a root for a stage's backward: it keeps the graph, so that the activations can be freed when they are sent.

    Forward: a tensor of any shape and floating dtype -> the same shape and dtype, with the memory of one element.
    Backward: the gradient, unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class StagedModel:
    """The model in stages: the same for all batches of a fit.

    Attributes:
        stack: the blocks.
        flow: the tensors that stages send.
        first_stage: modules before the blocks that have buffers. These belong to the first stage.
        weight_gradients: computes deferred gradients of weights; None if no gradient is deferred.
        backward_done: called after a batch's last backward. Deferred gradients of weights may follow.
        forwards: the forwards under way, each with its state.
    """

    stack: BlockStack
    flow: Flow
    first_stage: Sequence[nn.Module]
    weight_gradients: WeightGradients | None
    backward_done: Callable[[], None]
    forwards: Forwards


class Stages:
    """Computes a schedule's actions for one batch: the :class:`~lightning_overlap.steps.runner.Compute` of a pipeline.

    Args:
        model: the model in stages.
        batch: the microbatches.
        actions: all actions of this rank.
        check: refuse a NaN loss: it shows that a stage has used an absent parameter.
        watched: modules and objects whose attributes are compared before and after each backward.

    Attributes:
        losses: by microbatch, its detached loss, on the rank of the last stage.
        written: attributes of watched objects that a backward has written.
    """

    def __init__(
        self, model: StagedModel, batch: Microbatches, actions: Sequence[Action], *, check: bool, watched: Sequence[Any] = ()
    ) -> None:
        self.written: set[str] = set()
        self._watched = watched
        self.losses: dict[int, Tensor] = {}
        self._model = model
        self._batch = batch
        self._last_stage = len(model.flow.stages) - 1
        self._actions = frozenset(actions)
        self._completing_actions = completing(actions)
        self._last_backward = [action for action in actions if action.kind in "BI"][-1]
        self._check = check
        self._graphs: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        """By stage and microbatch: the leaves of its graph (received activations), and the roots of its backward."""
        self._deferred: dict[tuple[int, int], Any] = {}
        """By stage and microbatch: the gradients of weights that an ``I`` has deferred."""
        self._forwards: defaultdict[int, Forward] = defaultdict(Forward)
        """By microbatch, the state of its forward on all stages of this rank."""
        self._last_actions = {action.microbatch: action for action in actions}
        self._backward_started = False

    def forward(self, stage: int, microbatch: int, inputs: Tensors) -> Tensors | None:
        """See :class:`lightning_overlap.steps.runner.Compute`."""
        flow, step, is_last = self._model.flow, self._batch.step, stage == self._last_stage
        grads = torch.is_grad_enabled()
        leaves = [x.detach().requires_grad_(x.requires_grad and grads) for x in inputs]
        received = dict(zip(flow.sent_after(stage - 1) if stage > 0 else (), leaves, strict=True))
        blocks, sent = flow.stages[stage], flow.sent_after(stage)
        if not blocks and 0 < stage < self._last_stage:
            return self._detach_outputs(stage, microbatch, leaves, [received[leaf] for leaf in sent])
        current_pass = Pass(
            local_blocks=frozenset(blocks),
            end_block=self._model.stack.size if is_last else blocks.stop,
            received=received,
            structures=dict(flow.outputs),
            is_first=stage == 0,
            is_kept=frozenset(sent).__contains__,
            before_block=block_seeder(step.key, microbatch),
        )
        seed_all(*step.key, microbatch)
        loss: Tensor | None = None
        # The code before the blocks runs on every stage. Only the first stage may change that code's buffers.
        preserved = step.preserve(() if stage == 0 else self._model.first_stage, metrics=not is_last)
        running = self._model.forwards.running(self._forwards[microbatch])
        with running, self._model.stack.running(current_pass), self._splitting(stage, microbatch), preserved:
            loss = step.forward(self._batch.parts[microbatch], microbatch)
        if is_last:
            self._graphs[stage, microbatch] = leaves, [self._checked_loss(loss, microbatch)]
            return None
        outputs = [current_pass.resolve(leaf) for leaf in sent]
        current_pass.release()  # activation checkpoints reference the pass until backward
        return self._detach_outputs(stage, microbatch, leaves, outputs)

    def _detach_outputs(self, stage: int, microbatch: int, leaves: list[Tensor], outputs: list[Tensor]) -> Tensors:
        """Keeps the graph of a stage's outputs for its backward, and returns the outputs without it."""
        self._graphs[stage, microbatch] = leaves, [_Release.apply(x) if x.requires_grad else x for x in outputs]
        return [x.detach().requires_grad_(x.requires_grad) for x in outputs]

    def _checked_loss(self, loss: Tensor | None, microbatch: int) -> Tensor:
        if loss is None:
            raise ConfigError("training_step returned no loss. A pipeline needs a loss of every microbatch: it cannot skip one")
        if self._check and self._batch.shares[microbatch] and loss.isnan().any():
            raise ConfigError(
                f"the loss of microbatch {microbatch} of the first batch is NaN. If it is finite without pipeline_parallel: (1) a "
                "stage uses a parameter that another stage holds: the first stage holds modules that are registered before "
                f"{self._model.stack.name}, the last stage those after it. Register modules in the order of their use, and tie a head "
                "by `head.weight = tokens.weight`; (2) a microbatch has no counted label, so that its mean over labels is NaN: set "
                "pipeline_parallel.microbatch_weight to labels or causal_labels"
            )
        self.losses[microbatch] = loss.detach()
        return loss

    def _splitting(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """Inside, linear layers defer their weights' gradients, if the schedule has an action ``W`` for them."""
        if self._model.weight_gradients is None:
            return nullcontext()
        return self._model.weight_gradients.splitting(Action("W", stage, microbatch) in self._actions)

    def backward(self, action: Action, gradients: Tensors) -> Tensors:
        """See :class:`lightning_overlap.steps.runner.Compute`."""
        stage, microbatch = action.stage, action.microbatch
        leaves, roots = self._graphs.pop((stage, microbatch))
        seed_backward(self._batch.step.key, microbatch, stage)
        with self._model.forwards.backward(self._forwards[microbatch]):
            if not self._backward_started:
                self._backward_started = True
                self._batch.step.start_backward()
            with written_attributes(self._watched) as written:
                self._compute_backward(action, roots, gradients)
        self.written |= {name for name in written if not name.endswith(f".{COUNTS}")}
        self._forget_after(action)
        if action == self._last_backward:
            self._model.backward_done()
        return [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves if x.requires_grad]

    def _compute_backward(self, action: Action, roots: Sequence[Tensor], gradients: Tensors) -> None:
        stage, microbatch = action.stage, action.microbatch
        with self._completing(action):
            if action.kind == "I":
                assert self._model.weight_gradients is not None, "the schedule splits backward"
                with self._model.weight_gradients.recording() as deferred:
                    self._run_backward(stage, roots, gradients, microbatch)
                self._deferred[stage, microbatch] = deferred
            else:
                self._run_backward(stage, roots, gradients, microbatch)

    def _run_backward(self, stage: int, roots: Sequence[Tensor], gradients: Tensors, microbatch: int) -> None:
        if stage == self._last_stage:
            share = self._batch.shares[microbatch]
            if share:  # a NaN loss times 0 is NaN
                self._batch.step.backward(roots[0], share)
        elif gradients:
            torch.autograd.backward([root for root in roots if root.requires_grad], gradients)

    def weights(self, stage: int, microbatch: int) -> None:
        """See :class:`lightning_overlap.steps.runner.Compute`."""
        assert self._model.weight_gradients is not None, "the schedule splits backward"
        action = Action("W", stage, microbatch)
        with self._model.forwards.backward(self._forwards[microbatch]), self._completing(action):
            self._model.weight_gradients.run(self._deferred.pop((stage, microbatch)))
        self._forget_after(action)

    def _forget_after(self, action: Action) -> None:
        """Frees the state of a microbatch's forward (gathered inputs, for example) after its last action on this rank."""
        if action == self._last_actions[action.microbatch]:
            del self._forwards[action.microbatch]

    def _completing(self, action: Action) -> AbstractContextManager[None]:
        """Inside, modes hold gradients, unless the action completes them."""
        return nullcontext() if action in self._completing_actions else self._batch.step.hold()

    def finish(self) -> None:
        """To be called after the last action.

        Raises:
            ConfigError: this rank ran no backward.
        """
        if not self._backward_started:
            raise ConfigError(
                "no stage on this rank ran a backward: its blocks have no trainable parameters and receive no gradient. Use fewer "
                "stages, or set pipeline_parallel.layers_per_stage so that each rank has a block that is trained"
            )
        self._batch.step.finish_backward()


def completing(actions: Sequence[Action]) -> frozenset[Action]:
    """The actions of a rank that complete gradients of a stage: its last backward, and its last ``W``.

    The last backward does not count if it computes gradients of weights too and a ``W`` of an earlier microbatch follows (B1.0 I1.1
    B1.2 W1.1): only some parameters are complete after it, and the modes cannot tell which. All are complete at the end.
    """
    chosen: set[Action] = set()
    for stage in {action.stage for action in actions}:
        backwards = [a for a in actions if a.stage == stage and a.kind in "BI"]
        weight_gradients = [a for a in actions if a.stage == stage and a.kind in "BW"]
        if backwards[-1].kind == "I" or backwards[-1] == weight_gradients[-1]:
            chosen.add(backwards[-1])
        if weight_gradients and weight_gradients[-1].kind == "W":
            chosen.add(weight_gradients[-1])
    return frozenset(chosen)
