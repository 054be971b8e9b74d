"""Backward in two halves: the same bits as in one, whatever model it goes through, and nothing before its time."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.data.guard import GuardedParameters
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients, what_splits

WIDTH, WIDER = 48, 33  # large enough for another order of operands to give other bits


class Block(nn.Module):
    """A transformer's."""

    def __init__(self, width=WIDTH, heads=4, checkpointed=None):
        super().__init__()
        self.heads, self.checkpointed = heads, checkpointed
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        # Not contiguous: the layer takes it as it comes.
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def compute(self, x):
        x = x + self.attend(self.before_attention(x))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))

    def forward(self, x):
        return self.compute(x) if self.checkpointed is None else checkpoint(self.compute, x, use_reentrant=self.checkpointed)


def twins(make, dtype=torch.float32):
    """A model and its copy."""
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, copy.deepcopy(model)


def split_backward(gradients, forward):
    """Forward and the first half; gives what is deferred."""
    with gradients.splitting():
        loss = forward()
    with gradients.recording() as deferred:
        loss.backward()
    return deferred


def both(plain, split, inputs, loss=lambda y: y.square().sum()):
    """Accumulates the gradients of several inputs in both, and says whether they are equal."""
    for x in inputs:
        loss(plain(x)).backward()
    gradients = WeightGradients([split])
    for deferred in [split_backward(gradients, lambda x=x: loss(split(x))) for x in inputs]:
        gradients.run(deferred)
    gradients.remove()
    assert_equal_gradients(plain, split)


def assert_equal_gradients(plain, split):
    for (name, a), b in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert a.grad.dtype == b.grad.dtype
            assert a.grad.stride() == b.grad.stride()
            assert torch.equal(a.grad, b.grad), name


# -- the same bits ---------------------------------------------------------------------------------------------------

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


# -- shared and frozen -----------------------------------------------------------------------------------------------


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


# -- hooks -----------------------------------------------------------------------------------------------------------


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


# -- when it is not split --------------------------------------------------------------------------------------------


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


# -- weights that move -----------------------------------------------------------------------------------------------


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


# -- memory and copies -----------------------------------------------------------------------------------------------


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
