"""Which rank holds and writes what, and a checkpoint of a parameter that two modes cut."""

from datetime import timedelta

import pytest
import torch
from torch import nn

from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.world import rank
from lightning_overlap.state.parts import Parts
from lightning_overlap.state.sharded import ShardedCheckpoints, local_state, parameter_names
from lightning_overlap.state.shards import Place

SHAPE = torch.Size([6, 8])


class CutsDim:
    """A mode that cuts what is called ``cut`` along a dim, over the ranks of a group."""

    def __init__(self, mesh, group, dim, shape=SHAPE):
        self.mesh, self.group, self.dim, self.shape = mesh, group, dim, shape

    def layout_of(self, name):
        return name.startswith("cut")

    def part_of(self, layout, rank):
        return self.mesh.index(self.group, rank) if layout else ()

    def sharers_of(self, layout):
        return None

    def place_of(self, name):
        if not name.startswith("cut"):
            return None
        n = self.shape[self.dim] // self.mesh.size(self.group)
        return Place(self.shape, {self.dim: ((self.mesh.index(self.group) * n, n),)})


class HeldBy:
    """A mode under which one rank of a pipeline holds a tensor: the one whose number its name ends with."""

    def __init__(self, mesh):
        self.mesh = mesh

    def layout_of(self, name):
        return int(name[-1])

    def part_of(self, layout, rank):
        return () if self.mesh.index("pipeline", rank) == layout else None

    def sharers_of(self, layout):
        return None

    def place_of(self, name):
        return None


def brute_force_deal(holders, world, tensors):
    """Who writes what, by the definition: each part by the rank of its holders with the least to write."""
    load, writers = [0] * world, {}
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
        parts = [tuple(holder.part_of(holder.layout_of(name), rank) for holder in holders) for rank in range(world)]
        kinds = list(dict.fromkeys(part for part in parts if None not in part))
        for kind in kinds:
            writer = min((rank for rank in range(world) if parts[rank] == kind), key=load.__getitem__)
            load[writer] += max(tensors[name].numel() // len(kinds), 1)
            writers.setdefault(name, []).append(writer)
    return writers


@pytest.mark.parametrize(("pipeline", "data", "tensor"), [(2, 2, 2), (1, 4, 1), (2, 1, 1), (1, 2, 3)])
def test_every_part_is_written_once_by_the_least_busy_of_its_holders(pipeline, data, tensor):
    degrees = Degrees(pipeline=pipeline, data=data, tensor=tensor)
    tensors = {f"{'cut' if i % 3 else 'all'}.{i % degrees.pipeline}": torch.zeros(6, 8 + i) for i in range(40)}
    shares = []
    for number in range(degrees.world):
        mesh = ParallelMesh(degrees, number)
        holders = [HeldBy(mesh), NamedCuts(mesh)]
        shares.append(Parts(holders, mesh).names_to_write(tensors))
    writers = brute_force_deal(holders, degrees.world, tensors)
    assert {name: sorted(r for r, share in enumerate(shares) if name in share) for name in tensors} == {
        name: sorted(ranks) for name, ranks in writers.items()
    }


class NamedCuts(CutsDim):
    """Over the tensor ranks, without a place: sizes are those of the tensors."""

    def __init__(self, mesh):
        super().__init__(mesh, "tensor", 0)

    def place_of(self, name):
        return None


def test_two_cuts_of_one_parameter_are_their_product():
    mesh = ParallelMesh(Degrees(pipeline=1, data=2, context=1, tensor=2), 3)
    parts = Parts([CutsDim(mesh, "samples", 0), CutsDim(mesh, "tensor", 1, torch.Size([3, 8]))], mesh)
    place = parts.place("cut")
    assert place == Place(SHAPE, {0: ((3, 3),), 1: ((4, 4),)})
    assert place.piece == (3, 4)
    assert parts.place("other") is None


def test_dealing_many_names_to_many_ranks_looks_at_each_layout_once():
    mesh = ParallelMesh(Degrees(pipeline=8, data=8, context=1, tensor=8), 0)
    calls = []

    class Counted(HeldBy):
        def part_of(self, layout, rank):
            calls.append(rank)
            return super().part_of(layout, rank)

    parts = Parts([Counted(mesh)], mesh)
    parts.names_to_write({f"{i}.{i % 8}": torch.zeros(1) for i in range(400)})
    parts.names_to_write({f"{i}.{i % 8}": torch.zeros(1) for i in range(400)})
    assert len(calls) == 8 * 512


# -- a checkpoint -----------------------------------------------------------------------------------------------------------


def whole_model():
    return {"cut": torch.arange(48.0).view(SHAPE), "other": torch.arange(5.0)}


def mesh_of(data, tensor):
    return ParallelMesh(Degrees(pipeline=1, data=data, context=1, tensor=tensor), rank())


def cuts(mesh):
    rows = SHAPE[0] // mesh.size("samples")
    return [CutsDim(mesh, "samples", 0), CutsDim(mesh, "tensor", 1, torch.Size([rows, SHAPE[1]]))]


def piece_of(tensor, place):
    for dim, spans in place.spans.items() if place is not None else ():
        tensor = torch.cat([tensor.narrow(dim, start, n) for start, n in spans], dim)
    return tensor.clone()


def held(data, tensor):
    """This rank's pieces of the model as parameters, their optimizer after a step, and the parts."""
    mesh = mesh_of(data, tensor)
    parts = Parts(cuts(mesh), mesh)
    module = nn.Module()
    for name, value in whole_model().items():
        module.register_parameter(name, nn.Parameter(piece_of(value, parts.place(name))))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return module, optimizer, parts


def save(path, data, tensor):
    module, optimizer, parts = held(data, tensor)
    folders = ShardedCheckpoints(timedelta(seconds=60))
    state = {"state_dict": module.state_dict(), "optimizer_states": [local_state(optimizer, None, parameter_names(module), parts)]}
    folders.save(state, path, parts, copy=False)()
    folders.close(complete=True)


def loaded(path, data, tensor):
    """Whether weights and moments that are read are those that this many ranks compute."""
    module, optimizer, parts = held(data, tensor)
    folders = ShardedCheckpoints(timedelta(seconds=60))
    blank = {name: torch.full_like(value, -1) for name, value in whole_model().items()}
    checkpoint = folders.load(path, blank, weights_only=True)
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        optimizer.state[parameter]["exp_avg_sq"].zero_()
    (saved,) = checkpoint["optimizer_states"]
    folders.load_optimizer(saved, optimizer, parameter_names(module), parts, lambda state: None)
    folders.close(complete=True)
    weights = {name: piece_of(value, parts.place(name)) for name, value in checkpoint["state_dict"].items()}
    return all(
        weights[name].equal(expected[name]) and optimizer.state[p]["exp_avg_sq"].equal(moments[name])
        for name, p in module.named_parameters()
    )


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (1, 2)])
def test_a_checkpoint_of_two_cuts_of_one_parameter_loads_into_other_numbers_of_ranks(world, tmp_path, data, tensor):
    path = tmp_path / "checkpoint"
    world(4).run(save, path, 2, 2)
    assert all(world(data * tensor).run(loaded, path, data, tensor))


class Spreads(CutsDim):
    """A mode that spreads what is called ``cut`` over the ranks of experts, whose optimizer's state is sharded over others."""

    def sharers_of(self, layout):
        return "expert_gradients" if layout else None


def test_the_state_of_experts_is_written_by_the_ranks_that_have_a_shard_of_it():
    # Ranks 0 and 2 have the same experts and one half of their state each, though they average no gradients of anything else.
    firsts = {"cut": [], "whole": []}
    for number in range(4):
        mesh = ParallelMesh(Degrees(tensor=4, expert=2), number)
        parts = Parts([Spreads(mesh, "experts", 0)], mesh)
        for name, found in firsts.items():
            found.append(parts.is_first(name))
    assert firsts == {"cut": [True, True, True, True], "whole": [True, False, False, False]}
