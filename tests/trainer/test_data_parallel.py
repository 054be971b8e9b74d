"""Training through Trainer: equal with overlap on and off, close to DDP and to one process."""

import os
import re
import signal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn

from lightning_overlap import ConfigError
from lightning_overlap.modes.data import buckets
from tests.helpers.training import Net, Plain, train


class ReadsGradients(Plain):
    def on_before_optimizer_step(self, optimizer):
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())


SETTINGS = [
    {},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"optimizer": "sgd"},
    {"optimizer": "adafactor"},
    {"data": {"distributed_optimizer": False}},
    {"data": {"overlap_optimizer_step": False}},
    {"data": {"param_gather_prefetch": 1}},
    {"data": {"reduce_scatter_with_fp32_accumulation": True}},
    {"data": {"grad_reduce_dtype": "param"}, "precision": "bf16-true"},
    {"data": {"average_in_collective": False}},
    {"data": {"check_for_nan_in_grad": True}},
    {"val_check_interval": 2},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_overlap_changes_no_number(world, setting):
    on = run(world(2), Net, {**setting, "max_steps": 20 if not setting else 6})
    off = run(world(2), Net, {**setting, "max_steps": 20 if not setting else 6, "overlap": "off"})
    assert on[0]["losses"] == off[0]["losses"]
    assert {r["hash"] for r in on} == {off[0]["hash"]}, "the same weights on every rank, with overlap and without"
    assert on[0]["types"] == ["dict"], "all modules are ordinary ones again after fit"


def run(world, module, setting):
    return world.run(run_one, module, setting)


def run_one(module, setting):
    return train(module=module, **setting)


@pytest.mark.parametrize(
    "setting", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}], ids=str
)
def test_close_to_ddp(world, setting):
    # The attention's key bias has a gradient of zero but for rounding, which Adam would make a step of: so SGD.
    setting = {**setting, "optimizer": "sgd"}
    ours, ddp = run(world(2), Plain, setting), run(world(2), Plain, {**setting, "name": "ddp"})
    assert ours[0]["keys"] == ddp[0]["keys"]
    # The same sums, in another order.
    torch.testing.assert_close(torch.tensor(ours[0]["losses"]), torch.tensor(ddp[0]["losses"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(ddp[0]["weights"]), rtol=1e-4, atol=2e-5)
    assert ours[0]["metrics"].keys() == ddp[0]["metrics"].keys()


@pytest.mark.parametrize("size", [2, 4])
def test_close_to_one_process_on_the_whole_batch(world, size):
    ours, one = run(world(size), Plain, {"optimizer": "sgd"}), run(world(1), Plain, {"optimizer": "sgd"})
    losses = torch.tensor([r["losses"] for r in ours]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(one[0]["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(one[0]["weights"]), rtol=1e-5, atol=1e-6)


class Terminated(Plain):
    """SIGTERM arrives on the last rank in the third batch."""

    def training_step(self, batch, index):
        if index == 2 and self.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, index)


def test_sigterm_stops_all_ranks_together(world):
    stops = world(2).run(terminated)
    assert stops[0] == stops[1]
    assert 3 <= stops[0][0] <= 5, "a batch or two after the signal"
    assert stops[0][1] == "dict", "all modules are ordinary ones again"


def terminated():
    module = Terminated()
    with pytest.raises(SystemExit):
        train(module=lambda _: module, max_steps=12)
    return len(module.losses), type(module.up._parameters).__name__


def test_four_ranks_as_two_instances(world):
    settings = {"data": {"num_optimizer_instances": 2}, "optimizer": "sgd"}
    on, off = run(world(4), Net, settings), run(world(4), Net, {**settings, "overlap": "off"})
    assert on[0]["losses"] == off[0]["losses"]
    assert {r["hash"] for r in on} == {off[0]["hash"]}
    one = run(world(4), Net, {"optimizer": "sgd"})
    # Another order of summing over four ranks.
    torch.testing.assert_close(torch.tensor(on[0]["weights"]), torch.tensor(one[0]["weights"]), rtol=1e-4, atol=2e-5)


class Scattered(Plain):
    """Layers are registered in another order than they run in."""

    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(40))

    def training_step(self, batch, index):
        x = self.embedding(batch)
        for i in range(40):
            x = x + 0.1 * self.layers[i * 7 % 40](x).relu()
        return super().training_step(batch, index) + x.square().mean()


@pytest.mark.parametrize(
    ("size", "setting"),
    [
        (2, {}),
        (2, {"precision": "bf16-true"}),
        (2, {"optimizer": "adafactor"}),
        (2, {"accumulate_grad_batches": 2}),
        (2, {"data": {"distributed_optimizer": False}}),
        (4, {"data": {"num_optimizer_instances": 2}}),
    ],
    ids=str,
)
def test_buckets_follow_a_scattered_order(world, size, setting, recwarn):
    on = world(size).run(relaid, setting)
    off = world(size).run(relaid, {**setting, "overlap": "off"})
    kept = world(size).run(relaid, {**setting, "keep": True})
    assert on[0][1] == off[0][1] == 1, "rebuilt once"
    assert kept[0][1] == 0
    assert {r[0]["hash"] for r in on} == {off[0][0]["hash"]}
    if size == 2 and setting.get("optimizer") != "adafactor":
        # Two summands have one sum, whoever adds them.
        assert on[0][0]["hash"] == kept[0][0]["hash"], "the optimizer's state has moved along"
    torch.testing.assert_close(torch.tensor(on[0][0]["weights"]), torch.tensor(kept[0][0]["weights"]), rtol=1e-2, atol=1e-2)


def relaid(setting):
    setting = dict(setting)
    worth = 2.0 if setting.pop("keep", False) else buckets.MIN_GAIN
    with (
        mock.patch.object(buckets, "MIN_GAIN", worth),
        mock.patch.object(buckets.Buckets, "build", autospec=True, side_effect=buckets.Buckets.build) as built,
    ):
        result = train(module=Scattered, **setting)
    return result, built.call_count - 1


class RankDependent(Net):
    """Each rank uses another one of two layers, so that ranks see their gradients in different orders."""

    def training_step(self, batch, index):
        if self.global_rank == index % 2:
            return super().training_step(batch, 1)
        x = self.unused(self.embedding(batch)[..., :4])
        return super().training_step(batch, 0) + x.square().mean()


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (2, {}),
        (2, {"param_gather_prefetch": 1}),
        (2, {"distributed_optimizer": False}),
        (4, {"num_optimizer_instances": 2}),
    ],
    ids=str,
)
def test_ranks_may_see_different_orders(world, size, data):
    on = run(world(size), RankDependent, {"data": data})
    off = run(world(size), RankDependent, {"data": data, "overlap": "off"})
    assert {r["hash"] for r in on} == {off[0]["hash"]}


def test_hooks_read_whole_gradients(world):
    ours, ddp = run(world(2), ReadsGradients, {}), run(world(2), ReadsGradients, {"name": "ddp"})
    assert "all-reduce" in ours[0]["plan"]
    assert ours[0]["metrics"]["norm"] == pytest.approx(ddp[0]["metrics"]["norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("saver", "loader", "precision"),
    [
        ("overlap", "overlap", "32-true"),
        # Only with ourselves: DDP steps bf16 parameters themselves, ours fp32 main parameters.
        ("overlap", "overlap", "bf16-true"),
        ("overlap", "ddp", "32-true"),
        ("ddp", "overlap", "32-true"),
    ],
)
def test_resume(world, tmp_path, saver, loader, precision):
    path = str(tmp_path / "half.ckpt")
    setting = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3, "limit_val_batches": 0, "precision": precision}
    whole = run(world(2), Plain, {**setting, "name": loader})
    world(2).run(save_half, {**setting, "name": saver, "max_epochs": 1}, path)
    resumed = run(world(2), Plain, {**setting, "name": loader, "resume": path})
    assert resumed[0]["step"] == whole[0]["step"] == 6
    torch.testing.assert_close(torch.tensor(resumed[0]["losses"]), torch.tensor(whole[0]["losses"][3:]), rtol=1e-5, atol=1e-5)
    if saver == loader:
        assert resumed[0]["hash"] == whole[0]["hash"]


def save_half(setting, path):
    from lightning.pytorch import Callback

    class Save(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(path)

    return train(module=Plain, callbacks=[Save()], **setting)


def test_ranks_that_disagree_are_told(world):
    messages = world(2).run(disagree)
    assert messages[0] == messages[1]
    assert "ranks disagree about data_parallel.bucket_size: rank 0 has 500, rank 1 has 501." in messages[0]


def disagree():
    try:
        train(data={"bucket_size": 500 + dist.get_rank()})
    except ValueError as error:
        return str(error)
    return ""


class LooksAtGradients(Callback):
    def on_after_backward(self, trainer, module): ...


def test_ranks_whose_callbacks_differ_are_told(world):
    messages = world(2).run(differ)
    assert messages[0] == messages[1]
    assert "ranks disagree about gradient_readers: rank 0 has ('LooksAtGradients.on_after_backward',)" in messages[0]


def differ():
    with pytest.raises(ConfigError) as caught:
        train(callbacks=[LooksAtGradients()] if dist.get_rank() == 0 else [])
    return str(caught.value)


class Manual(Plain):
    """Two optimizers, toggled."""

    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = [*self.embedding.parameters(), *self.attention.parameters()]
        second = [*self.up.parameters(), *self.down.parameters(), *self.norm.parameters()]
        return [torch.optim.SGD(first, 0.1), torch.optim.Adam(second, 1e-2)]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return loss


def test_manual_optimization(world):
    ours, ddp = run(world(2), Manual, {}), run(world(2), Manual, {"name": "ddp"})
    torch.testing.assert_close(torch.tensor(ours[0]["weights"]), torch.tensor(ddp[0]["weights"]), rtol=1e-4, atol=2e-5)
    assert ours[0]["hash"] == ours[1]["hash"]


class SecondGradient(Plain):
    """A shared layer under reentrant checkpoints has two gradients in one backward."""

    def training_step(self, batch, index):
        from torch.utils.checkpoint import checkpoint

        x = self.embedding(batch)
        for _ in range(2):
            x = checkpoint(lambda y: self.down(self.up(y)), x, use_reentrant=True)
        return x.square().mean()


def test_a_second_use_in_one_backward_is_refused(world):
    for message in world(2).run(second_gradient):
        assert re.search("got a second gradient in one backward|was read in backward after the optimizer had updated it", message)
        assert "use_reentrant=False" in message
    world(2).close()  # its transfers were left in the middle


def second_gradient():
    try:
        train(module=SecondGradient, data={"bucket_size": 1})
    except ValueError as error:
        return str(error)
    return ""
