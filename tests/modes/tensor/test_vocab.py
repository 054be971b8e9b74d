"""Embedding, head and loss with a cut vocabulary against whole ones."""

import copy
import operator
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.tensor.loss import cross_entropy
from lightning_overlap.modes.tensor.vocab import ShardedLogits, Vocabulary, embedding_forward, head_forward
from lightning_overlap.state.pieces import shares
from tests.modes.tensor.group import tensor_group

ENTRIES = 11


def vocabulary(overlapped: bool = True) -> Vocabulary:
    group = tensor_group(dist.get_world_size())
    return Vocabulary(group, shares(ENTRIES, group.size), overlapped)


def own(x: Tensor, dim: int = 0) -> Tensor:
    cut = vocabulary()
    return x.narrow(dim, cut.first, cut.bounds[cut.group.rank + 1] - cut.first).clone()


def losses(dtype: str, settings: dict[str, Any]) -> None:
    cut = vocabulary()
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, ENTRIES, generator=generator, dtype=torch.float64)).to(kind)
    target = torch.randint(0, ENTRIES, (7,), generator=generator)
    target[2] = settings.get("ignore_index", -100)
    if settings.pop("all_ignored", False):
        target[:] = -100
    whole, mine = logits.clone().requires_grad_(), own(logits, 1).requires_grad_()
    weights = torch.arange(1.0, 8.0, dtype=kind) if settings.get("reduction") == "none" else 1.0
    expected = F.cross_entropy(whole, target, **settings)
    found = cross_entropy(mine, target, cut.group, cut.bounds, **settings)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert found.dtype == expected.dtype
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype != "bfloat16" else {"rtol": 2e-2, "atol": 2e-2}  # bf16 keeps 8 bits
    torch.testing.assert_close(found, expected, equal_nan=True, **close)
    torch.testing.assert_close(mine.grad, own(whole.grad, 1), equal_nan=True, **close)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"all_ignored": True}],
    ids=str,
)
def test_cross_entropy(world: Any, size: int, dtype: str, settings: dict[str, Any]) -> None:
    world(size).run(losses, dtype, settings)


def bad_target() -> list[str]:
    cut, said = vocabulary(), []
    for target in (ENTRIES, -1):
        with pytest.raises(IndexError) as error:
            cross_entropy(torch.zeros(1, len(own(torch.zeros(ENTRIES)))), torch.tensor([target]), cut.group, cut.bounds)
        said.append(str(error.value))
    return said


def test_a_target_out_of_range_is_an_error_on_every_rank(world: Any) -> None:
    first, second = world(2).run(bad_target)
    assert first == second
    assert "from 0 to 10" in first[0]


class Model(nn.Module):
    def __init__(self, tied: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(ENTRIES, 6, padding_idx=8)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, ENTRIES, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(ids)))


def hugging_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return ForCausalLMLoss(logits, ids, ENTRIES)


def counted_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return ForCausalLMLoss(logits, ids, ENTRIES, num_items_in_batch=torch.tensor(9))


def own_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def capped_loss(logits: Tensor, ids: Tensor) -> Tensor:
    logits = torch.tanh(logits / 3.0) * 3.0
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), ids[..., 1:].reshape(-1))


def masked_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[ids > 3], ids[ids > 3])


def read_as_a_whole(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits.softmax(-1).gather(-1, ids.unsqueeze(-1)).log().mean() + logits.transpose(1, 2)[..., 0].square().mean()


def divided_loss(logits: Tensor, ids: Tensor) -> Tensor:
    logits /= 2
    logits *= 3
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def written_copy_loss(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., 7:] = -1e4
    logits[..., :2] -= logits.max().detach()
    logits /= torch.tensor(2.0)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten().clamp(max=6))


LOSSES = {
    f.__name__: f
    for f in (hugging_loss, counted_loss, own_loss, capped_loss, masked_loss, divided_loss, written_copy_loss, read_as_a_whole)
}
GATHERING = ("read_as_a_whole", "written_copy_loss")


def model_step(name: str, tied: bool, bias: bool, overlapped: bool) -> int:
    whole = Model(tied, bias)
    cut, vocab = copy.deepcopy(whole), vocabulary(overlapped)
    for layer in (cut.embedding, cut.head):
        if len(layer.weight) == ENTRIES:
            layer.weight.data = own(layer.weight.data)
    if bias:
        cut.head.bias.data = own(cut.head.bias.data)
    cut.embedding.forward = embedding_forward(cut.embedding, vocab)  # type: ignore[method-assign]
    cut.head.forward = head_forward(cut.head, vocab)  # type: ignore[method-assign]
    ids = torch.randint(0, ENTRIES, (2, 5), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 8
    expected = LOSSES[name](whole(ids), ids)
    expected.backward()
    logits = cut(ids)
    assert isinstance(logits, ShardedLogits)
    assert logits.shape == (2, 5, ENTRIES)
    assert logits.requires_grad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = LOSSES[name](logits, ids)
    found.backward()
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    for (parameter, p), q in zip(cut.named_parameters(), whole.parameters(), strict=True):
        assert q.grad is not None
        grad = q.grad if "middle" in parameter else own(q.grad)
        torch.testing.assert_close(p.grad, grad, msg=lambda m, n=parameter: f"{n}: {m}")
    return len(["gathered" for w in caught if "gathered" in str(w.message)])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_with_a_cut_vocabulary_is_the_whole_one(world: Any, name: str, size: int) -> None:
    for tied, bias in ((True, False), (False, True)):
        for overlapped in (True, False):
            gathers = world(size).run(model_step, name, tied, bias, overlapped)
            assert all((count > 0) == (name in GATHERING) for count in gathers), "only what needs them gathers logits"


def written_after(logits: Tensor) -> Tensor:
    old = logits.float()
    logits /= 2
    return old * 2


CHANGES: dict[str, Any] = {
    "masked_fill_": lambda x: x.masked_fill_(x > 0, -1e4),
    "div_": lambda x: x.div_(2.0),
    "clamp_": lambda x: torch.clamp_(x, -1, 1),
    "__setitem__": lambda x: x.__setitem__((..., slice(7, None)), -1e4),
    "a slice's fill_": lambda x: x[..., 7:].fill_(0),
    "a slice of tokens": lambda x: x[:, 1:].mul_(2),
    "a slice's -=": lambda x: operator.setitem(x, (..., 7), operator.isub(x[..., 7], 1)),
    "another shape": lambda x: x.flatten(0, 1).masked_fill_(torch.ones(10, ENTRIES, dtype=torch.bool), 0),
    "a transposed view": lambda x: x.transpose(1, 2)[:, 3].zero_(),
    "data": lambda x: x.data.mul_(0.5),
    "detached": lambda x: x.detach()[..., 0].zero_(),
    "parts": lambda x: x.split(4, -1)[1].zero_(),
    "out": lambda x: torch.mul(torch.ones(2, 5, ENTRIES), 2, out=x),
    "read after it was divided": written_after,
    "read after a relu in place": lambda x: (F.relu(x, inplace=True), x.float()),
}


def changed(name: str) -> str:
    vocab = vocabulary()
    logits = ShardedLogits.of(own(torch.ones(ENTRIES, 2, 5)).permute(1, 2, 0).contiguous(), vocab)
    try:
        CHANGES[name](logits)
        F.cross_entropy(logits.flatten(0, 1), torch.zeros(10, dtype=torch.long))
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_is_refused_on_every_rank(world: Any, name: str) -> None:
    for said in world(2).run(changed, name):
        assert "in place, where the change would be lost" in said
        assert "x.masked_fill(...)" in said


def labels_to_a_hugging_face_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=ENTRIES, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8
    )
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config)
    cut = copy.deepcopy(whole)
    cut.lm_head.weight.data = own(cut.lm_head.weight.data)
    cut.lm_head.forward = head_forward(cut.lm_head, vocabulary())  # type: ignore[method-assign]
    ids = torch.randint(0, ENTRIES, (2, 6), generator=torch.Generator().manual_seed(1))
    expected, found = whole(input_ids=ids, labels=ids), cut(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(found.logits.argmax(-1), expected.logits.argmax(-1))
        greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert cut.generate(ids, **greedy).equal(whole.generate(ids, **greedy))


def test_hugging_face(world: Any) -> None:
    world(2).run(labels_to_a_hugging_face_model)
