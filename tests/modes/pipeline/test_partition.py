"""What of a model a rank holds, and what its plan is made from."""

import pytest
import torch
from torch import nn

from lightning_overlap import ConfigError
from lightning_overlap.model.blocks import blocks_by_role, find_blocks
from lightning_overlap.modes.pipeline.config import PipelineFacts, PipelineParallel
from lightning_overlap.modes.pipeline.division import look
from lightning_overlap.modes.pipeline.partition import Partition, heads


class Model(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.after = after


class Own(nn.Linear):
    """May compute anything."""


@pytest.mark.parametrize(
    ("after", "names"),
    [
        (nn.Linear(4, 9), [""]),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 9, bias=False)), ["1"]),
        (nn.LayerNorm(4), []),
        (nn.Linear(4, 9).requires_grad_(False), []),
        (Own(4, 9), []),
    ],
)
def test_the_head_is_what_is_linear_after_the_blocks(after, names):
    model = Model(after)
    name, blocks = find_blocks(model, None, 2)
    assert heads(model, name, blocks) == [after.get_submodule(name) for name in names]
    seen = look(model, PipelineParallel(size=2, layers_per_stage=(3, 1)), {})
    head = 36 * len(names)
    assert seen == PipelineFacts(name, (3, 1), (3 * 16, 16 + head), head, 0.8)


def test_blocks_that_are_the_model_have_no_head():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert heads(model, *find_blocks(model, None, 2)) == []


def test_what_is_around_the_blocks_is_the_first_and_last_stages():
    """Code before and after the blocks may use a parameter there. What comes after the blocks may write buffers."""
    model = nn.Module()
    model.inner = Model(nn.BatchNorm1d(4))
    for module in (model, model.inner, model.inner.before):
        module.register_buffer("buffer", torch.zeros(2))
        module.register_parameter("scale", nn.Parameter(torch.zeros(2)))
    found = find_blocks(model, None, 3)
    partition = Partition(model, *found, [range(2), range(2, 3), range(3, 4)], [0, 1, 2])
    last = [
        *("buffer", "inner.buffer"),
        *(f"inner.after.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    assert [name for name, users in partition.users.items() if users == (2,) and "blocks" not in name] == last
    assert [name for name, users in partition.users.items() if users == (0, 2)] == ["scale", "inner.scale"]
    assert set(partition.after_blocks) == {*last, "scale", "inner.scale"}
    assert partition.users["inner.before.scale"] == (0,)


def test_what_every_stage_holds():
    model = Model(nn.Linear(4, 4))
    found = find_blocks(model, None, 3)
    stages = [range(2), range(2, 3), range(3, 4)]
    partition = Partition(model, *found, stages, [0, 1, 2], ["before", "after.bias"])
    assert [name for name, users in partition.users.items() if users == (0, 1, 2)] == ["before.weight", "before.bias", "after.bias"]
    with pytest.raises(ConfigError, match="held_by_all names befor, but"):
        Partition(model, *found, stages, [0, 1, 2], ["befor"])


def test_a_rank_with_both_ends_lends_what_is_before_the_blocks_too():
    model = Model(nn.Linear(4, 4))
    found = find_blocks(model, None, 2)
    assert "before.weight" in Partition(model, *found, [range(2), range(2, 3), range(3, 4)], [0, 1, 0]).after_blocks
    assert "before.weight" not in Partition(model, *found, [range(2), range(2, 4)], [0, 1]).after_blocks


def test_the_role_of_the_blocks_is_the_strategys_or_the_modules():
    model = nn.Module()
    model.encoder, model.decoder = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))) for _ in range(2))
    with pytest.raises(ConfigError, match="encoder and decoder are equally long"):
        blocks_by_role(model, {}, 2)
    assert blocks_by_role(model, {"decoder": "blocks"}, 2)[0] == "decoder"
    model.parallel_plan = {"encoder": "blocks"}
    assert blocks_by_role(model, {"0": "token_wise"}, 2) == ("encoder", model.encoder)
    seen = look(model, PipelineParallel(size=2), {})
    assert seen is not None
    assert seen.name == "encoder"
    assert blocks_by_role(model, {"decoder": "blocks"}, 2)[0] == "decoder"
    with pytest.raises(ConfigError, match="encoder and decoder have the role blocks"):
        blocks_by_role(model, {"*coder": "blocks"}, 2)
    with pytest.raises(ConfigError, match="no list of blocks 'layers'"):
        blocks_by_role(model, {"layers": "blocks"}, 2)
