"""A model of the zoo with its data, and the layouts that it is trained under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import default_collate

from lightning_overlap import ContextParallel, DataParallel, ExpertParallel, PipelineParallel, TensorParallel

STEPS, BATCH, MICROBATCHES = 4, 8, 4
VOCABULARY, TOKENS, WIDTH = 64, 8, 16

Reading = Callable[..., Any]

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"data_parallel": DataParallel(bucket_size=500)},
    "dp_whole_optimizer": {"data_parallel": DataParallel(bucket_size=500, distributed_optimizer=False)},
    "pp": {"pipeline_parallel": PipelineParallel(size=2, microbatches=MICROBATCHES, schedule="eager_1f1b")},
    "pp_interleaved": {"pipeline_parallel": PipelineParallel(size=2, microbatches=MICROBATCHES, virtual_stages=2)},
    "pp_zb_v": {"pipeline_parallel": PipelineParallel(size=2, microbatches=MICROBATCHES, virtual_stages=2, schedule="zb_v")},
    "tp": {"tensor_parallel": TensorParallel(size=2, vocab_parallel=False)},
    "tp_whole_tokens": {"tensor_parallel": TensorParallel(size=2, vocab_parallel=False, sequence_parallel=False)},
    "cp": {"context_parallel": ContextParallel(size=2)},
    "cp_a2a": {"context_parallel": ContextParallel(size=2, method="a2a", boundary="blocks")},
    "tp_vocab": {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True)},
    "ep": {"data_parallel": DataParallel(bucket_size=500), "expert_parallel": ExpertParallel(size=2)},
}
"""Layouts of two ranks, by name: the arguments of the strategy. What a name begins with is its family."""
HAVE_OTHER_SAMPLES = ("dp", "ep")
"""Families in which each rank sees other samples."""


def next_tokens(seed: int = 3) -> list[Tensor]:
    """Samples of token ids, one more than the model reads: enough for all steps and a validation. None is padding, or special."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY, ((STEPS + 1) * BATCH, TOKENS + 1), generator=generator))


class Task(LightningModule):
    """What all models of the zoo share: SGD, and the same loss in training and validation."""

    lr = 0.1

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> Any:
        loss = self.loss(batch).detach()
        self.log("val_loss", loss, sync_dist=True, batch_size=BATCH)
        return loss

    def configure_optimizers(self) -> Any:
        # AdamW would hide gradients that are off by a factor.
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr, momentum=0.9)


@dataclass(frozen=True)
class Model:
    """A model of the zoo.

    Attributes:
        make: makes the module.
        data: by name, what gives its samples.
        collate: makes a batch of samples.
        plan: the strategy's ``parallel_plan``.
        random: it draws random numbers in training, so that its numbers can be compared between ranks only.
        has_experts: it has experts: the layout ``ep`` is for such models only.
    """

    make: Callable[[], LightningModule]
    data: Mapping[str, Callable[[], list[Any]]] = field(default_factory=lambda: {"plain": next_tokens})
    collate: Callable[[list[Any]], Any] = default_collate
    plan: Mapping[str, str] | None = None
    random: bool = False
    has_experts: bool = False
