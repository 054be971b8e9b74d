"""In a pipeline, what user code does to weights of other stages, and their optimizer state: nothing, and no memory."""

import warnings
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback

from lightning_overlap import ConfigError
from lightning_overlap.strategy import seams as optimization
from tests.helpers.pipelined import pipelined


class WritesWeights(Callback):
    """Clamps, averages and scales all weights, in place and in slices."""

    @torch.no_grad()
    def on_train_start(self, trainer, module):
        for p in module.parameters():
            p.clamp_(-0.3, 0.3)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        weights = list(module.parameters())
        torch._foreach_mul_(weights, 0.99)
        for p in weights:
            p.data[:2].clamp_(max=0.2)
            p.lerp_(torch.ones_like(p), 0.01)
        module.head.weight /= module.head.weight.norm(dim=1, keepdim=True)


def test_writes_to_weights_go_where_they_are(world):
    one = world(1).run(written, {"size": 1, "microbatches": 4})[0]
    for result in world(2).run(written, {"size": 2, "microbatches": 4}):
        torch.testing.assert_close(result["weights"], one["weights"], rtol=1e-6, atol=1e-6)


def written(pipeline):
    return pipelined(pipeline, {"optimizer": "sgd", "blocks": 4}, callbacks=[WritesWeights()])


class ClipsByHand(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)


class LogsANorm(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norm = sum(p.grad.norm() for p in module.parameters() if p.grad is not None)


def test_a_norm_over_a_part_of_the_gradients_is_not_taken_for_the_whole(world):
    for refusal, warned in world(2).run(clipped_by_hand):
        assert "ClipsByHand.on_before_optimizer_step clips by the norm of this rank's gradients only, which are its stages'" in refusal
        assert "LogsANorm.on_before_optimizer_step may read gradients" in warned


def clipped_by_hand():
    with pytest.raises(ConfigError) as caught:
        pipelined({"size": 2, "microbatches": 4}, {"blocks": 4}, callbacks=[ClipsByHand()])
    with mock.patch.object(optimization, "rank_zero_warn") as warn:
        pipelined({"size": 2, "microbatches": 4}, {"blocks": 4}, callbacks=[LogsANorm()], max_steps=1)
    return str(caught.value), str(warn.call_args)


def test_a_resumed_stage_loads_its_own_state_only(world, tmp_path):
    path = str(tmp_path / "whole.ckpt")
    world(2).run(saved, path)
    whole = len(torch.load(path, weights_only=True)["optimizer_states"][0]["state"])
    counts = world(2).run(loaded, path)
    assert sum(counts) == whole
    assert max(counts) < whole


def saved(path):
    pipelined({"size": 2, "microbatches": 4}, {"blocks": 4}, save=path)


def loaded(path):
    """How many parameters' states the optimizer was given to load."""
    warnings.simplefilter("ignore")
    given = []
    real = torch.optim.Optimizer.load_state_dict

    def load(optimizer, state):
        given.append(len(state["state"]))
        return real(optimizer, state)

    with mock.patch.object(torch.optim.Optimizer, "load_state_dict", load):
        pipelined({"size": 2, "microbatches": 4}, {"blocks": 4}, resume=path, max_epochs=3)
    return given[-1]
