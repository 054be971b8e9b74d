"""What users do in modules and callbacks works as under DDP: the same weights."""

import copy
import gc
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_overlap import ConfigError, OverlapStrategy
from tests.helpers.training import Plain, train


class HalvesGradients(Plain):
    def on_after_backward(self):
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 0.5


class ReplacesGradients(Plain):
    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            if p.grad is not None:
                p.grad = p.grad.sign()


class ClipsByItself(Plain):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)


class StepsByItself(Plain):
    def optimizer_step(self, epoch, index, optimizer, closure):
        closure()
        optimizer.optimizer.step()


class StepsWithAClosure(Plain):
    def optimizer_step(self, epoch, index, optimizer, closure):
        optimizer.optimizer.step(closure=closure)


class NeverZeroes(Plain):
    def optimizer_zero_grad(self, *_):
        pass


class PutsWeightsElsewhere(Plain):
    def on_train_batch_end(self, *_):
        for p in self.up.parameters():
            p.data = p.data * 0.9


class WritesWeights(Plain):
    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.9)

    def on_train_batch_start(self, *_):
        self.down.weight.data.clamp_(-0.2, 0.2)


class KeepsReferences(Plain):
    """Reads and writes weights through a list of its own and through the optimizer's, never through a module."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.kept = [p for p in self.parameters() if p.requires_grad]
        self.read = []

    def on_train_batch_end(self, *_):
        self.read.append(torch.stack([p.detach().norm() for p in self.kept]))
        with torch.no_grad():
            for p in self.kept:
                p.mul_(0.95)

    def on_train_batch_start(self, *_):
        self.read.append(torch.stack(torch._foreach_norm(self.kept)).detach())
        self.kept[0].data.clamp_(-0.2, 0.2)

    def on_before_zero_grad(self, optimizer):
        torch._foreach_mul_([p.data for group in optimizer.param_groups for p in group["params"]], 0.99)


class PenalizesKeptWeights(Plain):
    """Reads weights in the middle of training_step, between modules, through a list."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.kept = [p for p in self.parameters() if p.requires_grad]
        self.read = []

    def training_step(self, batch, index):
        penalty = sum(p.square().sum() for p in self.kept)
        self.read.append(penalty.detach())
        return super().training_step(batch, index) + 0.01 * penalty


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers: eval() puts averages in the place of the weights."""

    def step(self, closure=None):
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p, 0.5)
        return result

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["average"])


class EndsWithAverages(Plain):
    def configure_optimizers(self):
        return Averaging([p for p in self.parameters() if p.requires_grad], 0.1)

    def on_train_end(self):
        self.optimizers().eval()


class ComplexWeights(Plain):
    """Whose gradients are far larger in their imaginary parts."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.phase = nn.Parameter(torch.randn(16, dtype=torch.cfloat))

    def training_step(self, batch, index):
        x = self.embedding(batch)
        return super().training_step(batch, index) + 100 * (x * self.phase).imag.square().mean()


class BackwardInValidation(Plain):
    def validation_step(self, batch, index):
        with torch.enable_grad(), torch.inference_mode(False):
            x = self.embedding(batch.clone())
            self.up(x).sum().backward()


class BackwardOnTheSide(Plain):
    def training_step(self, batch, index):
        self.up(torch.ones(1, 16)).sum().backward()
        return super().training_step(batch, index)


class CopiesItself(Plain):
    def on_train_batch_start(self, *_):
        twin = copy.deepcopy(self.up)
        assert type(twin._parameters) is dict
        assert twin.weight.equal(self.up.weight)
        pickle.dumps(self.attention)


class Codebook(Plain):
    """A buffer that each rank writes from its own data and uses in training."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.register_buffer("mean", torch.zeros(16))

    def training_step(self, batch, index):
        x = self.embedding(batch)
        loss = super().training_step(batch, index) + (self.up(x - self.mean)).square().mean()
        self.mean.mul_(0.5).add_(x.detach().mean((0, 1)), alpha=0.5)
        return loss


class RunningStatistics(Plain):
    """Which torch's kernel writes, and training uses."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.batch_norm = nn.BatchNorm1d(16)

    def training_step(self, batch, index):
        x = self.embedding(batch).flatten(0, 1)
        normal = self.batch_norm(x)
        return super().training_step(batch, index) + (normal * (x - self.batch_norm.running_mean.clone())).square().mean()


class LateCodebook(Codebook):
    """First written in the third step."""

    def training_step(self, batch, index):
        before = self.mean.clone()
        loss = super().training_step(batch, index)
        if index < 2:
            self.mean.copy_(before)
        return loss


class UnfreezesBatchNorm(RunningStatistics):
    def training_step(self, batch, index):
        self.batch_norm.train(index >= 2)
        return super().training_step(batch, index)


class ReplacesABuffer(Codebook):
    def training_step(self, batch, index):
        if index == 2:
            self.mean = self.embedding(batch).detach().mean((0, 1))
        return Plain.training_step(self, batch, index) + self.up(self.embedding(batch) - self.mean).square().mean()


class Sparse(Plain):
    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.extra = nn.Embedding(32, 16, sparse=True)

    def training_step(self, batch, index):
        return super().training_step(batch, index) + self.extra(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class SparseState(Sparse):
    """An optimizer that takes sparse gradients only, and whose step depends on which rows they have."""

    def configure_optimizers(self):
        return torch.optim.SparseAdam([self.extra.weight], 0.1)


class SparseByHand(Sparse):
    """Beside a dense one."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self):
        dense = [p for p in self.parameters() if p.requires_grad and p is not self.extra.weight]
        return [torch.optim.SGD(dense, 0.1), torch.optim.SparseAdam([self.extra.weight], 0.1)]

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


class Recurrent(Plain):
    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.rnn = nn.LSTM(16, 16, batch_first=True)

    def training_step(self, batch, index):
        return super().training_step(batch, index) + self.rnn(self.embedding(batch))[0].square().mean()


class CompiledBlock(Plain):
    def configure_model(self):
        if not hasattr(self, "compiled"):
            self.compiled = torch.compile(nn.Linear(16, 16), backend="eager")

    def training_step(self, batch, index):
        return super().training_step(batch, index) + self.compiled(self.embedding(batch)).square().mean()


class Double(Plain):
    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.double()


class Thaws(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.down)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.down, optimizer, lr=0.1)


class Finetuned(Plain):
    def configure_callbacks(self):
        return [Thaws()]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        (HalvesGradients, {}),
        (HalvesGradients, {"accumulate_grad_batches": 2}),
        (ReplacesGradients, {}),
        (ClipsByItself, {}),
        (StepsByItself, {}),
        (StepsWithAClosure, {}),
        (NeverZeroes, {}),
        (PutsWeightsElsewhere, {}),
        (WritesWeights, {}),
        (BackwardInValidation, {"val_check_interval": 2}),
        (BackwardOnTheSide, {}),
        (CopiesItself, {}),
        (Codebook, {}),
        (RunningStatistics, {}),
        (RunningStatistics, {"val_check_interval": 2}),
        (LateCodebook, {}),
        (UnfreezesBatchNorm, {}),
        (ReplacesABuffer, {}),
        (Sparse, {}),
        (Sparse, {"data": {"distributed_optimizer": False}, "accumulate_grad_batches": 2}),
        (SparseState, {}),
        (SparseByHand, {}),
        (Recurrent, {}),
        (CompiledBlock, {}),
        (Double, {}),
        (EndsWithAverages, {}),
        (ComplexWeights, {"gradient_clip_val": 0.5}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_as_under_ddp(world, module, trainer):
    ours = world(2).run(trained, module, {"name": "overlap", **trainer})
    ddp = world(2).run(trained, module, {"name": "ddp", **trainer})
    assert ours[0]["hash"] == ours[1]["hash"], "the same weights on every rank"
    # The same sums in another order.
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(ddp[0]["weights"]), rtol=1e-4, atol=2e-5)


def trained(module, kwargs):
    return train(module=module, optimizer="sgd", **kwargs)


@pytest.mark.parametrize("module", [KeepsReferences, PenalizesKeptWeights])
@pytest.mark.parametrize("trainer", [{}, {"data": {"param_gather_prefetch": 1}}, {"precision": "bf16-true"}], ids=str)
def test_weights_are_complete_through_references_that_were_kept(world, module, trainer):
    on = world(2).run(read_and_trained, module, trainer)
    off = world(2).run(read_and_trained, module, {**trainer, "overlap": "off"})
    assert on[0] == on[1] == off[0], "every read and every weight, bit by bit"
    if not trainer:
        ddp = world(2).run(read_and_trained, module, {"name": "ddp"})
        torch.testing.assert_close(torch.tensor(on[0][1]), torch.tensor(ddp[0][1]), rtol=1e-4, atol=2e-5)


def read_and_trained(module, kwargs):
    made = module()
    result = train(module=lambda _: made, optimizer="sgd", **kwargs)
    assert {type(p) for p in made.parameters()} == {nn.Parameter}
    return result["hash"], result["weights"], [values.tolist() for values in made.read]


class ZeroesAWeight(Plain):
    """Of 16 bits, whose fp32 main parameter must follow."""

    def on_train_batch_end(self, *_):
        self.kept = getattr(self, "kept", None) or list(self.parameters())
        for p in self.kept:
            p.data[:4] = 0.5

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-8)


def test_writes_reach_main_parameters(world):
    for result in world(2).run(zeroed):
        assert result == 1.0


def zeroed():
    made = ZeroesAWeight()
    train(module=lambda _: made, precision="bf16-true")
    return min((p.detach()[:4] == 0.5).float().mean().item() for p in made.parameters())


class WritesThroughAView(Plain):
    def on_train_start(self):
        self.view = self.up.weight.detach()

    def on_train_batch_end(self, *_):
        self.view.mul_(0.9)


def test_a_write_that_an_update_overwrites_is_an_error(world):
    for message in world(2).run(write_through_a_view):
        assert message.startswith("up.weight was written through an earlier view of it"), message
    world(2).close()  # its transfers were left in the middle


def write_through_a_view():
    try:
        train(module=WritesThroughAView, data={"bucket_size": 1})
    except ValueError as error:
        return str(error)
    return ""


def test_what_a_callback_unfreezes_is_reduced(world):
    # Compared with one process: DDP does not reduce what was frozen when it wrapped the module.
    epochs = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}
    ours, one = (world(size).run(trained, Finetuned, epochs) for size in (2, 1))
    assert ours[0]["hash"] == ours[1]["hash"]
    assert "Thaws adds parameters during training" in ours[0]["plan"]
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(one[0]["weights"]), rtol=1e-4, atol=2e-5)


class ScalesRows(Plain):
    """In the forward of an embedding."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.embedding.max_norm = 1.0


def test_a_forward_that_writes_weights_is_refused(world):
    for message in world(2).run(scale_rows):
        assert message.startswith("embedding has max_norm, so forward writes the weight"), message


def scale_rows():
    with pytest.raises(ConfigError) as caught:
        train(module=ScalesRows)
    return str(caught.value)


class Reuses(Plain):
    """The same optimizer object in each fit."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.made = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)

    def configure_optimizers(self):
        return self.made


def fitted_twice(name, path):
    """Weights after two fits by one Trainer; and after a checkpoint that was saved between fits was loaded by a third."""
    torch.manual_seed(1)
    module = Reuses()
    first = train(module=lambda _: module, name=name, made=(trainer := []), max_steps=3)
    trainer[0].save_checkpoint(path)
    trainer[0].fit_loop.epoch_loop.max_steps = 6
    trainer[0].fit(module)
    twice = torch.cat([p.detach().flatten() for p in module.parameters()])
    resumed = train(module=lambda _: Reuses(), name=name, resume=path, max_steps=6)
    assert type(module.up._parameters) is dict
    assert first["step"] == 3
    return twice.tolist(), resumed["weights"], torch.load(path, weights_only=True)["optimizer_states"][0]["state"]


def test_fit_again_and_save_after_fit(world, tmp_path):
    ours = world(2).run(fitted_twice, "overlap", tmp_path / "overlap.ckpt")
    ddp = world(2).run(fitted_twice, "ddp", tmp_path / "ddp.ckpt")
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(torch.tensor(ours[0][0]), torch.tensor(ddp[0][0]), **close)
    torch.testing.assert_close(torch.tensor(ours[0][1]), torch.tensor(ddp[0][1]), **close)
    assert ours[0][2].keys() == ddp[0][2].keys()
    for key, value in ddp[0][2].items():
        torch.testing.assert_close(ours[0][2][key]["momentum_buffer"], value["momentum_buffer"], **close)


def connections_after(trainers):
    for _ in range(trainers):
        train(module=Plain, max_steps=1)
    gc.collect()
    # gloo has a thread for each group of connections.
    return sum(Path(f"/proc/self/task/{thread}/comm").read_text().startswith("gloo_tcp") for thread in os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_trainers_that_are_let_go_of_leave_no_connections(world):
    before = world(2).run(connections_after, 0)
    after = world(2).run(connections_after, 3)
    assert all(now <= earlier for now, earlier in zip(after, before, strict=True))  # some of an earlier failure may end meanwhile


class AsksForTheState(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.optimizers[0].state_dict()


def test_the_state_of_a_shard_is_not_taken_for_the_whole(world):
    for message in world(2).run(ask_for_the_state):
        assert "sharded over the ranks; trainer.save_checkpoint()" in message


def ask_for_the_state():
    with pytest.raises(ConfigError) as caught:
        train(module=Plain, callbacks=[AsksForTheState()])
    return str(caught.value)


def test_a_trainer_can_be_sent_to_other_processes():
    trainer = Trainer(strategy=OverlapStrategy(start_method="spawn"), accelerator="cpu", devices=2, logger=False)
    trainer.strategy.connect(LightningModule())
    again = pickle.loads(pickle.dumps(trainer.strategy))
    assert again.precision_plugin.main_params.__self__ is again
    assert not dist.is_initialized()
