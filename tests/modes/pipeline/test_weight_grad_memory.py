"""Backward in two halves: weights may move between the halves, activations are freed, and copies are ordinary."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightning_overlap.modes.data.guard import GuardedParameters
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients
from tests.modes.pipeline.split_models import WIDER, WIDTH, Block, assert_equal_gradients, both, split_backward, twins

# -- weights that move ---------------------------------------------------------------------------------------------


def test_weights_are_read_through_the_module():
    plain, split = twins(lambda: nn.Linear(WIDTH, WIDER))
    gradients = WeightGradients([split])
    read = []
    split._parameters = GuardedParameters(split._parameters, {0}, read.append)
    x = torch.randn(5, WIDTH)
    deferred = split_backward(gradients, lambda: split(x).sum())
    assert any(p is split.weight for p in read)
    gradients.run(deferred)
    for model in (plain, split):
        model.weight.data = torch.ones(WIDER, WIDTH)
    gradients.run(split_backward(gradients, lambda: split(x).square().sum()))
    plain(x).sum().backward()
    plain.weight.grad, plain.bias.grad = None, None
    split.weight.grad, split.bias.grad = None, None
    plain(x).square().sum().backward()
    gradients.run(split_backward(gradients, lambda: split(x).square().sum()))
    assert_equal_gradients(plain, split)


def test_weights_whose_data_is_replaced_between_the_halves():
    plain, split = twins(lambda: nn.Linear(WIDTH, WIDER))
    source = torch.randn(5, WIDTH)
    gradients = WeightGradients([split])
    found = []
    for model in (plain, split):
        x = source.clone().requires_grad_()
        with gradients.splitting():
            loss = model(x).square().sum()
        model.weight.data = torch.zeros(WIDER, WIDTH)
        with gradients.recording() as deferred:
            loss.backward()
        model.weight.data = torch.ones(WIDER, WIDTH)
        gradients.run(deferred)
        found.append(x.grad)
    assert torch.equal(*found)
    assert_equal_gradients(plain, split)


def test_changes_in_place_are_refused():
    def refused(change, *, between):
        model = nn.Linear(WIDTH, WIDER)
        gradients = WeightGradients([model])
        x = torch.randn(5, WIDTH, requires_grad=True) * 1
        with gradients.splitting():
            loss = model(x).sum()
        if between == "halves":
            with gradients.recording() as deferred:
                loss.backward()
            with torch.no_grad():
                change(model, x)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients.run(deferred)
        else:
            with torch.no_grad():
                change(model, x)
            with gradients.recording(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    refused(lambda model, x: x.add_(1), between="forward and backward")
    refused(lambda model, x: x.add_(1), between="halves")
    refused(lambda model, x: model.weight.add_(1), between="forward and backward")


def test_layers_changed_in_place_after_them():
    plain, split = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDER), nn.ReLU(inplace=True), nn.Linear(WIDER, WIDTH, bias=False)))
    both(plain, split, [torch.randn(5, WIDTH), torch.randn(2, 19, WIDTH), torch.randn(2, WIDTH, 19).transpose(1, 2)])


# -- memory and copies ---------------------------------------------------------------------------------------------


def test_activations_are_freed_as_products_are_computed():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    stored = {}  # what the tensor's memory is freed with

    def keep(name, x):
        stored[name] = weakref.ref(x.untyped_storage())

    def alive():
        return {name for name, storage in stored.items() if storage() is not None}

    model[0].register_forward_pre_hook(lambda m, args: keep("input of 0", args[0]))
    model[0].register_forward_hook(lambda m, args, y: keep("output of 0", y))
    model[2].register_forward_pre_hook(lambda m, args: keep("input of 2", args[0]))
    seen = []
    for layer in (model[0], model[2]):
        layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(alive()))
    gradients = WeightGradients([model])
    gc.disable()  # nothing of it waits for the collector
    try:
        with gradients.splitting():
            loss = model(torch.randn(5, WIDTH) * 1).sum()
        assert alive() == {"input of 0", "output of 0", "input of 2"}
        with gradients.recording() as deferred:
            loss.backward()
        assert alive() == {"input of 0", "input of 2"}
        gradients.run(deferred)
        assert seen == [{"input of 0"}, set()]
    finally:
        gc.enable()


def test_what_waits_is_freed_weight_by_weight():
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    gradients = WeightGradients([model])
    deferred = split_backward(gradients, lambda: model(torch.randn(5, WIDTH)).sum())
    nodes = {weight: weakref.ref(roots[0].grad_fn) for weight, roots in deferred.items()}
    waiting = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(
            lambda p: waiting.append(sum(node().saved_tensors is not None for weight, node in nodes.items() if weight in deferred))
        )
    gradients.run(deferred)
    assert waiting == [3, 2, 1, 0]
    assert all(node() is None for node in nodes.values())


@pytest.mark.parametrize("when", ["split", "removed"])
def test_copies_and_pickles_are_ordinary(when):
    model = Block()
    gradients = WeightGradients([model])
    if when == "removed":
        gradients.remove()
        assert not any("forward" in vars(module) for module in model.modules())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(2, 19, WIDTH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert not split_backward(gradients, lambda other=other: other(x).sum())
        assert all(p.grad is not None for p in other.parameters())
        with torch.no_grad():
            other.up.weight.zero_()
        assert not torch.equal(other(x), model(x)), "a copy computes with its own weights"
        again = WeightGradients([other])
        assert len(split_backward(again, lambda other=other: other(x).sum())) == 4
        again.remove()
        assert not any("forward" in vars(module) for module in other.modules())
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_and_names_stay():
    plain, split = twins(Block)
    WeightGradients([split])
    assert list(plain.state_dict()) == list(split.state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in split.named_modules()]


def test_two_splits_are_refused():
    model = Block()
    first = WeightGradients([model])
    with pytest.raises(RuntimeError, match="split already"):
        WeightGradients([model.up])
    with pytest.raises(RuntimeError, match="split already"):
        WeightGradients([nn.Linear(2, 2), model])
    first.remove()
    WeightGradients([model]).remove()
