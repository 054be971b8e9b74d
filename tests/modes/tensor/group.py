"""A tensor group of a world, made once in each of its workers."""

from datetime import timedelta
from functools import cache

import torch.distributed as dist

from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import make_group


@cache
def tensor_group(size: int) -> Group:
    assert size == dist.get_world_size()
    return make_group([range(size)], "tensor", timedelta(seconds=60))
