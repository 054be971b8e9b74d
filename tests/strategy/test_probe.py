from unittest import mock

import pytest
import torch
from torch import nn

from lightning_overlap.strategy import probe
from lightning_overlap.strategy.probe import examine, methods_that_read_state


class TrustRatio(torch.optim.SGD):
    """As LAMB: the step depends on the norm of the whole parameter."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.norm() * p.grad


class CountsSteps(torch.optim.SGD):
    """Keeps its count of steps in the group, so that half a step counts as one."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["steps"] * p.grad


class GlobalNorm(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm() if grads else 1.0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * p.grad / norm


class GoesBySize(torch.optim.SGD):
    """Looks at the norm of large parameters."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad * (p.norm() if p.numel() > 1000 else 1)


class BeginsLater(torch.optim.SGD):
    """Looks at the norm from the fourth step on."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p -= group["lr"] * p.grad * (p.norm() if count > 3 else 1)


class LargeOnly(GlobalNorm):
    """Refuses small matrices."""

    @torch.no_grad()
    def step(self):
        if any(p.numel() < 1000 for group in self.param_groups for p in group["params"]):
            raise ValueError("parameters of at least 1000 elements, please")
        super().step()


class ElsewhereOnly(GlobalNorm):
    def step(self):
        raise RuntimeError("GlobalNorm runs on CUDA only\nand there is none")


class ScheduleFree(torch.optim.SGD):
    """Steps in train mode only; train() and eval() swap weights."""

    training = False

    @torch.no_grad()
    def step(self):
        assert self.training, "not in train mode"
        for group in self.param_groups:
            for p in group["params"]:
                p -= self.rate_of(group) * p.grad
                self.moments(p).lerp_(p, 0.5)

    def rate_of(self, group):
        return group["lr"]

    def moments(self, p):
        return self.state[p].setdefault("average", torch.zeros_like(p))

    @torch.no_grad()
    def _swap(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.moments(p), 0.5)

    def train(self):
        self.training = True

    @torch.no_grad()
    def eval(self):
        self._swap()


def test_a_size_and_a_step_at_which_it_becomes_coupled_are_found():
    for kind in (GoesBySize, BeginsLater):
        facts = examine(kind([nn.Parameter(torch.ones(4, 4))], 0.1))
        assert facts.independent
        assert not facts.elementwise


def test_an_optimizer_that_refuses_small_matrices_is_tried_on_large_ones():
    facts = examine(LargeOnly([nn.Parameter(torch.ones(4, 4))], 0.1))
    assert facts.reason == "LargeOnly looks at all parameters at once"


def test_an_optimizer_that_refuses_to_be_tried_is_not_taken_for_independent():
    facts = examine(ElsewhereOnly([nn.Parameter(torch.ones(4, 4))], 0.1))
    assert not facts.independent
    assert not facts.known
    assert facts.reason.startswith(
        "ElsewhereOnly fails on test matrices (RuntimeError: GlobalNorm runs on CUDA only), so it is unknown"
    )


def test_methods_that_read_state_beside_the_step_are_found():
    facts = examine(ScheduleFree([nn.Parameter(torch.ones(4, 4))], 0.1))
    assert facts.methods == ("eval",), "train reads none, the others belong to the step"
    assert (facts.elementwise, facts.separable) == (True, True)
    for name in ("SGD", "AdamW", "Adagrad", "Adafactor", "Muon", "SparseAdam"):
        assert methods_that_read_state(getattr(torch.optim, name)) == ()


def test_groups_that_differ_in_numbers_are_tried_once():
    layers = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1 * 0.9**i} for i in range(20)]
    groups = [*layers, {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.1}]
    with mock.patch.object(probe, "_steps", side_effect=probe._steps) as steps:
        assert examine(torch.optim.SGD(groups, 0.1)).separable
    assert steps.call_count == 8


def test_an_optimizer_that_looks_at_all_parameters_is_told():
    facts = examine(GlobalNorm([nn.Parameter(torch.ones(4, 4))], 0.1))
    assert not facts.independent
    assert facts.reason == "GlobalNorm looks at all parameters at once"


@pytest.mark.parametrize(
    ("make", "elementwise", "separable"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), True, True),
        (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), True, True),
        (lambda p: torch.optim.RMSprop(p, 0.1), True, True),
        (lambda p: torch.optim.AdamW(p, 0.0), True, True),
        (lambda p: torch.optim.AdamW(p, 0.1, capturable=True), True, True),
        (lambda p: torch.optim.Adafactor(p), False, False),
        (lambda p: torch.optim.Adafactor(p, 0.0), False, False),
        (lambda p: torch.optim.Muon(p), False, False),
        (lambda p: torch.optim.LBFGS(p), False, False),
        (lambda p: TrustRatio(p, 0.1), False, False),
        (lambda p: CountsSteps(p, 0.1), True, False),
    ],
)
def test_what_an_optimizer_does(make, elementwise, separable):
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = make([parameter])
    random_state = torch.get_rng_state()
    facts = examine(optimizer)
    assert (facts.elementwise, facts.separable) == (elementwise, separable), facts
    assert torch.equal(parameter, torch.ones(4, 4)), "the user's parameters are not touched"
    assert not optimizer.state
    assert torch.equal(random_state, torch.get_rng_state())
