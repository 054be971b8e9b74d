"""The stack of blocks: what a pass runs, and what it refuses."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_overlap.block_stack import BlockStack, Pass
from lightning_overlap.decision import ConfigError


class Add(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, hidden_states, scale=1.0):
        return hidden_states + self.amount * scale


class Pair(Add):
    def forward(self, hidden_states, scale=1.0):
        return super().forward(hidden_states, scale), "weights"


def stack(kind=Add, container=nn.ModuleList):
    blocks = [kind(float(i)) for i in range(4)]
    made = container(blocks) if container is nn.ModuleList else container(*blocks)
    return BlockStack(made, "blocks")


def plain(s, x):
    for block in s.blocks:
        x = block(x)
    return x


def indexed(s, x):
    for i in range(len(s.blocks)):
        x = s.blocks[i](x, scale=1.0)
    return x


def sliced(s, x):
    for i, block in enumerate(s.blocks[:4]):
        assert block.amount == i
        x = block(hidden_states=x)
    return x


def checkpointed(s, x):
    for block in s.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


LOOPS = [plain, indexed, sliced, checkpointed]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_middle_of_the_stack(loop):
    s, sent, told = stack(), [], []
    received = torch.tensor([10.0], requires_grad=True)
    how = Pass(frozenset({1, 2}), 3, {1: lambda x: received}, {2: sent.append}, before=told.append, items=0)
    after = []
    with s.passing(how):
        loop(s, torch.zeros(1))
        after.append("not reached")
    assert not after
    assert sent[0].tolist() == [13.0]
    assert told == [1, 2]
    sent[0].sum().backward()  # a checkpoint runs its block again, with what was received
    assert received.grad.tolist() == [1.0]
    assert told in ([1, 2], [1, 2, 2, 1])


@pytest.mark.parametrize("loop", LOOPS)
def test_the_end_of_the_stack(loop):
    s = stack()
    how = Pass(frozenset({3}), 4, {3: lambda x: torch.tensor([10.0])}, items=0)
    with s.passing(how):
        assert loop(s, torch.zeros(1)).tolist() == [13.0]


def test_a_last_stage_without_blocks():
    s = stack()
    with s.passing(Pass(frozenset(), 4, last=lambda x: torch.tensor([10.0]), items=0)):
        assert plain(s, torch.zeros(1)).tolist() == [10.0]


def test_a_first_stage_without_blocks():
    s, sent = stack(), []
    with s.passing(Pass(frozenset(), 0, leave={-1: sent.append})):
        plain(s, torch.tensor([7.0]))
    assert sent[0].tolist() == [7.0]


def test_blocks_that_return_tuples():
    s, sent = stack(Pair), []
    how = Pass(frozenset({2}), 3, {2: lambda x: torch.tensor([10.0])}, {2: sent.append}, items=2)
    with s.passing(how):
        x = torch.zeros(1)
        for block in s.blocks:
            x, _ = block(x)
    assert sent[0].tolist() == [12.0]
    assert how.items == 2


def test_sequential_and_what_is_left_of_it():
    s, sent = stack(container=nn.Sequential), []
    with s.passing(Pass(frozenset({0}), 1, leave={0: sent.append})):
        s.blocks(torch.ones(1))
    assert sent[0].tolist() == [1.0]
    assert s.blocks(torch.ones(1)).tolist() == [7.0]  # outside of a pass it is the user's
    assert [b.amount for b in s.blocks[1:3]] == [1.0, 2.0]
    s.remove()
    assert type(s.blocks) is nn.Sequential


def everything(**more):
    return Pass(frozenset(range(4)), 4, items=0, **more)


def between(s, x):
    for block in s.blocks:
        x = block(x) * 2
    return x


def twice(s, x):
    return plain(s, plain(s, x))


def some(s, x):
    for block in list(s.blocks)[:2]:
        x = block(x)
    return x


def without(s, x):
    for block in s.blocks:
        x = block(y=x)
    return x


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (between, "between block 0 and block 1 of blocks the loop does something"),
        (twice, "block 0 of blocks is called where block 4 is next"),
        (some, "ended with 2 of the 4 blocks of blocks called"),
        (without, "called without hidden states that can be found"),
    ],
)
def test_loops_that_cannot_be_cut_are_refused(loop, said):
    s = stack()
    with pytest.raises(ConfigError, match=said), s.passing(everything()):
        loop(s, torch.zeros(1))


def catching(s, x):
    with contextlib.suppress(BaseException):
        plain(s, x)


def test_a_forward_that_catches_everything_is_refused():
    s = stack()
    how = Pass(frozenset({0}), 1, leave={0: lambda x: None})
    with pytest.raises(ConfigError, match="catches every exception"), s.passing(how):
        catching(s, torch.zeros(1))


def failing(s, x):
    raise ZeroDivisionError


def test_an_exception_of_the_users_comes_through():
    s = stack()
    with pytest.raises(ZeroDivisionError), s.passing(everything()):
        failing(s, torch.zeros(1))
    with s.passing(everything()):
        plain(s, torch.zeros(1))  # and the stack can be used again


def test_an_evaluation_may_go_through_it_again_or_not_at_all():
    s, again = stack(), []
    with s.passing(everything(again=lambda: again.append(1))):
        twice(s, torch.zeros(1))
    assert again == [1]
    with s.passing(everything(again=lambda: None)):
        torch.zeros(1)
