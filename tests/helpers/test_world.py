"""The helper that the world tests stand on."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.helpers.world import World


def add_up():
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value.item()


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("a mistake in the worker")


def leave_the_other_waiting():
    fail_on_rank_one()
    dist.all_reduce(torch.ones(1))


def die_on_rank_one():
    if dist.get_rank() == 1:
        os._exit(3)


def test_ranks_share_a_group_and_answer_in_order(world):
    assert world(2).run(add_up) == [3.0, 3.0]
    assert world(2).run(dist.get_rank) == [0, 1]


def test_an_error_carries_the_workers_traceback_and_the_world_lives_on(world):
    with pytest.raises(AssertionError, match=r"(?s)fail_on_rank_one.*ValueError: a mistake in the worker"):
        world(2).run(fail_on_rank_one)
    assert world(2).run(add_up) == [3.0, 3.0]


def test_workers_stay_alive_between_calls(world):
    assert world(2).run(os.getpid) == world(2).run(os.getpid)


@pytest.mark.parametrize(
    ("function", "told"),
    [(leave_the_other_waiting, "a mistake in the worker"), (die_on_rank_one, "rank 1: the worker died")],
)
def test_one_rank_fails_alone(function, told):
    own = World(2)
    own.run(dist.get_rank)
    own.timeout = 3.0
    with pytest.raises((AssertionError, TimeoutError), match=told):
        own.run(function)
    own.close()
