"""Lanes through Trainer: the bits of the same microbatches one after the other, under every mode that waits inside a stage."""

from typing import Any

import pytest
import torch

from lightning_overlap import ContextParallel, PipelineParallel, TensorParallel
from tests.trainer.tensor import test_numbers as tensor_numbers

TENSOR = {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True)}
WHOLE = {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)}
CONTEXT = {"context_parallel": ContextParallel(size=2)}
CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tensor, dropout, adamw": (TENSOR, {"dropout": 0.2, "optimizer": "adamw"}, {}),
    "tensor, dropout, recomputed, clipped": (TENSOR, {"dropout": 0.2, "recompute": False}, CLIPPED),
    "tensor, bf16, recomputed": (TENSOR, {"dropout": 0.2, "recompute": False}, {"precision": "bf16-mixed"}),
    "tensor, all tokens, dropout": (WHOLE, {"dropout": 0.2, "recompute": False}, {}),
    "context, dropout, recomputed": (CONTEXT, {"dropout": 0.2, "recompute": False, "tokens": 8}, CLIPPED),
    "context, bf16": (CONTEXT, {"dropout": 0.2, "tokens": 8}, {"precision": "bf16-mixed"}),
}


def with_and_without(strategy: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], pipeline: dict[str, Any]) -> Any:
    def train(lanes: bool) -> Any:
        return tensor_numbers.train(
            {**strategy, "pipeline_parallel": PipelineParallel(lanes=lanes, **pipeline)}, model, **{"max_steps": 3, **trainer}
        )

    return train(True), train(False)


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_one_microbatch_after_the_other(world: Any, case: str) -> None:
    for lanes, plain in world(2).run(with_and_without, *CASES[case], {"microbatches": 4}):
        assert "3 of 4 forwards run beside" in lanes["plan"]
        assert lanes["losses"] == plain["losses"]
        assert lanes["val_loss"] == plain["val_loss"]
        for name, weight in plain["weights"].items():
            assert torch.equal(lanes["weights"][name], weight), name
