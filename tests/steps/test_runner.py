"""The runner of a schedule, without a pipeline: microbatches of an ordinary step, and several stages in one process."""

import pytest
import torch
from torch import nn

from lightning_overlap.steps.microbatches import split_batch
from lightning_overlap.steps.named_schedules import build
from lightning_overlap.steps.runner import Runner
from lightning_overlap.steps.schedule import Action, Schedule, parse

TWO_STAGES = "F0.0 F1.0 B1.0 F0.1 F1.1 B1.1 B0.0 B0.1 F0.2 F1.2 B1.2 F0.3 F1.3 B1.3 B0.2 B0.3"


class Chain:
    """Linear layers as stages. The loss is the mean of the squared outputs, times the microbatch's share of the batch."""

    def __init__(self, stages, parts):
        torch.manual_seed(0)
        self.layers = [nn.Linear(3, 3) for _ in range(stages)]
        self.parts = parts
        self.order = []
        self._graphs = {}

    def forward(self, stage, microbatch, inputs):
        self.order.append(Action("F", stage, microbatch))
        x = inputs[0].detach().requires_grad_() if stage > 0 else self.parts[microbatch]
        y = self.layers[stage](x)
        is_last = stage == len(self.layers) - 1
        self._graphs[stage, microbatch] = x, y.square().mean() / len(self.parts) if is_last else y
        return None if is_last else [y.detach().requires_grad_()]

    def backward(self, action, gradients):
        self.order.append(action)
        x, root = self._graphs.pop(action[1:])
        torch.autograd.backward(root, gradients[0] if gradients else None)
        return [x.grad] if action.stage > 0 else []

    def gradients(self):
        return [p.grad for layer in self.layers for p in layer.parameters()]


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3)


def whole(stages):
    reference = Chain(stages, [])
    for part in split_batch(batch(), 4):
        y = part
        for layer in reference.layers:
            y = layer(y)
        (y.square().mean() / 4).backward()
    return reference.gradients()


@pytest.mark.parametrize(
    "schedule",
    [build("gpipe", 1, 1, 4), build("1f1b", 1, 1, 4), parse(TWO_STAGES)],
    ids=["gpipe", "1f1b", "two stages"],
)
def test_microbatches_without_a_pipeline_are_those_of_a_loop(schedule: Schedule) -> None:
    chain = Chain(schedule.stages, split_batch(batch(), 4))
    Runner(schedule, 0).run(chain)
    assert chain.order == list(schedule.actions[0])
    assert all(map(torch.equal, chain.gradients(), whole(schedule.stages)))


def test_several_ranks_need_transfers() -> None:
    with pytest.raises(AssertionError, match="needs transfers"):
        Runner(build("1f1b", 2, 1, 4), 0)
