"""The seam in blocks of an own model: one process, an attend that records, and a rank that has some of the tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.patches import replace_method
from lightning_overlap.model.trees import leaves, replaced
from lightning_overlap.modes.context.arguments import shard_argument, token_table_forward
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import AttentionOptions
from lightning_overlap.modes.context.refusals import find_mixers
from lightning_overlap.modes.context.seam import install

TOKENS = 10
ALL = torch.arange(TOKENS)
SOME = torch.tensor([0, 1, 2, 7, 8, 9])


class Attention(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.call = nn.Linear(8, 24), call

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.call(q, k, v, **options).transpose(1, 2).flatten(-2)


class Block(nn.Module):
    """``wrap`` calls the attention."""

    def __init__(self, call: Callable[..., Tensor] = F.scaled_dot_product_attention, wrap: Any = None) -> None:
        super().__init__()
        self.attention, self.wrap = Attention(call), wrap or (lambda function, *args, **options: function(*args, **options))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return x + self.wrap(self.attention, x, **options)


class Recorder:
    """Attends as a rank that has all tokens would, and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Mask, AttentionOptions]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        self.calls.append((q, k, v, mask, options))
        if q.shape[2] < mask.tokens:
            return q * k * v
        return F.scaled_dot_product_attention(q, k, v, mask.visible(ALL, ALL, len(q), range(q.shape[1])), scale=options.scale)


def installed(block: nn.Module, positions: Tensor = ALL) -> tuple[Recorder, Callable[[], None]]:
    recorder = Recorder()
    return recorder, install({"blocks.0": block}, recorder, lambda: LocalTokens(TOKENS, positions))


def x_of(tokens: int) -> Tensor:
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0))


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "bool": {"attn_mask": torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8},
    "additive": {"attn_mask": torch.randn(2, 1, TOKENS, TOKENS)},
    "keys": {"attn_mask": (ALL < 7).expand(2, 1, 1, TOKENS)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_torchs_attention_goes_to_ours(name: str):
    torch.manual_seed(0)
    block = Block()
    expected = block(x_of(TOKENS), **OPTIONS[name])
    recorder, undo = installed(block)
    torch.testing.assert_close(block(x_of(TOKENS), **OPTIONS[name]), expected)
    assert len(recorder.calls) == 1
    *_, mask, options = recorder.calls[0]
    assert (mask.causal, mask.bias) == (name == "causal", OPTIONS[name].get("attn_mask"))
    assert vars(options) == {"scale": OPTIONS[name].get("scale"), "dropout": 0.0, "softcap": None, "sinks": None}
    undo()
    block(x_of(TOKENS))
    assert len(recorder.calls) == 1
    assert "forward" not in vars(block)


def test_a_mask_that_all_layers_are_given_is_made_once():
    block, given = Block(), torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    local, recorder = LocalTokens(TOKENS, ALL), Recorder()
    install({"blocks.0": block}, recorder, lambda: local)
    for _ in range(2):
        block(x_of(TOKENS), attn_mask=given)
    given[0, 1] = False
    block(x_of(TOKENS), attn_mask=given)
    first, second, third = (mask for *_, mask, _ in recorder.calls)
    assert first is second
    assert third is not first


def test_grouped_heads_are_not_repeated():
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)

    recorder, _ = installed(block := Block(grouped), SOME)
    block(x_of(len(SOME)))
    q, k, *_ = recorder.calls[0]
    assert (q.shape[1], k.shape[1]) == (2, 1)


def test_without_heads():
    def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], OPTIONS["bool"]["attn_mask"].expand(2, -1, -1)).unsqueeze(1)

    expected = (block := Block(lambda q, k, v: single(q, k, v).repeat(1, 2, 1, 1)))(x_of(TOKENS))
    recorder, _ = installed(block)
    torch.testing.assert_close(block(x_of(TOKENS)), expected)
    assert recorder.calls[0][0].shape == (2, 1, TOKENS, 4)


def test_all_tokens_on_this_rank_is_what_the_user_wrote():
    recorder = Recorder()
    install({"blocks.0": (block := Block())}, recorder, lambda: None)
    block(x_of(TOKENS))
    assert not recorder.calls


# -- checkpoints -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", ["block", "attention"])
def test_a_checkpoint_that_runs_again_reaches_the_seam(around: str, reentrant: bool):
    wrap = None if around == "block" else lambda function, x, **options: checkpoint(function, x, use_reentrant=reentrant, **options)
    recorder, _ = installed(block := Block(wrap=wrap), SOME)
    x = x_of(len(SOME)).requires_grad_()
    y = checkpoint(block, x, use_reentrant=reentrant) if around == "block" else block(x)
    y.sum().backward()
    assert len(recorder.calls) == 2


def test_a_checkpoint_of_torchs_attention_reaches_the_seam():
    class OfTorch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.attention, x, x, x, need_weights=False, use_reentrant=False)[0]  # type: ignore[index]

    recorder, _ = installed(block := OfTorch(), SOME)
    block(x_of(len(SOME)).requires_grad_()).sum().backward()
    assert len(recorder.calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_a_function_in_a_block_is_refused(reentrant: bool):
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=reentrant)  # type: ignore[no-any-return]

    _, _ = installed(block := Block(call), SOME)
    with pytest.raises(ConfigError, match=r"blocks\.0 calls attention inside a checkpoint of a function"):
        block(x_of(len(SOME)).requires_grad_())


# -- torch's own modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["nothing", "causal", "float", "padding"])
def test_torchs_encoder_layers(given: str, training: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    triangle = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    options: dict[str, Any] = {
        "nothing": {},
        "causal": {"src_mask": triangle, "is_causal": True},
        "float": {"src_mask": torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))},
        "padding": {"src_mask": triangle, "src_key_padding_mask": torch.stack([ALL > 7, ALL > 20])},
    }[given]
    expected = layer(x_of(TOKENS), **options)  # in training: torch's fast path gives NaN for masks of numbers
    recorder, _ = installed(layer.train(training))
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(layer(x_of(TOKENS), **options), expected)
    assert len(recorder.calls) == 1
    assert recorder.calls[0][3].causal == (given == "causal")


def test_torchs_multi_head_function_with_masks_of_booleans():
    torch.manual_seed(0)
    weights = nn.MultiheadAttention(8, 2)
    hidden = torch.rand(4, TOKENS, TOKENS) < 0.3
    hidden[..., 0] = False

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            arguments = (8, 2, weights.in_proj_weight, weights.in_proj_bias, None, None, False, 0.0, weights.out_proj.weight, None)
            masks = {"attn_mask": hidden, "key_padding_mask": torch.stack([ALL > 7, ALL > 20])}
            return F.multi_head_attention_forward(x, x, x, *arguments, need_weights=False, **masks)[0]

    expected = (block := Functional())(x_of(TOKENS))
    recorder, _ = installed(block)
    torch.testing.assert_close(block(x_of(TOKENS)), expected)
    assert len(recorder.calls) == 1


def test_torchs_attention_with_weights_is_refused():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)

    class OfTorch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    installed(block := OfTorch())
    with pytest.raises(ConfigError, match=r"nn\.MultiheadAttention with need_weights=True"):
        block(x_of(TOKENS))


# -- refusals ------------------------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def crossed(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1])


def local_mask(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.ones(len(SOME), len(SOME), dtype=torch.bool))


def learned_bias(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.zeros(TOKENS, TOKENS, requires_grad=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (plain, r"blocks\.0 has run without a call of F\.scaled_dot_product_attention"),
        (crossed, r"blocks\.0 calls attention with 6 queries and 5 keys, where this rank has 6 of the 10 tokens"),
        (local_mask, r"a mask of shape \(6, 6\), where the sequence has 10 tokens and this rank 6 of them"),
        (learned_bias, r"a mask that gradients flow through"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(call: Callable[..., Tensor], message: str):
    installed(block := Block(call), SOME)
    with pytest.raises(ConfigError, match=message):
        block(x_of(len(SOME)))


def test_a_block_without_attention():
    install(
        {"blocks.0": (block := Block(plain))}, Recorder(), lambda: LocalTokens(TOKENS, SOME), attentionless=frozenset({"blocks.0"})
    )
    block(x_of(len(SOME)))


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (nn.Conv1d(8, 8, 3), "a convolution of kernel size 3"),
        (nn.GRU(8, 8), "a recurrent layer (GRU)"),
        (nn.BatchNorm1d(8), "a norm over all tokens (BatchNorm1d)"),
        (nn.ZeroPad2d((0, 0, 1, -1)), "a shift of tokens (ZeroPad2d)"),
        (type("FancyMamba2Mixer", (nn.Module,), {})(), "a FancyMamba2Mixer"),
    ],
)
def test_what_mixes_tokens_is_known(mixer: nn.Module, message: str):
    block = Block()
    block.mixer = mixer
    blocks = nn.ModuleList([block])
    assert find_mixers("blocks", blocks) == [f"blocks.0.mixer ({message})"]
    assert find_mixers("blocks", blocks, ["blocks.0.mixer"]) == []
    block.mixer = nn.Conv1d(8, 8, 1)
    assert find_mixers("blocks", blocks) == []


def test_a_mask_is_one_argument():
    mask = Mask(TOKENS, documents=torch.zeros(1, TOKENS, dtype=torch.long))
    assert list(leaves({"mask": [mask]})) == [mask]
    assert replaced({"mask": mask}, lambda leaf: leaf)["mask"] is mask


# -- arguments -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "dim"),
    [
        ((2, TOKENS, 4), torch.float32, 1),
        ((1, TOKENS, 4), torch.float32, 1),
        ((TOKENS, 4), torch.float32, 0),
        ((1, 1, TOKENS, 4), torch.float32, 2),
        ((3, 2, TOKENS, 4), torch.float32, 2),
        ((TOKENS,), torch.float32, 0),
        ((TOKENS, TOKENS), torch.complex64, None),
        ((TOKENS, 2), torch.complex64, 0),
        ((2, TOKENS), torch.int64, 1),
        ((3, 2, TOKENS), torch.int64, 2),
        ((TOKENS, TOKENS), torch.int64, 1),
        ((TOKENS,), torch.int64, 0),
        ((TOKENS, TOKENS), torch.float32, "mask"),
        ((2, 1, TOKENS, TOKENS), torch.float32, "mask"),
        ((2, TOKENS, TOKENS), torch.bool, "mask"),
        ((2, TOKENS), torch.bool, "mask"),
        ((2, 1, 1, TOKENS), torch.float32, "mask"),
        ((1, TOKENS, TOKENS), torch.float32, None),
        ((TOKENS, TOKENS, 4), torch.float32, None),
        ((2, 4), torch.float32, "mask"),
        ((), torch.int64, "mask"),
    ],
)
def test_arguments_are_sharded_by_their_shape(shape: tuple[int, ...], dtype: torch.dtype, dim: int | str | None):
    x = torch.randint(0, 2, shape).to(dtype)
    if dim is None:
        with pytest.raises(ConfigError, match=rf"shape \({', '.join(map(str, shape))}"):
            shard_argument(x, TOKENS, SOME)
    elif dim == "mask":
        assert shard_argument(x, TOKENS, SOME) is x
    else:
        assert torch.equal(shard_argument(x, TOKENS, SOME), x.index_select(int(dim), SOME))


@pytest.mark.parametrize(("shape", "dim"), [((TOKENS, 1, 4), None), ((TOKENS, 4, 3, 2), None), ((TOKENS, TOKENS, 4), 1)])
def test_samples_are_not_taken_for_tokens(shape: tuple[int, ...], dim: int | None):
    x = torch.rand(shape)
    found = shard_argument(x, TOKENS, SOME, batch=TOKENS)
    assert found is x if dim is None else torch.equal(found, x.index_select(dim, SOME))


class Rotary(nn.Module):
    """Makes its table from the number of its tokens, or turns what it is given by it."""

    def forward(self, x: Tensor, length: int | None = None) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1] if length is None else length), torch.tensor([1.0, 0.1]))
        return x * angles.cos().repeat(1, 2) if length is None else angles.cos()


def test_modules_with_the_role_token_table_give_the_ranks_rows():
    rotary = Rotary()
    x = torch.randn(2, TOKENS, 4)
    whole, table = rotary(x), rotary(x, TOKENS)
    undo = replace_method(rotary, "forward", token_table_forward(rotary.forward, lambda: LocalTokens(TOKENS, SOME)))
    local = x[:, SOME].requires_grad_()
    assert torch.equal(rotary(local), whole[:, SOME])
    assert torch.equal(rotary(local, len(SOME)), table[SOME])
    (grad,) = torch.autograd.grad(rotary(local).sum(), local)
    assert torch.equal(grad, table.repeat(1, 2)[SOME].expand(2, -1, -1))
    undo()
    assert torch.equal(rotary(x), whole)
