"""Several ranks on one device, each a host of its own for NCCL."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.world import World


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device (--device cpu tries the tests themselves)")
    return name


@pytest.fixture(scope="session")
def hosts() -> Iterator[Callable[[int], World]]:
    """``hosts(2)`` is the same two workers throughout the session."""
    worlds: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in worlds or not all(worker.is_alive() for worker in worlds[size].workers):
            worlds[size] = World(size, one_device=True)
        return worlds[size]

    yield of
    for each in worlds.values():
        each.close()
