"""What a hook of a fit gets of a model of which each rank has a part."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from examples.train_gpt import GPTModule
from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel, TensorParallel
from tests.helpers.pipelined import QUIET, loader


class Saves(GPTModule):
    """Asks for its state in the middle of a fit, and at its end."""

    def __init__(self) -> None:
        super().__init__(n_layer=2, n_head=2, n_embd=16, block_size=8)
        self.said: list[str] = []
        self.whole: dict[str, torch.Tensor] = {}
        self.at_end: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self) -> None:
        for part in (self, self.model):
            with pytest.raises(ConfigError) as caught:
                part.state_dict()
            self.said.append(str(caught.value))
        self.whole = {key: value.clone() for key, value in self.trainer.strategy.lightning_module_state_dict().items()}

    def on_fit_end(self) -> None:
        self.at_end = self.state_dict()


def saved(strategy: dict[str, Any]) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env: Any = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    module = Saves()
    given: Any = {"devices": dist.get_world_size(), "strategy": OverlapStrategy(**strategy, **env), "use_distributed_sampler": False}
    Trainer(**QUIET, accelerator="cpu", max_steps=2, limit_val_batches=0, **given).fit(module, loader(4))
    return module.said, module.whole, module.at_end, dist.get_rank()


@pytest.mark.parametrize(
    "strategy", [{"pipeline_parallel": PipelineParallel(size=2, microbatches=2)}, {"tensor_parallel": TensorParallel(size=2)}]
)
def test_no_hook_gets_a_part_for_the_whole(world, strategy):
    for said, whole, at_end, rank in world(2).run(saved, strategy):
        assert len(said) == 2
        assert all("trainer.save_checkpoint(path)" in sentence for sentence in said)
        for name, value in at_end.items():
            assert not value.isnan().any()
            assert rank > 0 or torch.equal(whole[name], value)
