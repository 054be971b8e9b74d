import pytest
import torch
from torch import nn

from lightning_overlap.probe import examine


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
