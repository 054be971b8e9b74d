"""Bytes a rank holds for model, gradients and optimizer: the formula, measured."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests.helpers.training import Plain, train


class Large(Plain):
    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def training_step(self, batch, index):
        x = self.embedding(batch).repeat(1, 1, 16)
        for layer in self.layers:
            x = layer(x)
        return super().training_step(batch, index) + x.float().square().mean()


class Weigh(Callback):
    def on_train_end(self, trainer, module):
        (mode,) = trainer.strategy.modes
        state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        flat = [t for b in mode.buckets.live for t in (b.data, b.grads, b.main) if t is not None]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        tensors = [*module.parameters(), *gradients, *flat, *state, *(s.parameter for b in mode.buckets.live for s in b.segments)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.bytes = sum(storages.values()) / sum(p.numel() for p in module.parameters())


def bytes_a_parameter(precision):
    weigh = Weigh()
    train(module=Large, optimizer="adamw", precision=precision, data={"bucket_size": 50_000}, callbacks=[weigh], max_steps=3)
    return weigh.bytes


@pytest.mark.parametrize(("precision", "formula"), [("32-true", 8 + 8 / 4), ("bf16-true", 6 + 12 / 4)])
def test_bytes_of_one_of_four_ranks(world, precision, formula):
    for measured in world(4).run(bytes_a_parameter, precision):
        assert measured == pytest.approx(formula, rel=0.1)
