"""The stack of blocks: a pass runs its blocks, stands in for the others, and refuses loops that it cannot follow."""

import contextlib
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import ARGUMENTS, Pass, Slot, structure
from lightning_overlap.model.block_stack import BlockStack


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


OUTPUTS = dict.fromkeys(range(4), (Slot(0), {}))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_middle_of_the_stack(loop):
    s, told = stack(), []
    received = torch.tensor([10.0], requires_grad=True)
    current_pass = Pass(
        frozenset({1, 2}), 3, {(0, 0): received}, OUTPUTS, is_kept=lambda leaf: leaf == (2, 0), before_block=told.append
    )
    after = []
    with s.running(current_pass):
        loop(s, torch.zeros(1))
        after.append("not reached")
    assert not after
    assert list(current_pass.kept) == [(2, 0)]
    sent = current_pass.kept[2, 0]
    assert sent.tolist() == [13.0]
    assert told == [1, 2]
    sent.sum().backward()  # a checkpoint runs its block again, with the received tensor
    assert received.grad.tolist() == [1.0]
    assert told in ([1, 2], [1, 2, 2, 1])


@pytest.mark.parametrize("loop", LOOPS)
def test_the_end_of_the_stack(loop):
    s = stack()
    with s.running(Pass(frozenset({3}), 4, {(2, 0): torch.tensor([10.0])}, OUTPUTS)):
        assert loop(s, torch.zeros(1)).tolist() == [13.0]


def test_a_last_stage_without_blocks():
    s = stack()
    with s.running(Pass(frozenset(), 4, {(3, 0): torch.tensor([10.0])}, OUTPUTS)):
        assert plain(s, torch.zeros(1)).tolist() == [10.0]


def test_a_first_stage_without_blocks():
    s = stack()
    current_pass = Pass(frozenset(), 0, is_first=True, is_kept=lambda leaf: True)
    with s.running(current_pass):
        plain(s, torch.tensor([7.0]))
    assert current_pass.kept[ARGUMENTS, 0].tolist() == [7.0]


def test_blocks_that_return_tuples():
    s = stack(Pair)
    outputs = {block: structure(block, ((torch.ones(1), "weights"), {})) for block in range(4)}
    current_pass = Pass(frozenset({2}), 3, {(1, 0): torch.tensor([10.0])}, outputs, is_kept=lambda leaf: True)
    with s.running(current_pass):
        x = torch.zeros(1)
        for block in s.blocks:
            x, weights = block(x)
            assert weights == "weights"
    assert current_pass.kept[2, 0].tolist() == [12.0]


class Remembers(Add):
    """Returns a dictionary with the input of the first block and the inputs of all blocks so far."""

    def forward(self, hidden_states, first=None, memory=()):
        first = hidden_states if first is None else first
        return {"x": hidden_states + self.amount + first, "first": first, "memory": [*memory, hidden_states]}


def remembering(s, x):
    first, memory = None, []
    for block in s.blocks:
        out = block(x, first, memory=memory)
        x, first, memory = out["x"], out["first"], out["memory"]
    return x + sum(memory) + first


def test_nested_outputs_of_blocks():
    s = stack(Remembers)
    expected = remembering(s, torch.ones(1))
    whole = Pass(frozenset({0, 1}), 2, is_kept=lambda leaf: True)
    with s.running(whole):
        remembering(s, torch.ones(1))
    asked = []

    def fetch(leaf):
        asked.append(leaf)
        return whole.kept[leaf]

    nan = torch.full((1,), float("nan"))  # computed from parameters of another stage
    with s.running(Pass(frozenset({2, 3}), 4, structures=dict(whole.structures), fetch=fetch)):
        assert remembering(s, nan).tolist() == expected.tolist()
    assert asked == [(1, 0), (1, 1), (1, 2), (1, 3)]
    received = {leaf: whole.kept[leaf] for leaf in asked}
    with s.running(Pass(frozenset({2, 3}), 4, received, dict(whole.structures))):
        assert remembering(s, nan).tolist() == expected.tolist()
    del received[1, 1]
    with (
        pytest.raises(ConfigError, match="this stage uses tensor 1 of the output of block 1"),
        s.running(Pass(frozenset({2, 3}), 4, received, dict(whole.structures))),
    ):
        remembering(s, nan)


def test_an_argument_that_is_computed_before_the_blocks():
    s, scale = stack(), torch.tensor(float("nan"))

    def conditioned(x):
        for block in s.blocks:
            x = block(x, scale)
        return x

    asked = []

    def fetch(leaf):
        asked.append(leaf)
        return {(0, 0): torch.tensor([10.0]), (ARGUMENTS, 1): torch.tensor(2.0)}[leaf]

    with s.running(Pass(frozenset({1, 2, 3}), 4, structures=dict(OUTPUTS), fetch=fetch, is_kept=lambda leaf: True)):
        assert conditioned(torch.ones(1)).tolist() == [22.0]
    assert asked == [(0, 0), (ARGUMENTS, 1)]


def collected(s, x):
    seen = []
    for block in s.blocks:
        x = block(x)
        assert x.shape == (1,)
        seen.append(x)
    return torch.cat(seen)


def test_hidden_states_that_the_loop_collects():
    s = stack()
    received = {(0, 0): torch.tensor([5.0]), (1, 0): torch.tensor([6.0])}
    with s.running(Pass(frozenset({2, 3}), 4, received, OUTPUTS)):
        assert collected(s, torch.zeros(1)).tolist() == [5.0, 6.0, 8.0, 11.0]
    del received[0, 0]
    current_pass = Pass(frozenset({2, 3}), 4, received, OUTPUTS)
    with pytest.raises(ConfigError, match="tensor 0 of the output of block 0"), s.running(current_pass):
        collected(s, torch.zeros(1))


class Other:
    pass


class ReturnsMore(Add):
    def forward(self, hidden_states, other=None):
        assert other is None or other.size
        return super().forward(hidden_states), Other()


def test_a_value_that_is_no_tensor_is_refused_where_it_is_read():
    s = stack(ReturnsMore)
    outputs = {block: pickle.loads(pickle.dumps(structure(block, ((torch.ones(1), Other()), {})))) for block in range(4)}
    current_pass = Pass(frozenset({2}), 3, {(1, 0): torch.zeros(1)}, outputs)

    def through(x, other=None):
        for block in s.blocks:
            x, other = block(x, other)

    with pytest.raises(ConfigError, match="another stage reads the Other that block 1 returns"), s.running(current_pass):
        through(torch.zeros(1))


def test_a_sequential_is_ordinary_without_a_pass():
    s = stack(container=nn.Sequential)
    current_pass = Pass(frozenset({0}), 1, is_kept=lambda leaf: leaf == (0, 0))
    with s.running(current_pass):
        s.blocks(torch.ones(1))
    assert current_pass.kept[0, 0].tolist() == [1.0]
    assert s.blocks(torch.ones(1)).tolist() == [7.0]  # without a pass the list is ordinary
    assert [b.amount for b in s.blocks[1:3]] == [1.0, 2.0]
    s.remove()
    assert type(s.blocks) is nn.Sequential


def everything(**more):
    return Pass(frozenset(range(4)), 4, **more)


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
        (between, "the code between block 0 and block 1 of blocks changes the hidden states"),
        (twice, "block 0 of blocks was called after 4 of 4 blocks"),
        (some, "called 2 of the 4 blocks of blocks"),
        (without, "no hidden states were found in the arguments of a block of blocks"),
    ],
)
def test_loops_that_cannot_be_cut_are_refused(loop, said):
    s = stack()
    with pytest.raises(ConfigError, match=said), s.running(everything()):
        loop(s, torch.zeros(1))


def catching(s, x):
    with contextlib.suppress(BaseException):
        plain(s, x)


def test_a_forward_that_catches_everything_is_refused():
    s = stack()
    current_pass = Pass(frozenset({0}), 1)
    with pytest.raises(ConfigError, match="catches every exception"), s.running(current_pass):
        catching(s, torch.zeros(1))


def failing(s, x):
    raise ZeroDivisionError


def test_an_exception_of_the_users_comes_through():
    s = stack()
    with pytest.raises(ZeroDivisionError), s.running(everything()):
        failing(s, torch.zeros(1))
    with s.running(everything()):
        plain(s, torch.zeros(1))  # and the stack can be used again


def test_an_evaluation_may_go_through_it_again_or_not_at_all():
    s, again = stack(), []
    with s.running(everything(restart=lambda: again.append(1))):
        twice(s, torch.zeros(1))
    assert again == [1]
    with s.running(everything(restart=lambda: None)):
        torch.zeros(1)
