"""User code reads and writes weights through references and views: reads are complete, and no write is lost."""

import pytest
import torch
from torch import nn

from lightning_overlap import ConfigError
from tests.helpers.training import Plain, train


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
    torch.manual_seed(0)  # whatever ran before in this world
    made = module()
    result = train(module=lambda _: made, optimizer="sgd", **kwargs)
    assert {type(p) for p in made.parameters()} == {nn.Parameter}
    return result["hash"], result["weights"], [values.tolist() for values in made.read]


class ZeroesAWeight(Plain):
    """Of 16 bits, whose fp32 main parameter must follow: an update of one that did not would bring the weights of before back."""

    def on_train_batch_end(self, *_):
        self.kept = getattr(self, "kept", None) or list(self.parameters())
        for p in self.kept if self.global_step == 1 else ():
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
