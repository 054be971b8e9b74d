"""Checkpoints of models whose experts are spread over ranks: all experts are in the file, and load into any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers.sequences import train
from tests.trainer.expert.fits import Hugging, batches, compare, fit

MOMENTUM = {"optimizer": "momentum"}  # Adam divides small gradients by small roots, so rounding shows in single weights
FIRST, LAST = {"max_steps": 3}, {"max_steps": 6}


@pytest.fixture(scope="module")
def saved(world: Any, tmp_path_factory: Any) -> dict[str, str]:
    """Checkpoints after three steps: one file, of two ranks; a folder, of four ranks with all experts apart; one of one process."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {kind: str(folder / f"{kind}.ckpt") for kind in ("file", "folder", "plain")}
    world(2).run(save, {"expert_parallel": 2}, paths["file"])
    world(4).run(save, {"expert_parallel": 4, "state_dict_type": "sharded"}, paths["folder"])
    save(None, paths["plain"])
    return paths


def save(strategy: dict[str, Any] | None, path: str) -> None:
    fit(strategy, "mixtral", MOMENTUM, save=path, **FIRST)


def resume(strategy: dict[str, Any] | None, path: str) -> Any:
    return fit(strategy, "mixtral", MOMENTUM, resume=path, **LAST)


@pytest.mark.parametrize("kind", ["file", "folder", "plain"])
def test_any_checkpoint_resumes_with_any_number_of_ranks(world: Any, saved: dict[str, str], kind: str) -> None:
    expected = resume(None, saved["plain"])
    compare(world(2).run(resume, {"expert_parallel": 2}, saved[kind]), expected)
    compare(world(2).run(resume, {"expert_parallel": 1}, saved[kind]), expected)
    if kind == "file":
        compare(world(4).run(resume, {"expert_parallel": 4}, saved[kind]), expected)
        compare([resume(None, saved[kind])], expected)
    if kind == "folder":
        compare(world(4).run(resume, {"expert_parallel": 2, "state_dict_type": "sharded"}, saved[kind]), expected)


class Deferred(Hugging):
    """Made on the meta device."""

    def __init__(self, **settings: Any) -> None:
        with torch.device("meta"):
            super().__init__(**settings)


def resume_deferred(strategy: dict[str, Any], path: str) -> Any:
    return train(strategy, Deferred, {"name": "mixtral", **MOMENTUM}, {}, samples=batches, resume=path, **LAST)


def test_a_model_from_the_meta_device(world: Any, saved: dict[str, str]) -> None:
    expected = resume(None, saved["plain"])
    compare(world(2).run(resume_deferred, {"expert_parallel": 2}, saved["file"]), expected)
    compare(world(4).run(resume_deferred, {"expert_parallel": 4}, saved["folder"]), expected)


def test_all_experts_are_in_the_file(saved: dict[str, str]) -> None:
    """KempnerForge 202, UniRL 158: a file with one rank's experts under everybody's names."""
    found, expected = (torch.load(saved[kind], weights_only=False) for kind in ("file", "plain"))
    assert {name: x.shape for name, x in found["state_dict"].items()} == {n: x.shape for n, x in expected["state_dict"].items()}
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    experts = found["state_dict"]["model.model.layers.0.mlp.experts.down_proj"]
    assert len({tuple(expert.flatten().tolist()) for expert in experts}) == 4, "no two experts are equal"
    moments, plain = (ckpt["optimizer_states"][0]["state"] for ckpt in (found, expected))
    for number, values in plain.items():
        torch.testing.assert_close(moments[number]["momentum_buffer"], values["momentum_buffer"], rtol=1e-4, atol=1e-5)


def export(folder: str) -> dict[str, torch.Tensor]:
    modules: list[Hugging] = []

    def make(**settings: Any) -> Hugging:
        modules.append(Hugging(**settings))
        return modules[0]

    result = train({"expert_parallel": 2}, make, {"name": "mixtral"}, {}, samples=batches, **FIRST)
    if torch.distributed.get_rank() == 0:
        modules[0].model.save_pretrained(folder)
    weights: dict[str, torch.Tensor] = result["weights"]
    return weights


def test_a_stock_model_reads_what_save_pretrained_has_written(world: Any, tmp_path: Path) -> None:
    weights = world(2).run(export, str(tmp_path))[0]
    model = transformers.MixtralForCausalLM.from_pretrained(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"])
