"""Ranks whose batches have other sizes or numbers than those of the ranks which wait for their tokens in a forward."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader

from examples.train_moe import MoEGPTModule
from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel
from tests.helpers.experts import VOCABULARY
from tests.helpers.sequences import QUIET, Losses
from tests.trainer.expert.fits import Hugging, batches

SIZES = ((4, 1), (4, 4), (2, 3))
"""By step, the samples of each data rank."""


class Own(MoEGPTModule):
    """Each rank has all experts, and balances them over the batches of all ranks: by a loss that is too small to be seen."""

    def __init__(self) -> None:
        super().__init__(2, 2, 16, 12, VOCABULARY, n_experts=4)
        for block in self.model.blocks:
            block.mlp.aux_loss_coef, block.mlp.global_batch_balance = 1e-12, True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(strategy: dict[str, Any], own: bool, validations: tuple[int, int] = (1, 1)) -> Any:
    """Trains on batches of :data:`SIZES`; ``validations`` are the batches of each data rank."""
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module: Any = Own() if own else Hugging("mixtral")
    data_rank = dist.get_rank() % 2
    samples = iter(batches()[20 * data_rank :])

    def loader(*sizes: int) -> Any:
        return DataLoader([torch.stack([next(samples) for _ in range(size)]) for size in sizes], batch_size=None)  # type: ignore[arg-type]

    env: Any = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo", "timeout": timedelta(seconds=20)}
    losses = Losses()
    fixed: Any = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **QUIET}
    trainer = Trainer(devices=dist.get_world_size(), strategy=OverlapStrategy(**strategy, **env), callbacks=[losses], **fixed)
    try:
        trainer.fit(module, loader(*(each[data_rank] for each in SIZES)), loader(*[2] * validations[data_rank]))
    except ConfigError as error:
        return str(error)
    return losses.values, float(trainer.callback_metrics["val_loss"]), [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("own", [False, True])
def test_the_last_batches_of_ranks_have_other_sizes(world: Any, own: bool) -> None:
    """Fewer samples than microbatches on one rank: all ranks make as many forwards, and the numbers are those of whole batches."""
    strategy = {} if own else {"expert_parallel": 2}
    expected = world(2).run(fit, strategy, own)
    for size in (1, 2):
        microbatched = {**strategy, "pipeline_parallel": PipelineParallel(size=size, microbatches=4)}
        for rank, result in enumerate(world(2 * size).run(fit, microbatched, own)):
            for value, reference in zip(result, expected[rank % 2], strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_other_numbers_of_validations_are_refused(world: Any, own: bool) -> None:
    told = world(2).run(fit, {} if own else {"expert_parallel": 2}, own, (1, 2))
    assert told[0] == told[1]
    assert "different numbers of validation batches, [[1], [2]] by rank" in told[0]
