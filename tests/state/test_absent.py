"""An absent parameter keeps its shape, has no memory, and ignores writes."""

import copy
import pickle

import torch
from torch import nn

from lightning_overlap.state.absent import is_absent, make_absent, make_present


def test_in_place_functions_do_nothing_to_an_absent_parameter():
    module, present = nn.Linear(4, 3, bias=False).requires_grad_(False), nn.Parameter(torch.ones(3, 4))
    absent = module.weight
    make_absent(absent)
    with torch.no_grad():
        absent.clamp_(0, 1)
        absent.copy_(present)
        absent.data[:2].zero_()
        absent[0] = 3
        absent /= absent.norm(dim=1, keepdim=True)
        nn.init.normal_(absent)
        torch._foreach_mul_([absent, present], [2.0, 3.0])
    assert is_absent(absent)
    assert absent.isnan().all()
    assert present.eq(3).all(), "of a list, the present parameters are changed"
    assert type(absent + 1) is torch.Tensor
    assert is_absent(copy.deepcopy(module).weight)
    assert type(pickle.loads(pickle.dumps(module)).weight) is nn.Parameter
    make_present(absent, allocate=True)
    assert type(absent) is nn.Parameter
    assert not is_absent(absent)
