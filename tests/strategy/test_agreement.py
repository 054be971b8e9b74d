"""What ranks must have alike: batches in one order, models, optimizers' settings."""

from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_overlap import ConfigError, OverlapConfig, PipelineParallel
from lightning_overlap.strategy.agreement import describe_model, describe_optimizers, describe_settings, refuse_differences
from lightning_overlap.strategy.batches import digest
from tests.helpers.training import Net, train

Pair = namedtuple("Pair", "ids labels")


def test_a_digest_knows_the_order_of_samples():
    ids = torch.arange(12).view(4, 3)
    batch = {"ids": ids, "mask": torch.ones(4, dtype=torch.bool), "names": ["a", "b"]}
    assert digest(batch) == digest({**batch, "ids": ids.clone()})
    assert digest(batch) != digest({**batch, "ids": ids[[1, 0, 2, 3]]})
    assert digest(batch) != digest({**batch, "names": ["b", "a"]})
    assert digest(Pair(ids, ids)) != digest(Pair(ids, ids.flip(0)))
    for dtype in (torch.bfloat16, torch.complex64, torch.float64):
        values = torch.arange(4).to(dtype)
        assert digest(values) != digest(values.flip(0))
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))
    assert digest(ids.t()) == digest(ids.t().contiguous())


def test_a_model_in_words_knows_buffers_and_order():
    one, other = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(4))
    assert describe_model(one)["buffer 0.running_mean"] != describe_model(other)["buffer 0.running_mean"]
    first, second = nn.Module(), nn.Module()
    first.a, first.b = nn.Linear(2, 2), nn.Linear(2, 2)
    second.b, second.a = nn.Linear(2, 2), nn.Linear(2, 2)
    differ = {key for key, value in describe_model(first).items() if describe_model(second)[key] != value}
    assert differ == {"the order of parameters and buffers"}


def test_optimizers_in_words_know_settings_groups_and_order():
    module = nn.Linear(2, 2)

    def differ(*made):
        words = [describe_optimizers([optimizer], module) for optimizer in made]
        return {key for key in {**words[0], **words[1]} if words[0].get(key) != words[1].get(key)}

    plain = torch.optim.SGD(module.parameters(), 0.1)
    assert differ(plain, torch.optim.SGD(module.parameters(), 0.1)) == set()
    assert differ(plain, torch.optim.SGD(module.parameters(), 0.2)) == {"lr in group 0 of optimizer 0"}
    assert differ(plain, torch.optim.SGD([module.bias, module.weight], 0.1)) == {"the parameters in group 0 of optimizer 0"}
    assert "the class of optimizer 0" in differ(plain, torch.optim.AdamW(module.parameters(), 0.1))
    assert "lr in group 1 of optimizer 0" in differ(plain, torch.optim.SGD([{"params": [p]} for p in module.parameters()], 0.1))


def first_difference(several):
    """The error of a comparison of descriptions, of which each rank has one."""
    with pytest.raises(ConfigError) as caught:
        refuse_differences(several[dist.get_rank()])
    return str(caught.value)


def test_the_first_difference_is_told_on_every_rank(world):
    pipeline = [PipelineParallel(size=2, layers_per_stage=(2, count), microbatches=4) for count in (2, 3)]
    settings = [describe_settings(OverlapConfig(pipeline_parallel=each), "") for each in pipeline]
    names = tuple(f"blocks.{i}.weight" for i in range(1000))
    plan = {"q": "column", "k": "column"}
    plans = [describe_settings(OverlapConfig(parallel_plan=roles)) for roles in (plan, dict(reversed(plan.items())))]
    cases = {
        "the order of parallel_plan: rank 0 has q at 0 (of 2), rank 1 has k (of 2).": plans,
        "pipeline_parallel.layers_per_stage.1: rank 0 has 2, rank 1 has 3.": settings,
        "order: rank 0 has blocks.700.weight at 700 (of 1000), rank 1 has blocks.701.weight (of 999).": [
            {"order": names},
            {"order": names[:700] + names[701:]},
        ],
        "order: rank 0 has no more at 5 (of 5), rank 1 has blocks.5.weight (of 1000).": [{"order": names[:5]}, {"order": names}],
        "bias: rank 0 has absent, rank 1 has (4,).": [{}, {"bias": "(4,)"}],
    }
    for expected, several in cases.items():
        told = world(2).run(first_difference, several)
        assert told[0] == told[1]
        assert told[0].startswith(f"ranks disagree about {expected} Start the same script")


class OtherRate(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1 if self.global_rank == 0 else 0.2)


def other_rate():
    try:
        train(module=OtherRate)
    except ValueError as error:
        return str(error)
    return "trained"


def test_a_learning_rate_that_differs_is_told_on_every_rank(world):
    told = world(2).run(other_rate)
    assert told[0] == told[1]
    assert "ranks disagree about lr in group 0 of optimizer 0: rank 0 has 0.1, rank 1 has 0.2" in told[0]
