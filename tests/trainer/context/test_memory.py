"""Between the blocks and the loss a rank holds its tokens only: of a large vocabulary this is most of the memory of a step."""

import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_overlap import ContextParallel, OverlapStrategy
from tests.helpers.memory import Peak
from tests.helpers.models import Transformer
from tests.helpers.sequences import QUIET

TOKENS = 512


class LargeVocabulary(Transformer):
    vocabulary = 32768


def peak(tokens: int, size: int, boundary: Literal["loss", "blocks"] = "loss") -> int:
    """Bytes by which the memory of this rank grows at most in a step of one sequence."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if size > 1:
        config = ContextParallel(size=size, boundary=boundary)
        strategy = OverlapStrategy(context_parallel=config, verify_first_step=False, **env)  # type: ignore[arg-type]
    callback = Peak()
    length = {"max_steps": 3, "limit_val_batches": 0, "use_distributed_sampler": False}
    run = Trainer(accelerator="cpu", devices=size, strategy=strategy, callbacks=[callback], **length, **QUIET)  # type: ignore[arg-type]
    samples: Any = torch.randint(0, LargeVocabulary.vocabulary, (3, tokens + 1))
    run.fit(LargeVocabulary(width=16), DataLoader(samples, batch_size=1))
    return callback.bytes


def peaks() -> tuple[int, int, int]:
    size = dist.get_world_size()
    return peak(TOKENS, size), peak(4 * TOKENS, size), peak(TOKENS, size, "blocks")


def test_activations_of_four_ranks_are_a_quarter(world: Any) -> None:
    alone = peak(TOKENS, 1)
    for same, longer, unsharded_logits in world(4).run(peaks):
        assert same <= 0.30 * alone
        assert longer <= 1.05 * alone, "a sequence four times as long fits"
        assert unsharded_logits > 0.9 * alone, "what is measured are the logits and what the loss makes of them"
