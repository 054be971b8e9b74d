"""Whoever replaces a method of Lightning's, to count its calls or to do it another way, sees the calls that DDPStrategy makes."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.training import strategy
from tests.trainer.test_first_step import PIPELINE, fit
from tests.trainer.test_first_step import Net as CutNet

BATCHES = 4


class Automatic(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.order = []

    def training_step(self, batch, index):
        return self.layers(batch).square().mean()

    def on_before_backward(self, loss):
        self.order.append("before")

    def on_after_backward(self):
        self.order.append("after" if all(p.grad is not None for p in self.parameters()) else "after, incomplete")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(
            torch.randn(BATCHES * 4, 4, generator=torch.Generator().manual_seed(1)), batch_size=4 // dist.get_world_size()
        )


class Manual(Automatic):
    """Two optimizers; the second's step is of two backwards of one graph."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        first.step()
        first.zero_grad()
        loss = super().training_step(batch, index)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        second.step()
        second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


class Closures(Automatic):
    """Backward runs inside of the optimizer's step, twice."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()

        def closure():
            for _ in range(2):
                self.manual_backward(Automatic.training_step(self, batch, index))

        optimizer.step(closure=closure)
        optimizer.zero_grad()


def trainer_of(name, **arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    plan = strategy(name, {"overlap_optimizer_step": False}, "auto", {})
    run = {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": plan, "max_epochs": 1}
    return Trainer(**{**run, **quiet, **arguments})


def counted(name, kind, accumulate=1):
    """How often ``Strategy.backward`` was called in a fit, the order of the hooks around it, and the weights."""
    seed_everything(2, verbose=False)  # samplers of ranks draw with it
    module, trainer = kind(), trainer_of(name, accumulate_grad_batches=accumulate)
    with patch.object(Strategy, "backward", wraps=trainer.strategy.backward) as backward:
        trainer.fit(module)
    return backward.call_count, module.order, trainer.global_step, torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "accumulate", "calls"),
    [(Automatic, 1, BATCHES), (Automatic, 2, BATCHES), (Manual, 1, 3 * BATCHES), (Closures, 1, 2 * BATCHES)],
)
def test_a_replaced_backward_is_called_as_by_ddp(world, size, kind, accumulate, calls):
    plain, ours = (world(size).run(counted, name, kind, accumulate) for name in ("ddp", "overlap"))
    for (count, order, steps, weights), (plain_count, plain_order, plain_steps, plain_weights) in zip(ours, plain, strict=True):
        assert count == plain_count == calls
        assert order == plain_order == ["before", "after"] * calls
        assert steps == plain_steps
        torch.testing.assert_close(weights, plain_weights)


def counted_in_stages():
    counts = []
    run = Trainer.fit

    def fit_counted(self, *args, **kwargs):
        with patch.object(Strategy, "backward", wraps=self.strategy.backward) as backward:
            run(self, *args, **kwargs)
        counts.append((backward.call_count, self.global_step))

    with patch.object(Trainer, "fit", fit_counted):
        fit(CutNet, PIPELINE, 2)
    return counts


def test_a_step_in_microbatches_calls_it_once(world):
    """As DDPStrategy does for the batch: the microbatches' own backwards are the schedule's."""
    assert world(2).run(counted_in_stages) == [[(2, 2)]] * 2


class Recording(CheckpointIO):
    def __init__(self):
        self.calls = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.calls.append((path, storage_options))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return {}

    def remove_checkpoint(self, path):
        pass


def saved(name, folder):
    """What a ``CheckpointIO`` is called with, and a function in the place of Lightning's."""
    plugin, path = Recording(), folder / "a.ckpt"
    trainer = trainer_of(name, plugins=[plugin])
    trainer.fit(Automatic())
    trainer.save_checkpoint(path, storage_options={"key": 1})
    trainer.save_checkpoint(path)
    trainer = trainer_of(name)
    trainer.fit(Automatic())
    with patch.object(TorchCheckpointIO, "save_checkpoint") as save:
        trainer.save_checkpoint(path, storage_options="words")
        trainer.save_checkpoint(path)
    return plugin.calls, [(call.args[1], call.kwargs) for call in save.call_args_list]


@pytest.mark.parametrize("size", [1, 2])
def test_storage_options_reach_what_saves_as_under_ddp(world, tmp_path, size):
    plain, ours = (world(size).run(saved, name, tmp_path) for name in ("ddp", "overlap"))
    path = tmp_path / "a.ckpt"
    of_plugin, of_replaced = ours[0]
    assert of_plugin == [(path, {"key": 1}), (path, None)]
    assert of_replaced == [(path, {"storage_options": "words"}), (path, {"storage_options": None})]
    assert ours == plain


def refused(name, folder):
    trainer = trainer_of(name)
    trainer.fit(Automatic())
    with pytest.raises(TypeError) as raised:
        trainer.save_checkpoint(folder / "a.ckpt", storage_options={"key": 1})
    return str(raised.value)


def test_storage_options_without_a_plugin_are_refused_as_by_ddp(world, tmp_path):
    ours, plain = (world(1).run(refused, name, tmp_path)[0] for name in ("overlap", "ddp"))
    assert all("`storage_options` arg" in words for words in (ours, plain))
    assert world(2).run(refused, "overlap", tmp_path) == [ours] * 2
