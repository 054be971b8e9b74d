"""Evaluation under context parallelism, inside and outside of a fit: the numbers of one process."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap import OverlapStrategy
from tests.helpers.models import Transformer, token_loader
from tests.helpers.sequences import QUIET


class Net(Transformer):
    """Validation reads the logits, too, as a metric would."""

    def logits(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def validation_step(self, batch: Tensor, index: int) -> None:
        logits, labels = self.logits(batch), batch[:, 1:]
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), labels.flatten()), sync_dist=True)
        self.log("accuracy", (logits.argmax(-1) == labels).float().mean(), sync_dist=True)
        self.log("largest", logits.max(), sync_dist=True, reduce_fx="max")

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return self.logits(batch)


def evaluate(ranks: int) -> dict[str, Any]:
    """Everything that a Trainer tells of a model, before, in and after a fit."""
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if ranks > 1:
        environment = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(context_parallel=ranks, **environment)
    run = Trainer(accelerator="cpu", devices=ranks, strategy=strategy, max_steps=4, val_check_interval=4, **QUIET)  # type: ignore[arg-type]
    module, loader = Net(), token_loader(4)
    results: dict[str, Any] = {"before": run.validate(module, loader, verbose=False)}
    run.fit(module, loader, loader)
    results["in a fit"] = {name: float(value) for name, value in run.callback_metrics.items()}
    results["after"] = [*run.validate(module, loader, verbose=False), *run.test(module, loader, verbose=False)]
    results["predictions"] = torch.cat(run.predict(module, loader))  # type: ignore[arg-type]
    return results


def test_all_that_a_trainer_tells(world: Any) -> None:
    expected = evaluate(1)
    assert {"val_loss", "accuracy", "largest", "loss"} <= expected["in a fit"].keys()
    for results in world(2).run(evaluate, 2):
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
