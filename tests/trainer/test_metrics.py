"""Metrics and what is logged count each sample once, whichever ranks have seen it."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_overlap import OverlapStrategy
from tests.helpers.sequences import QUIET
from tests.trainer.tensor.test_numbers import Net

SAMPLES = 8


class Counting(Net):
    """Counts samples in every way that users do, and keeps what it has counted at the ends of epochs."""

    def __init__(self, pipeline: bool) -> None:
        super().__init__(tokens=8)
        self.pipeline = pipeline
        self.logged, self.computed, self.late = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.unregistered: dict[str, torchmetrics.SumMetric] = {}
        for name in ("fitted", "validated", "tested"):
            self.logged[name] = torchmetrics.SumMetric()
            collection = torchmetrics.MetricCollection({"sum": torchmetrics.SumMetric(), "cat": torchmetrics.CatMetric()})
            both: Any = torchmetrics.SumMetric() + torchmetrics.SumMetric()
            self.computed[name] = nn.ModuleList([collection, both])
            self.unregistered[name] = torchmetrics.SumMetric()
        self.counted: dict[str, list[float]] = {}

    def on_train_start(self) -> None:
        self.late.update({name: torchmetrics.SumMetric() for name in ("fitted", "validated")})

    def count(self, batch: Tensor, name: str) -> None:
        ones = torch.ones(len(batch))
        late = [self.late[name]] if name in self.late else []
        for metric in (self.logged[name], *self.computed[name], self.unregistered[name], *late):
            metric.update(ones)
        self.log(f"{name}_metric", self.logged[name], on_step=False, on_epoch=True)
        self.log(f"{name}_sum", float(len(batch)), reduce_fx="sum", sync_dist=True, on_step=False, on_epoch=True)
        for metric in late:
            self.log(f"{name}_late", metric, on_step=False, on_epoch=True)

    def ended(self, name: str) -> None:
        collection, both = self.computed[name]
        gathered = self.all_gather(torch.ones(3))
        self.counted[name] = [
            float(collection.compute()["sum"]),
            float(collection.compute()["cat"].numel()),
            float(both.compute()) / 2,
            # A pipeline updates what is not registered on its last stage only.
            *([] if self.pipeline else [float(self.unregistered[name].compute())]),
            float(gathered.flatten(0, 1).numel() * SAMPLES / 3) / self.data_ranks,
        ]
        for metric in (collection, both, self.unregistered[name]):
            metric.reset()

    data_ranks = 1

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.count(batch, "fitted")
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.count(batch, "validated")

    def test_step(self, batch: Tensor, index: int) -> None:
        self.count(batch, "tested")

    def on_train_epoch_end(self) -> None:
        self.ended("fitted")

    def on_validation_epoch_end(self) -> None:
        self.ended("validated")

    def on_test_epoch_end(self) -> None:
        self.ended("tested")

    def loader(self) -> DataLoader:
        return DataLoader(torch.zeros(SAMPLES, self.length + 1, dtype=torch.long), batch_size=2)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch)


def counts(strategy: dict[str, Any] | None) -> Any:
    """All that was counted, in the order of the runs: each is to be the number of samples."""
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    module = Counting("pipeline_parallel" in (strategy or {}))
    if strategy is not None:
        # Which computes the first batch twice more, and cannot know of metrics that are not registered.
        chosen = OverlapStrategy(
            **strategy, verify_first_step=False, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
        )
        module.data_ranks = chosen.config.degrees(dist.get_world_size()).data
    devices = 1 if strategy is None else dist.get_world_size()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=chosen,
        max_epochs=1,
        num_sanity_val_steps=0,
        **QUIET,  # type: ignore[arg-type]
    )
    found: dict[str, Any] = {}

    def keep(run: str) -> None:
        found[run] = {k: float(v) for k, v in trainer.callback_metrics.items()}, dict(module.counted)
        module.counted.clear()

    for run in ("validate", "fit", "test", "validate"):
        getattr(trainer, run)(module, **({} if run == "fit" else {"verbose": False}))
        keep(run)
    found["predictions"] = sum(len(part) for part in trainer.predict(module) or ()) * module.data_ranks
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor_parallel": 2}),
    "pipeline": (2, {"pipeline_parallel": 2}),
    "data x tensor": (4, {"tensor_parallel": 2}),
    "data x pipeline": (4, {"pipeline_parallel": 2}),
    "data": (2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_is_counted_once(world: Any, layout: str) -> None:
    size, strategy = LAYOUTS[layout]
    for found in world(size).run(counts, strategy):
        assert found.pop("predictions") == SAMPLES
        for run, (logged, counted) in found.items():
            assert set(logged.values()) == {SAMPLES}, (run, logged)
            assert counted
            assert all(set(each) == {SAMPLES} for each in counted.values()), (run, counted)
