"""Worlds for the session."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.world import World

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="look for leaks over 300 steps and 20 fits")
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="of tests/gpu; cpu tries these tests themselves")


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(2)`` is the same two workers throughout the session."""
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in worlds or not all(worker.is_alive() for worker in worlds[size].workers):
            worlds[size] = World(size)
        return worlds[size]

    yield of
    for each in worlds.values():
        each.close()
