"""The peer of expert parallelism trains what we train, or says why not."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader, DistributedSampler

from lightning_overlap import ConfigError, OverlapStrategy
from lightning_overlap.bench.peers import find_peers
from lightning_overlap.bench.peers.expert import peers
from lightning_overlap.config import OverlapConfig
from lightning_overlap.facts import Facts
from lightning_overlap.plan import resolve
from tests.helpers.sequences import BATCH, QUIET, Losses
from tests.trainer.expert.fits import Hugging, batches, fit

NAME = "Hugging Face EP + FSDP2"


def trained_by_peer() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    make, prepare = peers(OverlapConfig(), dist.get_world_size(), "gloo")[NAME]
    seed_everything(5, verbose=False)
    module, losses = prepare(Hugging("mixtral")), Losses()
    sampler: DistributedSampler[Any] = DistributedSampler(batches(), shuffle=False)  # type: ignore[arg-type]
    loader = DataLoader(batches(), batch_size=BATCH // dist.get_world_size(), sampler=sampler)  # type: ignore[arg-type]
    settings: Any = {**QUIET, "accelerator": "cpu", "devices": dist.get_world_size(), "use_distributed_sampler": False}
    plugins, callbacks = [TorchElasticEnvironment()], [losses]
    Trainer(**settings, strategy=make(), plugins=plugins, callbacks=callbacks, max_steps=5, limit_val_batches=0).fit(module, loader)
    experts = module.model.model.layers[0].mlp.experts
    return {"losses": losses.values, "experts": len(experts.down_proj.to_local())}


def test_the_same_losses(world: Any) -> None:
    expected = fit(None, "mixtral")
    ranks = world(2).run(trained_by_peer)
    assert [each["experts"] for each in ranks] == [2, 2], "of four"
    losses = torch.tensor([each["losses"] for each in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["tensor", "context"])
def test_where_ranks_share_a_batch_it_would_train_on_another_one(other: str) -> None:
    def found(**sizes: Any) -> bool:
        config = OverlapStrategy(**sizes).config
        return NAME in find_peers(resolve(config, Facts(world_size=2)), config, "gloo")

    assert found(expert_parallel=2)
    assert not found(**{f"{other}_parallel": 2}, expert_parallel=2)


def test_a_model_of_another_library_is_left_out() -> None:
    _, prepare = peers(OverlapConfig(), 2, "gloo")[NAME]
    with pytest.raises(ConfigError, match="no model of transformers with a plan for experts"):
        prepare(LightningModule())
