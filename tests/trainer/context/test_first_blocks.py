"""Blocks that context parallelism would compute otherwise are refused by name; the first block is compared with itself whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from lightning_overlap import ConfigError, ContextParallel, PipelineParallel, TensorParallel
from lightning_overlap.model.sharded_tokens import ShardedTokens
from tests.helpers.hugging import Module, samples_of
from tests.helpers.models import Block, Transformer
from tests.helpers.sequences import compare, train

WIDTH = 32
Mixer = Callable[[Tensor], Tensor]


class Mixing(Block):
    """A block that adds something of its own to its input."""

    def __init__(self, mix: Mixer | nn.Module, *, attends: bool) -> None:
        super().__init__(WIDTH, 4)
        self.mix, self.attends = mix, attends

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * self.mix(x)
        return super().forward(x) if self.attends else x + self.mlp(self.norms[1](x))


def transposed(module: nn.Module) -> nn.Module:
    """A module that takes features before tokens."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)

    return Transposed()


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def attention_by_hand(x: Tensor) -> Tensor:
    logits = torch.einsum("bqd,bkd->bqk", x, x / WIDTH).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return torch.einsum("bqk,bkd->bqd", logits.softmax(-1), x)


def attention_with_a_bias_of_its_length(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return F.scaled_dot_product_attention(x, x, x, -(positions.view(-1, 1) - positions).abs().float())


def shifted(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


class SummedInBackward(Function):
    """Its output is that of each token by itself; its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.sum(1, keepdim=True).expand_as(grad)


FAULTS: dict[str, tuple[Callable[[], Mixer | nn.Module], str]] = {
    "conv1d": (lambda: transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding=2)), "blocks.0.mix.inner (a convolution of kernel size 3)"),
    "lstm": (lambda: Recurrent(WIDTH, WIDTH, batch_first=True), "blocks.0.mix (a recurrent layer (Recurrent)"),
    "batch norm": (lambda: transposed(nn.BatchNorm1d(WIDTH)), "blocks.0.mix.inner (a norm over all tokens (BatchNorm1d)"),
    "group norm": (lambda: transposed(nn.GroupNorm(4, WIDTH)), "blocks.0.mix.inner (a norm over all tokens (GroupNorm)"),
    "pooling": (lambda: transposed(nn.AvgPool1d(3, 1, 1)), "blocks.0.mix.inner (a pooling over tokens (AvgPool1d)"),
    "attention by hand": (lambda: attention_by_hand, "blocks.0 has run without a call of F.scaled_dot_product_attention"),
    "attention by hand beside torch's": (lambda: attention_by_hand, "blocks.0 computes another output when its tokens are sharded"),
    "bias of the length": (lambda: attention_with_a_bias_of_its_length, "a mask of shape (8, 8), where the sequence has 16 tokens"),
    "convolution by torch's function": (
        lambda: lambda x: F.conv1d(x.transpose(1, 2), torch.ones(WIDTH, 1, 3) / 3, padding=1, groups=WIDTH).transpose(1, 2),
        "blocks.0 computes another output",
    ),
    "cumsum": (lambda: lambda x: x.cumsum(1), "blocks.0 computes another output"),
    "roll": (lambda: lambda x: x.roll(1, 1), "blocks.0 computes another output"),
    "token shift": (lambda: shifted, "blocks.0 computes another output"),
    "fft": (lambda: lambda x: torch.fft.fft(x, dim=1).real, "blocks.0 computes another output"),
    "mean": (lambda: lambda x: x.mean(1, keepdim=True), "blocks.0 computes another output"),
    "norm over tokens": (lambda: lambda x: F.normalize(x, dim=1), "blocks.0 computes another output"),
    "count of tokens": (lambda: lambda x: x / x.shape[1], "blocks.0 computes another output"),
    "positions of its own": (lambda: lambda x: torch.arange(x.shape[1]).view(-1, 1) * x, "blocks.0 computes another output"),
    "gradient": (lambda: SummedInBackward.apply, "blocks.0 computes other gradients when its tokens are sharded, of its input"),
}


def too_large_as_a_whole(x: Tensor) -> Tensor:
    if x.shape[1] > 8:
        raise torch.OutOfMemoryError("the whole sequence does not fit")
    return x


RIGHT: dict[str, Mixer] = {"scaled": lambda x: x * 3, "gated": lambda x: x * x.sigmoid(), "large": too_large_as_a_whole}


class Net(Transformer):
    """A transformer whose blocks mix.

    Args:
        case: in ``FAULTS`` or ``RIGHT``; None: nothing.
        too_large: the head takes no tensor of all tokens.
    """

    def __init__(self, case: str | None = None, too_large: bool = False) -> None:
        super().__init__(blocks=3)
        self.too_large = too_large
        if case is not None:
            for number in range(3):
                mix = FAULTS[case][0]() if case in FAULTS else RIGHT[case]
                self.blocks[number] = Mixing(mix, attends=case != "attention by hand")

    def loss(self, ids: Tensor) -> Tensor:
        if self.too_large:
            self.norm.register_forward_pre_hook(refuse_whole)
        return super().loss(ids)


def refuse_whole(module: nn.Module, args: Any) -> None:
    if not isinstance(args[0], ShardedTokens):
        raise torch.OutOfMemoryError("the whole sequence does not fit")


def outcomes(cases: list[dict[str, Any]], strategy: dict[str, Any], **trainer: Any) -> list[Any]:
    """Of each case, the error; or the results of training."""
    results: list[Any] = []
    for case in cases:
        try:
            results.append(train({"context_parallel": 2, **strategy}, Net, case, {}, **{"max_steps": 2, **trainer}))
        except ConfigError as error:
            results.append(" ".join(str(error).split()))
    return results


UNVERIFIED = {"verify_first_step": False}


def test_what_mixes_tokens_is_refused_by_name(world: Any) -> None:
    first, second = world(2).run(outcomes, [{"case": case} for case in FAULTS], UNVERIFIED)
    for (case, (_, message)), mine, theirs in zip(FAULTS.items(), first, second, strict=True):
        assert isinstance(mine, str), f"{case} trains"
        assert message in mine, case
        assert mine == theirs


def test_what_computes_each_token_is_right(world: Any) -> None:
    for results in world(2).run(outcomes, [{"case": case} for case in RIGHT], UNVERIFIED):
        for case, found in zip(RIGHT, results, strict=True):
            assert not isinstance(found, str), found
            if case != "large":
                compare(found, train(None, Net, {"case": case}, {}, max_steps=2))


def test_blocks_are_compared_where_the_unsharded_model_does_not_fit(world: Any) -> None:
    for right, wrong in world(2).run(outcomes, [{"too_large": True}, {"too_large": True, "case": "cumsum"}], {}):
        assert not isinstance(right, str), right
        assert "verify_first_step auto on" in right["plan"]
        assert isinstance(wrong, str), "it trains"
        assert "blocks.0 computes another output when its tokens are sharded" in wrong


def test_blocks_after_sharded_embeddings_are_not_compared(world: Any) -> None:
    strategy = {"context_parallel": ContextParallel(size=2, boundary="batch"), **UNVERIFIED}
    for (result,) in world(2).run(outcomes, [{}], strategy):
        assert not isinstance(result, str), result
        compare(result, train(None, Net, {}, {}, max_steps=2))


def test_the_check_can_be_turned_off(world: Any) -> None:
    strategy = {"context_parallel": ContextParallel(size=2, verify_blocks=False), **UNVERIFIED}
    for (wrong,) in world(2).run(outcomes, [{"case": "mean"}], strategy):
        assert not isinstance(wrong, str)


TENSOR = TensorParallel(size=2, vocab_parallel=True)
MIXTURES: dict[str, dict[str, Any]] = {
    "context x data": {},
    "context x tensor": {"tensor_parallel": TENSOR},
    "context x tensor, not checked": {"tensor_parallel": TensorParallel(size=2, verify_blocks=False)},
    "context x tensor, replicated tokens": {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)},
    "context x pipeline": {"pipeline_parallel": PipelineParallel(size=2, microbatches=2)},
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_with_other_modes(world: Any, mixture: str) -> None:
    strategy = {**MIXTURES[mixture], **UNVERIFIED}
    expected = train(None, Net, {}, {})
    for right, wrong in world(4).run(outcomes_of_five_steps, [{}, {"case": "cumsum"}], strategy):
        assert not isinstance(right, str), right
        compare({**right, "losses": []}, {**expected, "losses": []})
        if "not checked" in mixture:
            assert not isinstance(wrong, str)
        else:
            assert "computes another output when its tokens" in wrong


def outcomes_of_five_steps(cases: list[dict[str, Any]], strategy: dict[str, Any]) -> list[Any]:
    return outcomes(cases, strategy, max_steps=5)


HUGGING = [
    ({"name": "llama"}, {"kind": "packed"}, "32-true"),
    ({"name": "gemma3"}, {"kind": "padded left"}, "bf16-mixed"),
    ({"name": "gemma2"}, {"kind": "plain"}, "32-true"),
    ({"name": "gpt_oss"}, {"kind": "plain"}, "32-true"),
    ({"name": "llama", "recompute": True}, {"kind": "plain"}, "32-true"),
]


def test_models_of_transformers_pass(world: Any) -> None:
    world(2).run(train_models)


def train_models() -> None:
    for model, data, precision in HUGGING:
        strategy = {"context_parallel": 2, **UNVERIFIED}
        train(strategy, Module, model, data, samples=samples_of, max_steps=2, precision=precision)
