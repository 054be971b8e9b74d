"""What a pipeline cannot do is refused on every rank, with what to do."""

import re
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.nn import functional as F

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel
from tests.helpers.pipelined import QUIET, Block, Net, loader, refused


class Twice(Net):
    def training_step(self, batch, index):
        return self.loss(batch) + self.loss(batch)


class Between(Net):
    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x) * 1.0
        return self.head(self.norm(x))


class Swallows(Net):
    def training_step(self, batch, index):
        try:
            return self.loss(batch)
        except:  # noqa: E722
            return None


class TiedByHand(Net):
    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Trims(Net):
    def training_step(self, batch, index):
        return self.loss(batch[:, : int(batch.sum()) % 4 + 3])


class Scalar(Net):
    """A parameter without dims, which the first stage alone uses."""

    def __init__(self):
        super().__init__()
        self.tokens.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))


class NoLoss(Net):
    def training_step(self, batch, index):
        self.loss(batch)


class Fails(Net):
    def on_train_batch_end(self, outputs, batch, index):
        if dist.get_rank() == 1 and index == 3:  # the first batches are compared by a blocking collective, which nobody can leave
            raise ZeroDivisionError("the user's")


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NoBlocks(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList(Block(16, 0.0) for _ in range(12))


class Short(Net):
    def __init__(self):
        super().__init__(blocks=3)


def test_an_error_of_one_rank_reaches_the_others(world):
    first, second = world(2).run(refused, Fails, {"size": 2, "microbatches": 2})
    assert second == "ZeroDivisionError: the user's"
    assert first == "TransferError: rank 1 has failed: ZeroDivisionError: the user's"


class FailsInValidation(Net):
    def validation_step(self, batch, index):
        if dist.get_rank() == 0 and index == 1:
            raise ZeroDivisionError("the user's")
        super().validation_step(batch, index)


def test_an_error_of_an_early_stage_in_validation_reaches_the_others(world):
    first, second = world(2).run(refused, FailsInValidation, {"size": 2, "microbatches": 2}, False, 2)
    assert first == "ZeroDivisionError: the user's"
    assert second == "TransferError: rank 0 has failed: ZeroDivisionError: the user's"


@pytest.mark.parametrize(
    ("kind", "pipeline", "said"),
    [
        (Twice, {}, "call the model once in a training_step"),
        (Between, {}, "changes the hidden states"),
        (Swallows, {}, "catches every exception"),
        (NoLoss, {}, "training_step returned no loss"),
        (Trims, {"microbatches": 8}, "for an earlier input of the same shapes it was"),
        (Net, {"microbatch_group": 1}, "must be at least size=2"),
        (TiedByHand, {}, "of another stage: the first stage holds"),
        (Manual, {}, "manual optimization"),
        (NoBlocks, {}, "equally long"),
        (Short, {"virtual_stages": 2}, "at least 4 modules of one type"),
        (Net, {"layers_per_stage": (3, 3)}, "layers_per_stage"),
        (Net, {"layout": "Et|tL"}, "has 2 blocks, but the model has 12"),
        (Net, {"schedule": "zb_v"}, "needs virtual_stages: 2"),
        (Net, {"schedule": "no such file"}, "neither one of"),
        (Net, {"microbatches": 0}, "must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(world, kind, pipeline, said):
    answers = world(2).run(refused, kind, {"size": 2, "microbatches": 2, **pipeline})
    assert all(said in answer for answer in answers), answers


def test_a_parameter_without_dims(world):
    assert world(2).run(refused, Scalar, {"size": 2, "microbatches": 2}) == ["trained"] * 2


def test_ranks_of_a_pipeline_that_read_different_batches_are_told(world):
    for answer in world(2).run(refused, Net, {"size": 2, "microbatches": 2}, True):
        assert "loaded a different batch from rank 0" in answer


def changes_weights(how: str) -> str:
    """What Lightning does to all weights in the middle of a fit."""
    warnings.simplefilter("ignore")
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, microbatches=2), **env)
    callbacks = [EMAWeightAveraging()] if how == "average" else [LearningRateFinder(num_training_steps=2)]
    given = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "callbacks": callbacks, "limit_val_batches": 0}
    module = Net()
    module.lr = 1e-2  # type: ignore[assignment]
    where = {**given, "default_root_dir": tempfile.gettempdir()}
    with pytest.raises(ConfigError) as caught:
        Trainer(**QUIET, accelerator="cpu", max_steps=4, **where).fit(module, loader(8))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"), [("average", "EMAWeightAveraging averages all weights"), ("find", "cannot load weights during a fit")]
)
def test_what_changes_all_weights_is_refused_on_every_rank(world, how, said):
    assert all(said in answer for answer in world(2).run(changes_weights, how))


class Leaves(Block):
    left = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left = x.detach().abs().mean()
        return super().forward(x)


class LeavesBehind(Net):
    """What blocks leave behind is added to the loss: that of another stage's is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Leaves(16, 0.0) for _ in range(4))

    def training_step(self, batch, index):
        loss = self.loss(batch) + sum(block.left for block in self.blocks)
        return {"loss": loss, "twice": 2 * loss.detach()}


def test_what_the_unsplit_model_knows_better_is_found_in_the_first_batch(world):
    pipeline = {"size": 2, "microbatches": 2}
    assert world(2).run(refused, LeavesBehind, pipeline, False, 0, False) == ["trained"] * 2
    said = world(2).run(refused, LeavesBehind, pipeline)
    assert said[0] == said[1]
    found, expected = map(float, re.match(r"ConfigError: .* the loss is ([\d.]+), expected ([\d.]+\d)[.;]", said[0]).groups())
    assert expected - found > 0.1
