"""The boundary of the block stack: cuts nest as they declare, in whatever order they are registered."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Boundary, Nesting, TokenCut


class Block(nn.Module):
    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.events = events

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        self.events.append(("block", x.shape[-2], None if positions is None else positions.tolist()))
        return x * self.weight


class Half(TokenCut):
    """Keeps the first half of the tokens; repeats them after the last block."""

    remedy = "cut nothing"

    def __init__(self, name: str, nesting: Nesting, events: list[Any]) -> None:
        self.name, self.events = name, events
        self.nesting = nesting  # type: ignore[misc]

    def enter(self, x: Tensor) -> Tensor:
        self.events.append((self.name, "enter", x.shape[-2]))
        return x[..., : x.shape[-2] // 2, :]

    def leave(self, x: Tensor) -> Tensor:
        self.events.append((self.name, "leave", x.shape[-2]))
        return torch.cat([x, x], -2)


class WithPositions(Half):
    def shard_argument(self, x: Tensor) -> Tensor:
        return x[: len(x) // 2]


def model(events: list[Any]) -> list[nn.Module]:
    return [Block(events) for _ in range(3)]


def run(blocks: list[nn.Module], x: Tensor, **given: Any) -> Tensor:
    for block in blocks:
        x = block(x, **given)
    return x


@pytest.mark.parametrize("inner_first", [True, False])
def test_outer_cuts_enter_first_and_leave_last(inner_first: bool) -> None:
    events: list[Any] = []
    blocks, boundary = model(events), Boundary()
    cuts = [WithPositions("context", Nesting.TOKENS, events), Half("sequence", Nesting.LAYERS, events)]
    removals = [boundary.register(blocks, cut) for cut in (reversed(cuts) if inner_first else cuts)]
    y = run(blocks, torch.zeros(2, 8, 3), positions=torch.arange(8))
    assert y.shape == (2, 8, 3)
    assert events == [
        ("context", "enter", 8),
        ("sequence", "enter", 4),
        *[("block", 2, [0, 1, 2, 3])] * 3,
        ("sequence", "leave", 2),
        ("context", "leave", 4),
    ]
    for remove in removals:
        remove()
    events.clear()
    run(blocks, torch.zeros(2, 8, 3), positions=torch.arange(8))
    assert events == [("block", 8, list(range(8)))] * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_shard_arguments_again(reentrant: bool) -> None:
    events: list[Any] = []
    blocks, boundary = model(events), Boundary()
    boundary.register(blocks, WithPositions("context", Nesting.TOKENS, events))
    x = torch.ones(2, 8, 3, requires_grad=True)
    boundary.start_forward()
    y = x
    for block in blocks:
        y = checkpoint(block, y, torch.arange(8), use_reentrant=reentrant)
    seen = [event for event in events if event[0] == "block"]
    boundary.start_backward()
    y.sum().backward()
    boundary.finish_backward()
    again = [event for event in events if event[0] == "block"][3:]
    assert again == seen == [("block", 4, [0, 1, 2, 3])] * 3


@pytest.mark.parametrize(("called", "which"), [(slice(1, 3), "first"), (slice(0, 2), "last")])
def test_the_first_and_the_last_block_must_be_called(called: slice, which: str) -> None:
    blocks, boundary = model([]), Boundary()
    boundary.register(blocks, Half("sequence", Nesting.LAYERS, []))

    def step() -> None:
        boundary.start_forward()
        run(blocks[called], torch.zeros(2, 8, 3))
        boundary.start_backward()

    with pytest.raises(ConfigError, match=f"the {which} block was not called in this step.*cut nothing"):
        step()
    boundary.start_forward()
    run(blocks, torch.zeros(2, 8, 3))
    boundary.require_outside()
