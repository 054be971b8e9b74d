"""What users do in modules and callbacks works as under DDP: the same weights."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

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


def test_what_a_callback_unfreezes_is_reduced(world):
    # Compared with one process: DDP does not reduce what was frozen when it wrapped the module.
    epochs = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}
    ours, one = (world(size).run(trained, Finetuned, epochs) for size in (2, 1))
    assert ours[0]["hash"] == ours[1]["hash"]
    assert "Thaws adds parameters during training" in ours[0]["plan"]
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(one[0]["weights"]), rtol=1e-4, atol=2e-5)
