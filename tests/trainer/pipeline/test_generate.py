"""A validation of a pipeline that generates with a cache of keys and values, from prompts that are padded on the left."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader

from lightning_overlap import OverlapStrategy, PipelineParallel
from tests.helpers.pipelined import QUIET

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model(kind: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        made: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=32, **SMALL))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        made = LlamaForCausalLM(LlamaConfig(**sizes, **SMALL))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def generated(network: Any, ids: torch.Tensor) -> list[list[int]]:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = network.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
    return found.tolist()


class Generates(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = model(kind)
        self.found: list[list[list[int]]] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.network(batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.found.append(generated(self.network, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def data() -> torch.Tensor:
    return torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(2))


def validated(kind: str) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env: Any = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, microbatches=2), **env)
    module = Generates(kind)
    given: Any = {"devices": dist.get_world_size(), "strategy": strategy, "use_distributed_sampler": False}
    loader = DataLoader(data(), batch_size=4)  # type: ignore[arg-type]
    Trainer(**QUIET, accelerator="cpu", max_steps=1, num_sanity_val_steps=1, **given).fit(module, loader, loader)
    return module.found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_tokens_as_one_process(world, kind):
    expected = generated(model(kind), data())
    for found in world(2).run(validated, kind):
        assert found == [expected, expected]  # before the first step and after it
