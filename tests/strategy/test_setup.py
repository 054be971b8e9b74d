"""What a fit prints about memory before its first step."""

import pytest
import torch
from torch import nn

from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.plan import resolve
from lightning_overlap.ranks.world import WORLD
from lightning_overlap.strategy.probe import examine
from lightning_overlap.strategy.setup import print_memory


class Codes(torch.Tensor):
    """Numbers of 8 bits with a scale for each 20 of them, which look like a tensor of fp32."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class EightBit(torch.optim.SGD):
    """Keeps a byte and a fifth for each element: as a tensor of bytes, or as a tensor that is made of two."""

    wrapped = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    codes, scales = torch.zeros(p.shape, dtype=torch.uint8), torch.zeros(p.numel() // 20)
                    kept = {"codes": codes, "scales": scales.bfloat16().repeat(2)}
                    self.state[p] = {"codes": Codes(codes, scales)} if self.wrapped else kept
                    p -= group["lr"] * p.grad


class WrappedEightBit(EightBit):
    wrapped = True


class Refuses(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("needs CUDA")


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (torch.optim.AdamW, "optimizer about 8.0 MB,", "optimizer 8.0 MB,"),
        (torch.optim.SGD, "optimizer 0.00 MB,", "optimizer 0.00 MB,"),
        (EightBit, "optimizer about 1.2 MB,", "optimizer 1.2 MB,"),
        (WrappedEightBit, "optimizer about 1.2 MB,", "optimizer 1.2 MB,"),
        (Refuses, "optimizer 0.00 MB (without the state of Refuses, which is not known),", None),
    ],
)
def test_the_bytes_of_the_optimizers_state_are_counted(kind, before, after):
    module = nn.Linear(1000, 1000, bias=False)
    frozen = nn.Parameter(torch.ones(1000), requires_grad=False)
    optimizer = kind([{"params": [module.weight, frozen]}], 0.1)
    plan = resolve(OverlapConfig(), Facts(world_size=1, optimizers=(examine(optimizer),)))

    def line():
        print_memory(module, [optimizer], [], plan)
        return WORLD.printed["memory"]

    assert f"weights 4.0 MB, gradients 4.0 MB, {before}" in line()
    if after is not None:
        module(torch.ones(1, 1000)).sum().backward()
        optimizer.step()
        assert after in line()
