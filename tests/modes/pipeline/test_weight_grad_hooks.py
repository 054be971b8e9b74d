"""Backward in two halves: hooks run when their gradient is computed, and what is not split stays plain."""

import pytest
import torch
from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients, what_splits
from tests.modes.pipeline.split_models import WIDER, WIDTH, Block, assert_equal_gradients, both, split_backward, twins

# -- hooks ---------------------------------------------------------------------------------------------------------


def test_hooks_of_weights_run_with_their_product():
    model, log = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: log.append((name, p.grad is not None)))
        parameter.register_hook(lambda g, name=name: log.append((name, "gradient")) or 2 * g)
    gradients = WeightGradients([model])
    x = torch.randn(5, WIDTH)
    for _ in range(2):
        with gradients.splitting():
            loss = model(x).sum()
        with gradients.recording() as deferred:
            loss.backward()
        assert sorted({name for name, _ in log}) == ["0.bias", "1.bias"]
        log.clear()
        gradients.run(deferred)
        assert log == [("1.weight", "gradient"), ("1.weight", True), ("0.weight", "gradient"), ("0.weight", True)]
        log.clear()
    assert not deferred
    gradients.run(deferred)
    assert not log
    doubled = model[1].weight.grad
    model.zero_grad()
    for parameter in model.parameters():
        parameter._backward_hooks.clear()
    for _ in range(2):
        model(x).sum().backward()
    assert torch.equal(doubled, 2 * model[1].weight.grad)


def test_hooks_of_modules():
    plain, split = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)))
    logs = {}
    for model in (plain, split):
        log = logs.setdefault(model, [])
        for layer in (model[0], model[2]):
            layer.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
            layer.register_forward_hook(lambda m, args, y: y + 1)
            layer.register_full_backward_pre_hook(lambda m, given: (given[0] * 2,))
            layer.register_full_backward_hook(lambda m, of_inputs, of_outputs, log=log: log.extend([*of_inputs, *of_outputs]))
    both(plain, split, [torch.randn(5, WIDTH, requires_grad=True)])
    assert len(logs[plain]) == 4
    assert all(map(torch.equal, logs[plain], logs[split]))


# -- when it is not split ------------------------------------------------------------------------------------------


def test_plain_forward_and_backward_stay():
    model = nn.Linear(WIDTH, WIDER)
    gradients = WeightGradients([model])
    x = torch.randn(5, WIDTH, requires_grad=True)
    y = model(x)
    assert y.grad_fn.name() == "AddmmBackward0"
    with torch.no_grad(), gradients.splitting():
        assert torch.equal(model(x), y)
    with gradients.recording() as deferred:
        y.sum().backward()
    assert not deferred
    assert model.weight.grad is not None
    (of_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    of_x.sum().backward()


def test_microbatches_split_and_whole():
    plain, split = twins(Block)
    inputs = [torch.randn(2, 19, WIDTH) for _ in range(3)]
    for x in inputs:
        plain(x).sum().backward()
    gradients = WeightGradients([split])
    with gradients.splitting():
        first = split(inputs[0]).sum()
    second = split(inputs[1]).sum()
    with gradients.recording() as deferred:
        first.backward()
    gradients.run(deferred)
    second.backward()
    gradients.run(split_backward(gradients, lambda: split(inputs[2]).sum()))
    assert_equal_gradients(plain, split)


def test_gradients_that_the_step_takes_itself_are_refused():
    model = nn.Linear(WIDTH, WIDER)
    gradients = WeightGradients([model])
    x = torch.randn(5, WIDTH, requires_grad=True)
    with gradients.splitting():
        loss = model(x).square().sum()
        with pytest.raises(ConfigError, match=r"torch\.autograd\.grad"):
            torch.autograd.grad(loss, x, retain_graph=True)
    with gradients.recording(), pytest.raises(ConfigError, match="create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_an_error_ends_recording():
    model = nn.Linear(WIDTH, WIDER)
    gradients = WeightGradients([model])
    with pytest.raises(ZeroDivisionError), gradients.splitting():
        raise ZeroDivisionError
    assert model(torch.ones(1, WIDTH)).grad_fn.name() == "AddmmBackward0"
    with pytest.raises(ZeroDivisionError), gradients.recording():
        raise ZeroDivisionError
    assert split_backward(gradients, lambda: model(torch.ones(1, WIDTH)).sum())


def test_an_output_that_is_not_used():
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    gradients = WeightGradients([model])

    def forward():
        model[1](torch.ones(2, WIDTH))
        return model[0](torch.ones(2, WIDTH)).sum()

    assert list(split_backward(gradients, forward)) == [model[0].weight]


def test_an_output_without_gradient():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    plain, split = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))
    both(plain, split, [torch.randn(5, WIDTH)], lambda y: Stop.apply(y).sum())
    assert split[0].weight.grad is None


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_models_are_not_split(compiled):
    plain, split = twins(Block)
    gradients = WeightGradients([split])
    run = torch.compile(split, backend="aot_eager", fullgraph=True) if compiled else split
    x = torch.randn(2, 19, WIDTH)
    deferred = split_backward(gradients, lambda: run(x).sum())
    assert len(deferred) == (0 if compiled else 4)
    gradients.run(deferred)
    plain(x).sum().backward()
    assert_equal_gradients(plain, split)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_subclasses_and_replaced_weights_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"own": Own(4, 4), "attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    nn.utils.parametrizations.weight_norm(model["linear"])
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    kinds = ("Linear", "MultiheadAttention", "NonDynamicallyQuantizableLinear", "Own", "ParametrizationList")
    assert what_splits([model, patched]) == (0, kinds)
    layer = nn.Linear(4, 4)
    gradients = WeightGradients([layer])
    weights = {"weight": torch.randn(4, 4, requires_grad=True), "bias": torch.zeros(4)}
    x = torch.ones(2, 4)
    assert not split_backward(gradients, lambda: torch.func.functional_call(layer, weights, (x,)).sum())
    assert weights["weight"].grad is not None
    assert not split_backward(gradients, lambda: layer(x.to_sparse()).sum())
    assert layer.weight.grad is not None
    assert not split_backward(gradients, lambda: layer(torch.nested.nested_tensor([x, x[:1]])).to_padded_tensor(0.0).sum())
