"""Tensors whose tokens are sharded over the ranks against whole ones: what each function gives, and the gradients."""

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.modes.tensor.vocab import ShardedLogits, Vocabulary, head_forward
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import make_group
from lightning_overlap.state.pieces import shares
from lightning_overlap.torch_seams import tree_leaves
from tests.helpers.threads import on_ranks

SAMPLES, TOKENS, FEATURES = 2, 7, 6
POSITIONS = {2: ((0, 1, 5, 6), (2, 3, 4)), 3: ((0, 6), (1, 2, 4, 5), (3,)), 4: ((0, 5, 6), (1, 4), (), (2, 3))}
"""By ranks: uneven, early and late ones, and a rank that has none."""


def positions(size: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(p, dtype=torch.long) for p in POSITIONS[size])


def run_shards(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(shards, *arguments)`` gives on each rank, a thread."""
    return on_ranks(size, lambda group: function(TokenShards(group, positions(size), TOKENS), *arguments))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(a, b, msg=lambda m: f"{name}: {m}")


class Given:
    """What a case computes with, besides the hidden states: the same on all ranks."""

    def __init__(self) -> None:
        self.hidden: Tensor
        self.weight = numbers(5, FEATURES, seed=1).requires_grad_()
        self.feature = numbers(FEATURES, seed=2).requires_grad_()
        self.token = numbers(TOKENS, 1, seed=3).requires_grad_()
        self.full = numbers(SAMPLES, TOKENS, FEATURES, seed=4).requires_grad_()
        self.sample = numbers(SAMPLES, 1, 1, seed=5).requires_grad_()
        self.scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        self.mask = numbers(SAMPLES, TOKENS, seed=6) > 0
        self.classes = torch.randint(0, FEATURES, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(7))
        self.classes[0, 1] = -100

    def grads(self) -> dict[str, Tensor]:
        return {name: x.grad for name, x in vars(self).items() if x.grad is not None}


KEPT: dict[str, Callable[[Tensor, Given], Any]] = {
    "scalars": lambda x, g: 2 - x * 3 + 1 / (x**2 + 1) - (-x).abs(),
    "scalar tensor": lambda x, g: g.scale * x,
    "features": lambda x, g: g.feature * x + g.feature,
    "other samples": lambda x, g: x + g.sample,
    "whole": lambda x, g: g.full - x * g.full,
    "rows that broadcast": lambda x, g: x * g.token,
    "both sharded": lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + x,
    "casts": lambda x, g: x.float().to(torch.float64).type_as(g.full).contiguous().clone().double(),
    "comparison": lambda x, g: ((x > 0) & (x < 1) & ~(x == 0.5)).double() * x,
    "mask": lambda x, g: x.masked_fill(~g.mask.unsqueeze(-1), 0.0) + torch.where(g.mask.unsqueeze(-1), x, g.full),
    "clamp": lambda x, g: torch.clamp(x, -1, 1).maximum(g.full),
    "activations": lambda x, g: F.gelu(x) + F.silu(x) + x.tanh() + torch.sigmoid(x) + F.relu(x) + F.softplus(x),
    "dropout": lambda x, g: F.dropout(x, 0.0) + F.dropout(x, 0.3, training=False),
    "linear": lambda x, g: F.linear(x, g.weight, g.feature[:5]),
    "matmul": lambda x, g: x @ g.weight.t() + torch.matmul(x, g.weight.t()),
    "vector": lambda x, g: x @ g.feature,
    "layer_norm": lambda x, g: F.layer_norm(x, (FEATURES,), g.feature, g.feature),
    "modules": lambda x, g: nn.RMSNorm(FEATURES, dtype=torch.float64)(nn.LayerNorm(FEATURES, dtype=torch.float64)(x)),
    "softmax": lambda x, g: F.softmax(x, dim=-1) + x.log_softmax(2) + x.softmax(0),
    "over features": lambda x, g: x.mean(-1) + x.sum(dim=2) + x.norm(dim=-1) + x.var(-1, unbiased=False) + torch.logsumexp(x, -1),
    "over samples": lambda x, g: x.mean(0) + x.sum(0, keepdim=True)[0] + x[0] + x.amax(axis=0),
    "largest": lambda x, g: x.max(-1).values + x.topk(2).values.sum(-1) + x.argmax(-1),
    "normalize": lambda x, g: F.normalize(x, dim=-1) + F.cosine_similarity(x, g.full, dim=-1).unsqueeze(-1),
    "parts": lambda x, g: (x.chunk(2, -1)[1] + x.split([3, 3], dim=-1)[0]) * torch.cat([x, g.full], -1).narrow(-1, 2, 3),
    "gather": lambda x, g: x.log_softmax(-1).gather(-1, g.classes.clamp(min=0).unsqueeze(-1)).squeeze(-1) * g.mask,
    "flat": lambda x, g: x.flatten(0, 1).view(-1, 2, 3).reshape(SAMPLES * TOKENS, FEATURES),
    "flat and back": lambda x, g: x.view(-1, FEATURES).view(SAMPLES, TOKENS, 3, 2).unflatten(0, (1, -1)).flatten(0, 1).flatten(2),
    "one feature": lambda x, g: x[..., :1].squeeze(-1).unsqueeze(1).view(-1) * g.mask.view(-1),
    "transposed": lambda x, g: x.transpose(1, 2).permute(2, 0, 1).movedim(0, 1) * x,
    "slices": lambda x, g: x[:, 1:-1] + x[:, slice(1, TOKENS - 1), :] + x[..., 1:6, :] + x[:, 1:, None][:, :-1, 0],
    "totals and tokens": lambda x, g: x - x.mean(1, keepdim=True) + x / x.square().sum(),
    "all tokens": lambda x, g: x[:, slice(0, None), :] + x[:] + x[...] + x[None][0] + x[..., :],
    "late tokens": lambda x, g: x[:, -3:],
    "no tokens": lambda x, g: x[:, 5:2],
    "other dims": lambda x, g: x[1, :, 2:] + x[0][:, torch.tensor([0, 1, 2, 3])] + x[torch.tensor([[1]]), :, 1:5][0, 0],
    "masked rows": lambda x, g: x[g.mask] + x.flatten(0, 1)[g.mask.flatten()],
    "losses of numbers": lambda x, g: F.mse_loss(x, g.full, reduction="none") + F.smooth_l1_loss(g.full, x, reduction="none"),
}
"""What keeps tokens sharded."""


def total_loss(x: Tensor, g: Given) -> Any:
    rows, classes = x.flatten(0, 1), g.classes.flatten()
    weight = g.feature.detach().abs()
    few = classes.where(torch.arange(len(classes)) % TOKENS < 2, -100)
    return (
        F.cross_entropy(rows, classes)
        + 2 * F.cross_entropy(rows, classes, reduction="sum")
        + 3 * F.cross_entropy(rows, classes, weight=weight, label_smoothing=0.1)
        + 4 * F.cross_entropy(rows, few, ignore_index=-100, label_smoothing=0.2)
        + 5 * F.cross_entropy(x[:, :-1].transpose(1, 2), g.classes[:, 1:])
        + 6 * F.cross_entropy(x[0], x[1].softmax(-1).detach())
        + 7 * F.cross_entropy(rows, classes.clamp(min=2), ignore_index=2)
        + 8 * F.nll_loss(rows.log_softmax(-1), classes, weight)
    )


WHOLE: dict[str, Callable[[Tensor, Given], Any]] = {
    "sum": lambda x, g: x.sum() + torch.sum(x.square(), dtype=torch.float64),
    "mean": lambda x, g: x.mean() * g.scale + torch.mean(x**2),
    "over tokens": lambda x, g: x.mean(1) + x.square().sum(dim=1, keepdim=True)[:, 0] + x.mean((0, 1)),
    "counted": lambda x, g: (x * g.mask.unsqueeze(-1)).sum() / g.mask.sum() + (x > 0).double().mean(),
    "losses": total_loss,
    "losses, each": lambda x, g: F.cross_entropy(x.flatten(0, 1), g.classes.flatten(), reduction="none"),
    "losses, each of samples": lambda x, g: F.cross_entropy(x.transpose(1, 2), g.classes, reduction="none"),
    "losses of numbers": lambda x, g: (
        F.mse_loss(x, g.full) + F.l1_loss(g.full, x, reduction="sum") + F.binary_cross_entropy_with_logits(x, g.full.sigmoid())
    ),
}
"""What gives the same on all ranks, without a gather of what was sharded."""


READ: dict[str, Callable[[Tensor, Given], Any]] = {
    "cumsum": lambda x, g: x.cumsum(1),
    "softmax": lambda x, g: x.softmax(1),
    "step": lambda x, g: x[:, ::2],
    "token": lambda x, g: x[:, -1],
    "tokens": lambda x, g: x[torch.arange(SAMPLES), torch.tensor([1, 4])],
    "largest": lambda x, g: x.max(),
    "convolution": lambda x, g: F.conv1d(x.transpose(1, 2), g.weight[:, :, None], padding=1),
    "attention": lambda x, g: F.scaled_dot_product_attention(x, x, x),
    "tokens and features": lambda x, g: x.reshape(SAMPLES, -1),
    "cut across samples": lambda x, g: x.flatten(0, 1).view(TOKENS, SAMPLES, FEATURES),
    "cut at tokens": lambda x, g: x.split(3, 1)[1],
    "another order": lambda x, g: x.flip(1),
    "other tokens": lambda x, g: x[:, 1:] * x[:, :-1],
    "other tokens of the same number": lambda x, g: (x[:, 2:] * x[:, :-2] * x[:, 1:-1]).flip(1),
    "gathered and taken": lambda x, g: (x.flip(1) * x).sum(),
    "weights by token": lambda x, g: g.full.transpose(1, 2) @ x,
    "search": lambda x, g: torch.where(x[..., 0] > 0)[0],
}
"""What needs whole tensors."""


def compare(cut: TokenShards, kind: str, name: str) -> None:
    """Values and gradients of a case."""
    case = {"kept": KEPT, "whole": WHOLE, "read": READ}[kind][name]
    hidden, expected_hidden = (numbers(SAMPLES, TOKENS, FEATURES).requires_grad_() for _ in range(2))
    given, expected_given = Given(), Given()
    expected = case(expected_hidden * 1, expected_given)
    result = case(ShardedTokens.of(cut.take(hidden * 1, 1), 1, cut), given)
    assert isinstance(result, ShardedTokens) == (kind == "kept")
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    with torch.no_grad():
        close(result.complete("the test") if kind == "kept" else result, expected, "value")
    if not expected.requires_grad or not expected.numel():
        return
    weights = numbers(*expected.shape, seed=8)
    (expected * weights).sum().backward()
    (result * weights).sum().backward()
    expected_given.hidden, given.hidden = expected_hidden, hidden
    for name, wanted in expected_given.grads().items():
        total = cut.total(given.grads()[name])
        close(total / cut.group.size, wanted, f"gradient of {name}")


def messages(*arguments: Any) -> list[str]:
    """The warnings of a comparison on all ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_shards(*arguments)
    return [str(w.message) for w in caught if "sharded" in str(w.message)]


@pytest.mark.parametrize("size", POSITIONS)
@pytest.mark.parametrize("name", KEPT)
def test_what_acts_on_each_token_keeps_them_sharded(name: str, size: int) -> None:
    assert messages(size, compare, "kept", name) == []


@pytest.mark.parametrize("size", POSITIONS)
@pytest.mark.parametrize("name", WHOLE)
def test_totals_are_those_of_all_tokens(name: str, size: int) -> None:
    assert messages(size, compare, "whole", name) == []


@pytest.mark.parametrize("size", POSITIONS)
@pytest.mark.parametrize("name", READ)
def test_other_functions_get_whole_tensors(name: str, size: int) -> None:
    texts = messages(size, compare, "read", name)
    assert len(texts) >= (name != "search") * size
    assert all("is gathered" in text for text in texts)


# -- losses of language models ---------------------------------------------------------------------------------------------------

IGNORED: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "some": lambda x: x[:, ::2].fill_(-100),
    "those of the first rank": lambda x: x.__setitem__((slice(None), [1, 0]), -100),
    "all": lambda x: x.fill_(-100),
}


def hugging_face_loss(cut: TokenShards, ignored: str, counted: bool, kind: torch.dtype) -> None:
    labels = torch.randint(0, FEATURES, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(9))
    IGNORED[ignored](labels)
    options: dict[str, Any] = {"num_items_in_batch": torch.tensor(11)} if counted else {}
    weight, expected_weight = (numbers(FEATURES, FEATURES, seed=1).to(kind).requires_grad_() for _ in range(2))
    hidden = numbers(SAMPLES, TOKENS, FEATURES).to(kind)
    expected = ForCausalLMLoss(F.linear(hidden, expected_weight), labels, FEATURES, **options)
    logits = F.linear(ShardedTokens.of(cut.take(hidden, 1), 1, cut)[:, slice(0, None), :], weight)
    loss = ForCausalLMLoss(logits, labels, FEATURES, **options)
    assert type(loss) is Tensor
    assert loss.dtype == expected.dtype
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if kind is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}  # bf16 keeps 8 bits
    torch.testing.assert_close(loss, expected, equal_nan=True, **tolerance)
    expected.backward()
    loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(cut.total(weight.grad) / cut.group.size, expected_weight.grad, equal_nan=True, **tolerance)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("ignored", IGNORED)
def test_hugging_faces_loss(ignored: str, counted: bool, kind: torch.dtype) -> None:
    assert messages(3, hugging_face_loss, ignored, counted, kind) == []


def logits_of(cut: TokenShards) -> ShardedTokens:
    return ShardedTokens.of(cut.take(numbers(SAMPLES, TOKENS, FEATURES), 1), 1, cut)


BAD: dict[str, Callable[[ShardedTokens], Any]] = {
    "a target that is too large": lambda x: F.cross_entropy(x.flatten(0, 1), torch.full((SAMPLES * TOKENS,), FEATURES)),
    "targets that are too few": lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(SAMPLES * TOKENS - 1, dtype=torch.long)),
    "an unknown reduction": lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(SAMPLES * TOKENS).long(), reduction="median"),
    "another unknown reduction": lambda x: F.mse_loss(x, x, reduction="median"),
    "another shape": lambda x: x + torch.zeros(TOKENS - 1, FEATURES, dtype=torch.float64),
    "a shape of another size": lambda x: x.view(-1, 4, FEATURES),
    "a dim that there is not": lambda x: x.softmax(3),
}


def error(cut: TokenShards | None, name: str) -> str:
    try:
        BAD[name](logits_of(cut) if cut is not None else numbers(SAMPLES, TOKENS, FEATURES))
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_whole_tensors_on_all_ranks(name: str) -> None:
    expected = error(None, name)
    assert expected != "none"
    assert run_shards(4, error, name) == [expected] * 4


def divided(x: Tensor) -> Tensor:
    x /= 2
    x *= 3
    return x


def written_after(x: Tensor) -> Tensor:
    before = x.flatten(0, 1)
    x /= 2
    return before * 2


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.0),
    "div_": lambda x: x.div_(2.0),
    "an item": lambda x: x.__setitem__((slice(None), 1), 0.0),
    "a slice of tokens": lambda x: x[:, 1:].mul_(2),
    "another shape": lambda x: x.flatten(0, 1)[1:].zero_(),
    "a view of what was gathered": lambda x: x[:, -1].zero_(),
    "data": lambda x: x.data.mul_(0.5),
    "detached": lambda x: x.detach().zero_(),
    "out": lambda x: torch.mul(x, 2, out=x),
    "a relu in place": lambda x: F.relu(x, inplace=True),
    "divided, and a view read": written_after,
}


def changed(cut: TokenShards, name: str) -> str:
    x = logits_of(cut)
    try:
        CHANGES[name](x)
        x.sum()
    except ConfigError as raised:
        return str(raised)
    return "nothing"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_is_refused_on_every_rank(name: str) -> None:
    for text in run_shards(3, changed, name):
        assert "a tensor whose tokens are sharded over the ranks in place, where the change would be lost" in text


def described(cut: TokenShards) -> None:
    hidden = numbers(SAMPLES, TOKENS, FEATURES).requires_grad_()
    x = ShardedTokens.of(cut.take(hidden, 1), -2, cut)
    assert (x.shape, x.dtype, x.dim(), len(x), x.size(-1)) == (hidden.shape, hidden.dtype, 3, SAMPLES, FEATURES)
    assert x.requires_grad
    assert x.grad_fn is not None
    assert not x.detach().requires_grad
    assert "shape=(2, 7, 6), local=tensor(" in repr(x)
    assert x.map(lambda local: local[..., :2]).shape == (SAMPLES, TOKENS, 2)
    assert x.type() == "torch.DoubleTensor"
    close(copy.deepcopy(x.detach()), hidden.detach(), "a copy")
    close(divided(x).detach(), hidden.detach() * 1.5, "divided")


def test_what_can_be_asked_needs_no_gather() -> None:
    run_shards(4, described)


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2


class Loss(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.expand(ctx.shape)


@pytest.mark.parametrize("kind", [Doubled, Loss])
def test_a_function_of_autograd_is_an_error(kind: Any) -> None:
    def run(cut: TokenShards) -> str:
        x = logits_of(cut) * torch.ones((), dtype=torch.float64, requires_grad=True)
        try:
            kind.apply(x).sum().backward()
        except ConfigError as error:
            return str(error)
        return "none"

    for text in run_shards(2, run):
        assert "was given a tensor whose tokens are sharded" in text
        assert "or set context_parallel.boundary: blocks" in text


# -- worlds -------------------------------------------------------------------------------------------------------------------------


@cache
def groups(context: int, tensor: int) -> tuple[Group, Group]:
    """The context and the tensor group of this rank, of which tensor ranks are neighbours."""
    ranks = torch.arange(context * tensor).view(context, tensor)
    make = partial(make_group, timeout=timedelta(seconds=60))
    return make(ranks.t().tolist(), "context"), make(ranks.tolist(), "tensor")


def transfers(size: int) -> None:
    group, _ = groups(size, 1)
    cut = TokenShards(group, positions(size), TOKENS)
    for kind, name in (("kept", "totals and tokens"), ("whole", "losses"), ("read", "other tokens of the same number")):
        compare(cut, kind, name)


@pytest.mark.parametrize("size", POSITIONS)
def test_groups_of_ranks_transfer_the_same(world: Any, size: int) -> None:
    world(size).run(transfers, size)


ENTRIES = 11


def vocabulary_too(tied: bool) -> None:
    """Tokens sharded over two ranks, and the vocabulary over two."""
    context, tensor = groups(2, 2)
    cut = TokenShards(context, positions(2), TOKENS)
    vocabulary = Vocabulary(tensor, shares(ENTRIES, 2), overlapped=True)
    mine = slice(vocabulary.first, vocabulary.bounds[tensor.rank + 1])
    torch.manual_seed(0)
    embedding, norm, head = nn.Embedding(ENTRIES, FEATURES), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, ENTRIES, bias=not tied)
    if tied:
        head.weight = embedding.weight
    local_norm, local_head = copy.deepcopy(norm), copy.deepcopy(head)
    for parameter in local_head.parameters():
        parameter.data = parameter.data[mine].clone()
    local_head.forward = head_forward(local_head, vocabulary)  # type: ignore[method-assign]
    ids = torch.randint(0, ENTRIES, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(9))
    ids[0, 2] = -100
    hidden = numbers(SAMPLES, TOKENS, FEATURES).float()

    def loss(logits: Tensor) -> Tensor:
        logits = 3 * torch.tanh(logits / 3)
        plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return ForCausalLMLoss(logits, ids, ENTRIES) + 2 * plain + F.cross_entropy(logits[ids > 3], ids[ids > 3], reduction="sum")

    expected = loss(head(norm(hidden)))
    expected.backward()
    logits = local_head(local_norm(ShardedTokens.of(cut.take(hidden, 1), 1, cut)))
    assert isinstance(logits, ShardedTokens)
    assert isinstance(logits.local, ShardedLogits)
    assert logits.shape == (SAMPLES, TOKENS, ENTRIES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loss(logits)
    result.backward()
    assert type(result) is Tensor
    torch.testing.assert_close(result, expected)
    for (name, p), q in zip(
        [*local_norm.named_parameters(), *local_head.named_parameters()], [*norm.parameters(), *head.parameters()], strict=True
    ):
        assert p.grad is not None
        assert q.grad is not None
        wanted = q.grad[mine] if len(q) == ENTRIES else q.grad
        torch.testing.assert_close(cut.total(p.grad) / 2, wanted, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(logits.argmax(-1) + 0, head(norm(hidden)).argmax(-1))
    with pytest.raises(ConfigError, match="in place, where the change would be lost"):
        logits[:, 1:].zero_()


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_and_vocabulary_are_both_sharded(world: Any, tied: bool) -> None:
    world(4).run(vocabulary_too, tied)


class Largest(TorchDispatchMode):
    """Records the most numbers that a result has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def memory(cut: TokenShards) -> int:
    entries, width = 32_000, 8
    weight = torch.randn(entries, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.randn(1, cut.size, width, generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        x = ShardedTokens.of(cut.take(hidden, 1), 1, cut)
        logits = F.linear(F.rms_norm(x, (width,)), weight)
        ForCausalLMLoss(logits, torch.ones(1, cut.size, dtype=torch.long), entries).backward()
    return largest.numel // entries


def test_logits_exist_for_local_tokens_only() -> None:
    """With 32k entries: the rows of the largest tensor of forward and backward."""

    def run(cut: TokenShards) -> int:
        return memory(TokenShards(cut.group, tuple(torch.arange(16) + 16 * r for r in range(4)), 64))

    assert run_shards(4, run) == [16] * 4
