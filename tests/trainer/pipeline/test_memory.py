"""What a schedule holds on paper is what it holds: activations of so many microbatches, by rank."""

import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_overlap import OverlapStrategy, PipelineParallel
from tests.helpers.memory import Peak


class Block(nn.Module):
    """Holds nine times the size of its input; its weights are nothing to that."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).sigmoid().sin())


class Deep(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(32))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        x = self.first(batch)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def peaks(pipeline: dict[str, Any], overlap: Any = "auto") -> tuple[float, int]:
    """Activations of a stage that this rank held at most, as its memory says, and as the plan does."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    own = PipelineParallel(size=2, **pipeline)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy, callback = OverlapStrategy(pipeline_parallel=own, overlap=overlap, **env), Peak()  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=3, callbacks=[callback], **quiet)  # type: ignore[arg-type]
    run.fit(Deep(), DataLoader(torch.randn(3 * own.count, 2048, 4), batch_size=own.count))  # type: ignore[arg-type]
    told = re.search(r"peak activations by rank, in microbatches: ([\d, ]+)", strategy.plan.choices["pipeline"].schedule.why)
    assert told is not None
    # Of a block: the inputs of up, sin (which is sigmoid's output) and down; once the input's gradient has been computed and
    # weights' are left, the inputs of up and down and the gradients of their outputs.
    of_a_block = (4 + 16) + (16 + 4) if own.plan(own.count).splits_backward else 4 + 16 + 16
    of_a_stage = 32 / own.stages * 2048 * 4 * of_a_block
    return callback.bytes / of_a_stage, int(told.group(1).split(",")[dist.get_rank()])


@pytest.mark.parametrize(
    "pipeline",
    [
        {"schedule": "gpipe", "microbatches": 8},
        {"schedule": "1f1b", "microbatches": 8},
        {"schedule": "eager_1f1b", "microbatches": 8},
        {"schedule": "interleaved", "virtual_stages": 2, "microbatches": 8},
        {"schedule": "zb_h1", "microbatches": 8},
        {"schedule": "interleaved_zb", "virtual_stages": 2, "microbatches": 8},
        {"schedule": "zb_v", "virtual_stages": 2, "microbatches": 8},
        {"schedule": "dualpipev", "virtual_stages": 2, "microbatches": 8},
    ],
    ids=lambda pipeline: pipeline["schedule"],
)
def test_memory_is_what_the_schedule_says(world: Any, pipeline: dict[str, Any]) -> None:
    for rank, (held, told) in enumerate(world(2).run(peaks, pipeline)):
        assert held == pytest.approx(told, rel=0.15), rank


def test_transfers_that_are_waited_for_hold_no_more(world: Any) -> None:
    for rank, (held, told) in enumerate(world(2).run(peaks, {"schedule": "eager_1f1b", "microbatches": 8}, "off")):
        assert held == pytest.approx(told, rel=0.15), rank
