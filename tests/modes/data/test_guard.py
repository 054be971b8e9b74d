import copy
import pickle

import torch
from torch import nn

from lightning_overlap.modes.data.guard import GuardedParameters


def guard(module, incomplete, log):
    module._parameters = GuardedParameters(module._parameters, incomplete, log.append)


def test_every_way_of_reading_completes():
    module, incomplete, log = nn.Linear(2, 2), {0}, []
    parameters = dict(module._parameters)
    guard(module, incomplete, log)
    for read in (
        lambda: module.weight,
        lambda: list(module.parameters()),
        lambda: module.state_dict(),
        lambda: module(torch.ones(1, 2)),
        lambda: module._parameters.get("weight"),
    ):
        log.clear()
        read()
        assert any(p is parameters["weight"] for p in log)
    log.clear()
    incomplete.clear()
    module(torch.ones(1, 2))
    assert not log, "nothing is incomplete, so nothing is called"


def test_copies_are_ordinary_modules():
    module = nn.Linear(2, 2)
    guard(module, set(), [])
    assert type(copy.deepcopy(module)._parameters) is dict
    assert type(pickle.loads(pickle.dumps(module))._parameters) is dict
