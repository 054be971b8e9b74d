"""The helper that the world tests stand on."""

import os

import pytest
import torch
import torch.distributed as dist


def add_up():
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value.item()


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("a mistake in the worker")


def test_ranks_share_a_group_and_answer_in_order(world):
    assert world(2).run(add_up) == [3.0, 3.0]
    assert world(2).run(dist.get_rank) == [0, 1]


def test_an_error_carries_the_workers_traceback_and_the_world_lives_on(world):
    with pytest.raises(AssertionError, match=r"(?s)fail_on_rank_one.*ValueError: a mistake in the worker"):
        world(2).run(fail_on_rank_one)
    assert world(2).run(add_up) == [3.0, 3.0]


def test_workers_stay_alive_between_calls(world):
    assert world(2).run(os.getpid) == world(2).run(os.getpid)
