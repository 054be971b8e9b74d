"""Modules that keep local functions are sent to other processes."""

import pickle
import threading
from typing import Any

import pytest
import torch

from lightning_overlap import ConfigError
from lightning_overlap.tune.pickles import dumps
from tests.helpers.hugging import Module


def scaled(factor: float) -> Any:
    def multiply(x: float, *, plus: float = 1.0) -> float:
        return factor * x + plus + torch.zeros(1).item()  # and a name of the module

    return multiply


def test_local_functions_keep_what_they_enclose() -> None:
    double = scaled(2.0)
    functions = {"local": scaled(3.0), "lambda": lambda x: x + 1, "both": lambda x, inner=double: inner(x)}
    found = pickle.loads(dumps(functions))
    assert [found[name](2.0) for name in found] == [7.0, 3.0, 5.0]
    assert found["local"](2.0, plus=0.0) == 6.0


def test_a_model_of_transformers_whose_activations_are_recomputed() -> None:
    module = Module("llama", recompute=True)
    module.model.enable_input_require_grads()
    found = pickle.loads(dumps(module))
    ids = torch.arange(8).view(1, 8) + 1
    for each in (module, found):
        each.loss({"input_ids": ids, "labels": ids}).backward()
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (module, found)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert found.model.get_input_embeddings()._forward_hooks, "the hook, a local function of transformers"


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"must be pickled: TypeError: cannot pickle '_thread.lock' object. Make what this names later"
    ):
        dumps({"lock": threading.Lock()})
