"""Trains models with experts as one rank of a world, or alone, on the same batches."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from tests.helpers.experts import VOCABULARY, tiny
from tests.helpers.sequences import train


class Hugging(LightningModule):
    """An ordinary module around a model of transformers.

    Args:
        name: as in :func:`tests.helpers.experts.tiny`.
        optimizer: ``sgd``, or ``adamw`` with decay.
        packed: whether a sample is two documents.
        changes: of the model's settings.
    """

    def __init__(self, name: str, optimizer: str = "sgd", packed: bool = False, **changes: Any) -> None:
        super().__init__()
        self.model = tiny(name, **changes, **({"use_cache": False} if packed else {}))  # with a cache, transformers sees no borders
        self.packed = packed
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(**self.inputs(batch)).loss
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.model(**self.inputs(batch)).loss, sync_dist=True)

    def inputs(self, batch: Tensor) -> dict[str, Tensor]:
        """Arguments of the model."""
        borders = torch.cat([torch.arange(5), torch.arange(batch.shape[1] - 5)]).expand_as(batch)
        return {"input_ids": batch, "labels": batch, **({"position_ids": borders} if self.packed else {})}

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(tokens: int = 12) -> list[Tensor]:
    """40 samples."""
    return list(torch.randint(1, VOCABULARY, (40, tokens), generator=torch.Generator().manual_seed(3)))


def fit(strategy: dict[str, Any] | None, name: str, model: dict[str, Any] | None = None, **trainer: Any) -> Any:
    """Trains as one rank of the world, or alone (``strategy`` is None)."""
    return train(strategy, Hugging, {"name": name, **(model or {})}, {}, samples=batches, **trainer)


def compare(ranks: list[Any], expected: Any, tolerance: float = 1e-5) -> None:
    """The ranks' mean losses, validation losses and weights are those of one process."""
    losses = torch.tensor([each["losses"] for each in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=tolerance, atol=tolerance)
    for each in ranks:
        torch.testing.assert_close(each["val_loss"], expected["val_loss"], rtol=tolerance, atol=tolerance)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                each["weights"][name], weight, rtol=10 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
