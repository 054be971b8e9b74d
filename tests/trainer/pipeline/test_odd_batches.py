"""Batches of any size, layouts and schedules that are given, and what is counted before the blocks."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_overlap import DataParallel, OverlapStrategy, PipelineParallel
from tests.helpers.pipelined import QUIET, Net, by_hand, loader, pipelined, single, told, with_trainer


def odd_batches(pipeline):
    """A last batch that is short, and batches of several lengths."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Net(optimizer="sgd")
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 32, (size, length), generator=generator) for size, length in [(8, 9), (8, 5), (3, 9), (1, 4), (7, 9)]]
    given = {**QUIET, "accelerator": "cpu", "max_epochs": 2, "limit_val_batches": 5}
    if pipeline is None:
        run = Trainer(**given, devices=1, strategy=SingleDeviceStrategy(torch.device("cpu")))
    else:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
        run = Trainer(**given, devices=dist.get_world_size(), strategy=strategy, use_distributed_sampler=False)
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    run.fit(module, data, data)
    return told(run, module)


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_batches_of_any_size(world, schedule):
    expected = odd_batches(None)
    for rank in world(2).run(odd_batches, {"size": 2, "virtual_stages": 2, "microbatches": 4, "schedule": schedule}):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        assert rank["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)


def test_layouts_that_are_given(world):
    expected = by_hand(2, {"blocks": 4})
    validated = single({"blocks": 4})["metrics"]["val_loss"]
    for given in ({"layers_per_stage": (3, 1)}, {"layout": "E|t*4L"}, {"layout": "Et*4|L"}):
        for rank in world(2).run(with_trainer, {"size": 2, "microbatches": 2, **given}, {"blocks": 4}, "auto", {}):
            assert torch.equal(rank["weights"], expected)
            assert rank["metrics"]["val_loss"] == pytest.approx(validated, rel=1e-5)
    pipeline = {"size": 2, "virtual_stages": 2, "microbatches": 2, "layout": "E||t*4|L"}
    for rank in world(2).run(with_trainer, pipeline, {"blocks": 4}, "auto", {}):
        assert torch.equal(rank["weights"], expected)


def test_a_schedule_of_the_users_own(world, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("F0.0 F0.1 B0.0 B0.1\nF1.0 I1.0 F1.1 I1.1 W1.0 W1.1\n")
    for rank in world(2).run(pipelined, {"size": 2, "microbatches": 2, "schedule": str(file)}):
        assert torch.equal(rank["weights"], by_hand(2, {}))
        assert "mine.txt" in rank["plan"].replace(" ", "")  # a long path is folded


def memory(pipeline):
    """Bytes of parameters that a rank holds while it trains, and what the whole model has."""
    held = []

    class Measured(Net):
        def on_train_batch_end(self, *arguments):
            held.append(sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.parameters()}.values()))

    module = Measured()
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    run = Trainer(**QUIET, accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, max_steps=2, limit_val_batches=0)
    run.fit(module, loader(8))
    return max(held), sum(p.nbytes for p in module.parameters())


def test_a_rank_holds_its_stages_only(world):
    for held, whole in world(4).run(memory, {"size": 4, "microbatches": 2}):
        assert held < whole / 4 * 1.2


class Counts(Net):
    """With a batch norm, and a list that training_step fills."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**{"blocks": 4, "dropout": 0.2, **model})
        self.extra = nn.BatchNorm1d(8)
        self.steps: list[int] = []

    def training_step(self, batch, index):
        self.steps.append(index)
        return super().training_step(batch, index)

    def forward(self, ids):
        return self.extra(super().forward(ids))


def verified(pipeline, trainer, tied, verify):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    plan = {"pipeline_parallel": PipelineParallel(**pipeline), "verify_first_step": verify}
    strategy = OverlapStrategy(DataParallel(bucket_size=1000), **plan, **env)
    module = Counts(tied=tied)
    given = {"devices": dist.get_world_size(), "strategy": strategy, "use_distributed_sampler": False, "limit_val_batches": 0}
    run = Trainer(**QUIET, accelerator="cpu", max_epochs=1, limit_train_batches=2, **given, **trainer)
    run.fit(module, loader(8))
    return {**told(run, module), "buffers": torch.cat([b.double().flatten() for b in module.buffers()]), "steps": module.steps}


@pytest.mark.parametrize(
    ("ranks", "pipeline", "trainer", "tied"),
    [(2, {"virtual_stages": 2}, {}, True), (4, {"schedule": "zb_h1"}, {"precision": "bf16-mixed"}, False)],
)
def test_verifying_the_first_batch_leaves_nothing_behind(world, ranks, pipeline, trainer, tied):
    pipeline = {"size": 2, "microbatches": 4, **pipeline}
    plain = world(ranks).run(verified, pipeline, trainer, tied, False)
    looked = world(ranks).run(verified, pipeline, trainer, tied, True)
    for one, other in zip(plain, looked, strict=True):
        assert torch.equal(one.pop("weights"), other.pop("weights"))
        assert torch.equal(one.pop("buffers"), other.pop("buffers"))
        assert one == other


def fit_twice_and_more(with_pipeline):
    """A second fit of the same Trainer, and evaluation between and after, when every rank has the whole model."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if with_pipeline:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = 2, OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, virtual_stages=2, microbatches=4), **env)
    module = Net(optimizer="sgd")
    length = {"max_epochs": 1, "limit_train_batches": 3, "use_distributed_sampler": False}
    run = Trainer(**QUIET, **length, accelerator="cpu", devices=devices, strategy=strategy)
    run.fit(module, loader(8))
    (between,) = run.validate(module, loader(8), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(8))
    (after,) = run.validate(module, loader(8), verbose=False)
    predicted = torch.cat(run.predict(module, loader(8)))
    return {**told(run, module), "losses": [between["val_loss"], after["val_loss"]], "predicted": predicted}


class CountsBefore(Net):
    """Batch norm and a metric before the blocks."""

    def __init__(self) -> None:
        super().__init__(blocks=4)
        self.bn = nn.BatchNorm1d(16)
        names = dict.fromkeys(["tokens", "bn", *self._modules])
        self._modules = {name: self._modules[name] for name in names}
        self.tokens_seen = torchmetrics.SumMetric()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.tokens(ids).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        self.tokens_seen.update(batch.numel())
        return super().training_step(batch, index)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.counted = self.tokens_seen.compute().item()


def counting(pipeline: dict[str, Any]) -> Any:
    strategy = OverlapStrategy(
        pipeline_parallel=PipelineParallel(**pipeline), cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
    )
    seed_everything(1, verbose=False)
    module = CountsBefore()
    given = {"max_epochs": 1, "limit_train_batches": 3, "use_distributed_sampler": False}
    run = Trainer(**QUIET, **given, accelerator="cpu", devices=2, strategy=strategy)
    run.fit(module, loader(8))
    return module.counted, module.bn.num_batches_tracked.item(), module.bn.running_mean


def counted_by_hand(microbatches: int) -> Any:
    seed_everything(1, verbose=False)
    module = CountsBefore()
    (optimizer,), _ = module.configure_optimizers()
    for batch in itertools.islice(loader(8), 3):
        optimizer.zero_grad()
        for part in batch.tensor_split(microbatches):
            (module.loss(part) * (len(part) / len(batch))).backward()
        optimizer.step()
    return 3 * 8 * 9, module.bn.num_batches_tracked.item(), module.bn.running_mean


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_what_comes_before_the_blocks_counts_once(world, schedule):
    """A rank with several stages comes by it for each: interleaved has the first and the last stage on two ranks, zb_v on one."""
    expected = counted_by_hand(4)
    for found in world(2).run(counting, {"size": 2, "virtual_stages": 2, "schedule": schedule, "microbatches": 4}):
        assert found[:2] == expected[:2]
        torch.testing.assert_close(found[2], expected[2])


def test_fit_twice_and_evaluation_alone(world):
    expected = fit_twice_and_more(False)
    for rank in world(2).run(fit_twice_and_more, True):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["predicted"], expected["predicted"], rtol=1e-4, atol=1e-5)
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["step"] == expected["step"] == 6
