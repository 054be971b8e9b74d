"""All modes together: every pair and four triples train as one process does, save, and go on in another layout.

A fit of an epoch saves, and a fit in the next layout of the list resumes for another epoch.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from lightning_overlap import PipelineParallel
from tests.trainer.expert.fits import compare, fit

MODEL = {"optimizer": "momentum"}  # it has a state, and does not divide small gradients by small roots as Adam does
LENGTH = {"max_steps": -1, "limit_train_batches": 3, "val_check_interval": None, "check_val_every_n_epoch": 1}
PIPELINE = {"pipeline_parallel": PipelineParallel(size=2, microbatches=2)}
TENSOR, CONTEXT, EXPERT = ({f"{name}_parallel": 2} for name in ("tensor", "context", "expert"))
PAIRS: dict[str, dict[str, Any]] = {
    "pp x dp": PIPELINE,
    "tp x dp": TENSOR,
    "cp x dp": CONTEXT,
    "ep x dp": EXPERT,
    "pp x tp": {**PIPELINE, **TENSOR},
    "pp x cp": {**PIPELINE, **CONTEXT},
    "pp x ep": {**PIPELINE, **EXPERT},
    "tp x cp": {**TENSOR, **CONTEXT},
    "tp x ep": {**TENSOR, "expert_parallel": 4},
    "cp x ep": {**CONTEXT, "expert_parallel": 4},
}
ONE_MICROBATCH = {"pipeline_parallel": PipelineParallel(size=2, microbatches=1)}  # four data ranks get one sample each
TRIPLES: dict[str, dict[str, Any]] = {
    "pp x tp x dp": {**PIPELINE, **TENSOR},
    "pp x ep x dp": {**ONE_MICROBATCH, **EXPERT},
    "cp x tp x dp": {**CONTEXT, **TENSOR},
    "cp x ep x dp": {**CONTEXT, "expert_parallel": 4},
}


@pytest.fixture(scope="module")
def expected() -> Any:
    """Of one process."""
    return fit(None, "mixtral", MODEL, max_epochs=2, **LENGTH)


def continued(first: dict[str, Any], second: dict[str, Any], path: Path) -> dict[str, Any]:
    """Trains an epoch in one layout and another in the second one."""
    begun = fit(first, "mixtral", MODEL, max_epochs=1, save=str(path), **LENGTH)
    ended = fit(second, "mixtral", MODEL, max_epochs=2, resume=str(path), **LENGTH)
    return {**ended, "losses": begun["losses"] + ended["losses"]}


def following(layouts: dict[str, dict[str, Any]]) -> list[Any]:
    pairs = list(itertools.pairwise([*layouts.items(), next(iter(layouts.items()))]))
    return [pytest.param(first, second, id=f"{name}, then {after}") for (name, first), (after, second) in pairs]


@pytest.mark.parametrize(("first", "second"), following(PAIRS))
def test_pairs(world: Any, expected: Any, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    compare(world(4).run(continued, {**first, "state_dict_type": "sharded"}, second, tmp_path / "half.ckpt"), expected)


@pytest.mark.parametrize(("first", "second"), following(TRIPLES))
def test_triples(world: Any, expected: Any, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    compare(world(8).run(continued, first, second, tmp_path / "half.ckpt"), expected)
