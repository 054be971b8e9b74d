"""Named groups of all worlds of up to 64 ranks, against their definitions by coordinates."""

import itertools
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_overlap import ConfigError
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.ranks.mesh import ParallelMesh

SHARED = {  # by name, which coordinates (stage, data, context, tensor) the ranks of a group have in common
    "samples": (True, False, True, True),
    "gradients": (True, False, False, True),
    "tensor": (True, True, True, False),
    "context": (True, True, False, True),
    "pipeline": (False, True, True, True),
    "batch": (False, True, False, False),
    "stage": (True, False, False, False),
    "world": (False, False, False, False),
}


def shapes(limit):
    for first in range(1, limit + 1):
        for second in range(1, limit // first + 1):
            for third in range(1, limit // (first * second) + 1):
                yield from ((first, second, third, fourth) for fourth in range(1, limit // (first * second * third) + 1))


def expected(sizes):
    """By name, all groups: ranks with the same shared coordinates."""
    coordinates = list(itertools.product(*map(range, sizes)))  # of the ranks in order: the last axis runs fastest
    for name, shared in SHARED.items():
        sets = {}
        for rank, place in enumerate(coordinates):
            sets.setdefault(tuple(c for c, common in zip(place, shared, strict=True) if common), []).append(rank)
        yield name, sorted(sets.values())


def refuse(mesh, name, sets):
    assert sorted(mesh.sets(name)) == sets, (mesh.degrees, name)
    assert mesh.size(name) == len(sets[0])
    assert [mesh.index(name, rank) for ranks in sets for rank in ranks] == [i for ranks in sets for i in range(len(ranks))]


def test_groups_of_all_worlds():
    for pipeline, data, context, tensor in shapes(64):
        mesh = ParallelMesh(Degrees(pipeline=pipeline, data=data, context=context, tensor=tensor), 0)
        for name, sets in expected((pipeline, data, context, tensor)):
            refuse(mesh, name, sets)


def test_expert_groups_of_all_worlds():
    """Experts spread over consecutive ranks of a stage: tensor ranks first, then context ranks, then data ranks."""
    for pipeline, data, context, tensor in shapes(64):
        stage = data * context * tensor
        for size in range(1, stage + 1):
            if stage % size:
                continue
            mesh = ParallelMesh(Degrees(pipeline=pipeline, data=data, context=context, tensor=tensor, expert=size), 0)
            experts, same_experts = [], []
            for first in range(0, pipeline * stage, stage):
                ranks = list(range(first, first + stage))
                experts += [ranks[i : i + size] for i in range(0, stage, size)]
                same_experts += [ranks[i::size] for i in range(size)]
            refuse(mesh, "experts", sorted(experts))
            refuse(mesh, "expert_gradients", sorted(same_experts))
            if pipeline == 1:
                together = [{mesh.index("samples", rank) for rank in ranks} for ranks in experts]
                assert mesh.degrees.experts_span_samples == any(len(samples) > 1 for samples in together)


def test_the_sampler_gives_each_rank_of_a_batch_the_same_share():
    for pipeline, data, context, tensor in shapes(64):
        mesh = ParallelMesh(Degrees(pipeline=pipeline, data=data, context=context, tensor=tensor), 0)
        shares = [{mesh.index("samples", rank) for rank in ranks} for ranks in mesh.sets("batch")]
        assert all(len(share) == 1 for share in shares)
        assert sorted(share.pop() for share in shares) == list(range(mesh.size("samples")))


def test_a_mesh_by_hand():
    mesh = ParallelMesh(Degrees(pipeline=2, data=2, tensor=2, expert=4), rank=5)
    assert [mesh.index(name) for name in ("pipeline", "samples", "tensor", "experts")] == [1, 0, 1, 1]
    assert mesh.sets("samples") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [4, 5] in mesh.sets("tensor")
    assert mesh.sets("stage") == mesh.sets("experts") == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_experts_must_divide_a_stage():
    with pytest.raises(ConfigError, match=r"size=4 does not divide the 6 ranks of a pipeline stage \(data 3 x"):
        Degrees(data=3, tensor=2, expert=4)


def shared_groups():
    """Two names for one set of ranks share a group, until both have closed it; other traffic has a group of its own."""
    mesh, limit = ParallelMesh(Degrees(pipeline=2), dist.get_rank()), timedelta(seconds=30)
    batch, pipeline = mesh.group("batch", limit), mesh.group("pipeline", limit)
    hops = mesh.group("pipeline", limit, "pipeline.forward", gathers=False)
    batch.close()
    agreed = pipeline.agree(True, by_all=True)
    pipeline.close()
    again = mesh.group("pipeline", limit)
    facts = batch is pipeline, hops is pipeline, again is pipeline, agreed, (batch.name, hops.name), again.agree(True, by_all=True)
    hops.close()
    again.close()
    return facts


def test_a_set_of_ranks_is_connected_once_for_each_traffic(world):
    assert world(2).run(shared_groups) == [(True, False, False, True, ("batch", "pipeline.forward"), True)] * 2
