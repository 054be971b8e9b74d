"""DeepEP itself, which no test without several GPUs can reach: the numbers of the dispatcher alltoall."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_overlap import ExpertParallel
from tests.helpers.world import World
from tests.trainer.expert.fits import fit

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 512, "head_dim": 128, "moe_intermediate_size": 256}


def fit_on_gpus(dispatcher: str) -> Any:
    settings = {"accelerator": "gpu", "precision": "bf16-mixed"}
    return fit({"expert_parallel": ExpertParallel(size=2, dispatcher=dispatcher)}, "qwen2", SIZES, **settings)


def test_flex_is_close_to_alltoall(device: str) -> None:
    if find_spec("deep_ep") is None:
        pytest.skip("DeepEP is not installed")
    if device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("DeepEP needs two GPUs that reach each other's memory")
    world = World(2, one_device=False)
    try:
        expected = world.run(fit_on_gpus, "alltoall")
        for each, other in zip(world.run(fit_on_gpus, "flex"), expected, strict=True):
            torch.testing.assert_close(torch.tensor(each["losses"]), torch.tensor(other["losses"]), rtol=2e-2, atol=2e-2)
            for name, weight in other["weights"].items():
                torch.testing.assert_close(each["weights"][name], weight, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        world.close()
