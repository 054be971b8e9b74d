"""What models of transformers record in blocks whose tokens are sharded."""

import warnings
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Boundary, Nesting, TokenCut
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from tests.helpers.threads import on_ranks

SAMPLES, TOKENS, VOCABULARY = 2, 7, 32
POSITIONS = ((0, 6), (1, 2, 4, 5), (3,))
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
CONFIG = transformers.MixtralConfig(
    **SIZES, vocab_size=VOCABULARY, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=2.0
)


class NoAttention(nn.Module):
    """Stands where an attention would, and acts on each token by itself."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.sin(), None


class Cut(TokenCut):
    """Shards tokens, which stay so after the blocks, or are gathered."""

    nesting = Nesting.TOKENS
    remedy: ClassVar[str] = "set context_parallel: 1"

    def __init__(self, shards: TokenShards, stays: bool) -> None:
        self._shards, self._stays = shards, stays

    def enter(self, x: Tensor) -> Tensor:
        return self._shards.take(x, -2)

    def leave(self, x: Tensor) -> Tensor:
        return ShardedTokens.of(x, -2, self._shards) if self._stays else self._shards.gather(x, -2)


def make_model() -> Any:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(CONFIG)
    for layer in model.model.layers:
        layer.self_attn = NoAttention()
    return model


def inputs(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if padded else {})}


def sharded(group: Any, model: Any, padded: bool, stays: bool, recorded_before: bool) -> Any:
    """The output, and the gradients of a rank's copy of the model."""
    asked = {"output_hidden_states": True, "output_router_logits": True}
    if recorded_before:  # so that the hooks that record are registered before those of the boundary
        model(**inputs(padded), **asked)
    shards = TokenShards(group, tuple(torch.tensor(p) for p in POSITIONS), TOKENS)
    boundary = Boundary()
    boundary.register(list(model.model.layers), Cut(shards, stays))
    boundary.start_forward()
    output = model(**inputs(padded), **asked)
    for x in (*output.hidden_states, *output.router_logits):
        assert isinstance(x, ShardedTokens) == stays
    (output.loss + output.hidden_states[1].square().mean()).backward()
    grads = {name: shards.total(p.grad) / group.size for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return output.loss, [x.clone().sin().complete("a test") if stays else x.sin() for x in output.hidden_states], grads


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_routers_are_those_of_all_tokens(padded: bool, stays: bool, recorded_before: bool) -> None:
    model = make_model()
    expected = model(**inputs(padded), output_hidden_states=True, output_router_logits=True)
    (expected.loss + expected.hidden_states[1].square().mean()).backward()
    models = iter([make_model() for _ in POSITIONS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = on_ranks(3, lambda group: sharded(group, next(models), padded, stays, recorded_before))
    for loss, hidden_states, grads in results:
        torch.testing.assert_close(loss, expected.loss)
        assert len(hidden_states) == 4
        for x, y in zip(hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(x, y.sin())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_weights_are_refused() -> None:
    def run(group: Any) -> str:
        boundary, model = Boundary(), make_model()
        shards = TokenShards(group, (torch.arange(4), torch.arange(4, TOKENS)), TOKENS)
        boundary.register(list(model.model.layers), Cut(shards, True))
        boundary.start_forward()
        with pytest.raises(ConfigError) as raised:
            model(**inputs(False), output_attentions=True)
        return str(raised.value)

    for text in on_ranks(2, run):
        assert "asked for output_attentions" in text
        assert "Leave output_attentions out, or set context_parallel: 1" in text
