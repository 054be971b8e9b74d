"""Backward in two halves: the same bits as in one, whatever model it goes through."""

import pytest
import torch
from torch import nn

from lightning_overlap.modes.pipeline.weight_grad import WeightGradients, what_splits
from tests.modes.pipeline.split_models import WIDER, WIDTH, Block, assert_equal_gradients, both, split_backward, twins

# -- the same bits -------------------------------------------------------------------------------------------------

MAKE = {
    "vector": lambda: torch.randn(WIDTH),
    "vector, strided": lambda: torch.randn(WIDTH, 2)[:, 0],
    "matrix": lambda: torch.randn(37, WIDTH),
    "matrix, one row": lambda: torch.randn(1, WIDTH),
    "matrix, no rows": lambda: torch.randn(0, WIDTH),
    "matrix, transposed": lambda: torch.randn(WIDTH, 37).t(),
    "matrix, part of rows": lambda: torch.randn(37, 2 * WIDTH)[:, :WIDTH],
    "matrix, one row for all": lambda: torch.randn(1, WIDTH).expand(37, -1),
    "3-d": lambda: torch.randn(3, 19, WIDTH),
    "3-d, batch of one": lambda: torch.randn(1, 19, WIDTH),
    "3-d, one token": lambda: torch.randn(1, 1, WIDTH),
    "3-d, empty": lambda: torch.randn(0, 19, WIDTH),
    "3-d, sequence first": lambda: torch.randn(19, 3, WIDTH).transpose(0, 1),
    "3-d, features first": lambda: torch.randn(3, WIDTH, 19).transpose(1, 2),
    "3-d, part of rows": lambda: torch.randn(3, 19, 2 * WIDTH)[..., WIDTH:],
    "4-d": lambda: torch.randn(2, 3, 7, WIDTH),
    "4-d, heads moved": lambda: torch.randn(2, 7, 3, WIDTH).transpose(1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", MAKE)
def test_one_layer(shape, bias, dtype):
    plain, split = twins(lambda: nn.Linear(WIDTH, WIDER, bias=bias), dtype)
    source = MAKE[shape]()
    source = source.to(dtype)
    weights = torch.randn(*source.shape[:-1], WIDER, dtype=dtype)
    gradients = WeightGradients([split])
    results = []
    for model in (plain, split):
        x = source.detach().requires_grad_()
        assert x.stride() == source.stride()
        with gradients.splitting():
            y = model(x)
        with gradients.recording() as deferred:
            (y * weights).sum().backward()
        gradients.run(deferred)
        results.append((y, x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert_equal_gradients(plain, split)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("sizes", [(WIDTH, WIDER), (WIDTH, 1), (1, WIDER)])
def test_layouts_of_weights(sizes, transposed):
    def make():
        layer = nn.Linear(*sizes)
        if transposed:
            layer.weight = nn.Parameter(torch.randn(*sizes).t())
        return layer

    plain, split = twins(make)
    assert plain.weight.stride() == split.weight.stride()
    both(plain, split, [torch.randn(37, sizes[0]), torch.randn(2, 19, sizes[0])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_a_transformer_block(checkpointed, dtype):
    plain, split = twins(lambda: Block(checkpointed=checkpointed), dtype)
    gradients = WeightGradients([split])
    inputs = [torch.randn(size, 19, WIDTH, dtype=dtype) for size in (3, 1, 2, 3)]
    results = []
    for model in (plain, split):
        own = [x.clone().requires_grad_() for x in inputs]
        waiting = []
        for x in own:
            with gradients.splitting():
                y = model(x)
            with gradients.recording() as deferred:
                y.square().sum().backward()
            assert len(deferred) == (4 if model is split else 0)
            waiting.append(deferred)
            if len(waiting) > 2:
                gradients.run(waiting.pop(0))
        for deferred in waiting:
            gradients.run(deferred)
        results.append([x.grad for x in own])
    assert all(map(torch.equal, *results))
    assert_equal_gradients(plain, split)


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, checkpointed):
    plain, split = twins(lambda: Block(checkpointed=checkpointed))
    gradients = WeightGradients([split])
    results = []
    for model in (plain, split):
        torch.manual_seed(1)
        for _ in range(2):
            x = torch.randn(3, 19, WIDTH, requires_grad=True)
            with gradients.splitting(), torch.autocast("cpu", low):
                y = model(x)
                loss = y.float().square().mean()
            with gradients.recording() as deferred:
                loss.backward()
            gradients.run(deferred)
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))
    assert split.up.weight.grad.dtype == torch.float32
    assert_equal_gradients(plain, split)


def test_autocast_leaves_double_alone():
    plain, split = twins(lambda: nn.Linear(WIDTH, WIDER), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        both(plain, split, [torch.randn(5, WIDTH, dtype=torch.float64)])
    assert split.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_of_another_dtype(autocast):
    """As the data-parallel mode sets it: 16-bit parameters, gradients summed in fp32."""
    plain, split = twins(lambda: nn.Linear(WIDTH, WIDER), torch.bfloat16)
    for parameter in (*plain.parameters(), *split.parameters()):
        parameter.grad_dtype = torch.float32
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        both(plain, split, [torch.randn(5, WIDTH, dtype=torch.bfloat16) for _ in range(3)], lambda y: y.float().square().sum())
    assert split.weight.grad.dtype == torch.float32


# -- shared and frozen ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A weight in two layers, or a layer used several times."""

    def __init__(self, uses=2, two_layers=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(uses if two_layers else 1))
        self.uses = uses
        for layer in self.layers:
            layer.weight = self.layers[0].weight

    def forward(self, x):
        for use in range(self.uses):
            x = torch.tanh(self.layers[use % len(self.layers)](x))
        return x


@pytest.mark.parametrize("two_layers", [True, False])
def test_two_uses_of_a_weight_are_bit_equal(two_layers):
    plain, split = twins(lambda: Twice(two_layers=two_layers))
    both(plain, split, [torch.randn(19, WIDTH) for _ in range(3)])


def test_more_uses_are_summed_in_another_order():
    plain, split = twins(lambda: Twice(uses=5))
    x = torch.randn(19, WIDTH)
    plain(x).sum().backward()
    gradients = WeightGradients([split])
    gradients.run(split_backward(gradients, lambda: split(x).sum()))
    torch.testing.assert_close(split.layers[0].weight.grad, plain.layers[0].weight.grad)
    assert torch.equal(split.layers[0].bias.grad, plain.layers[0].bias.grad)


def test_hooks_of_a_shared_weight_run_once():
    torch.manual_seed(0)
    model, seen = Twice(uses=3), []
    model.layers[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    gradients = WeightGradients([model])
    gradients.run(split_backward(gradients, lambda: model(torch.randn(19, WIDTH)).sum()))
    assert len(seen) == 1
    assert torch.equal(seen[0], model.layers[0].weight.grad)


def test_what_other_modules_hold_too_is_not_deferred():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(WIDER, WIDTH), nn.Linear(WIDTH, WIDER, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    plain, split = twins(Tied)
    assert what_splits([split]) == (0, ("Embedding", "Linear"))
    both(plain, split, [torch.arange(5), torch.arange(3)])


def test_input_without_gradient():
    plain, split = twins(lambda: nn.Sequential(nn.Linear(WIDTH, WIDER, bias=False)))
    gradients = WeightGradients([split])
    deferred = split_backward(gradients, lambda: split(torch.ones(5, WIDTH)).sum())
    assert list(deferred) == [split[0].weight]
    assert split[0].weight.grad is None
    gradients.run(deferred)
    plain(torch.ones(5, WIDTH)).sum().backward()
    assert_equal_gradients(plain, split)


def test_frozen_weights_are_left_alone():
    def make():
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        model[0].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        return model

    plain, split = twins(make)
    assert "forward" not in vars(split[0])
    both(plain, split, [torch.randn(5, WIDTH)])
    gradients = WeightGradients([split])
    for model in (plain, split):  # frozen after it was split
        model.zero_grad()
        model[4].weight.requires_grad_(False)
    assert not split_backward(gradients, lambda: split(torch.ones(5, WIDTH)).sum())
    plain(torch.ones(5, WIDTH)).sum().backward()
    assert_equal_gradients(plain, split)


def test_split_counts_elements_once():
    model = Block()
    model.up.bias.requires_grad_(False)
    shared = nn.ModuleList([model, model.down])
    later = sum(layer.weight.numel() for layer in (model.qkv, model.out, model.up, model.down))
    assert what_splits([shared, model]) == (later / sum(p.numel() for p in model.parameters() if p.requires_grad), ())
