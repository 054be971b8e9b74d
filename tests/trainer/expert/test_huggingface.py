"""Models of transformers with experts, unchanged: the numbers of one process."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_overlap import ConfigError
from tests.helpers.experts import MODELS
from tests.helpers.hugging import Adapter
from tests.helpers.sequences import train
from tests.trainer.expert.fits import Hugging, batches, compare, fit


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_one_process(world: Any, name: str) -> None:
    expected = fit(None, name)
    ranks = world(2).run(fit, {"expert_parallel": 2}, name)
    compare(ranks, expected)


class Changed(Hugging):
    """A model of which users have changed a part: adapters of a frozen model, or compiled blocks."""

    def __init__(self, change: str) -> None:
        super().__init__("mixtral")
        self.model.requires_grad_(change == "compiled")
        for block in self.model.model.layers:
            if change == "compiled":
                block.compile(backend="eager")
            else:
                block.self_attn.q_proj, block.self_attn.v_proj = map(Adapter, (block.self_attn.q_proj, block.self_attn.v_proj))


def fit_changed(strategy: dict[str, Any] | None, change: str) -> Any:
    return train(strategy, Changed, {"change": change}, {}, samples=batches)


@pytest.mark.parametrize("change", ["adapters", "compiled"])
def test_adapters_and_compiled_blocks(world: Any, change: str) -> None:
    expected = fit_changed(None, change)
    compare(world(2).run(fit_changed, {"expert_parallel": 2}, change), expected)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Writing(Hugging):
    """Validation writes a text of another length on each rank."""

    def validation_step(self, batch: Tensor, index: int) -> None:
        super().validation_step(batch, index)
        self.start = batch[:, :5]
        self.written = self.write()

    def write(self) -> Tensor:
        length = 2 + 3 * torch.distributed.get_rank()
        ids: Tensor = self.model.generate(self.start, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        return ids


def write_in_validation(strategy: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    modules: list[Writing] = []

    def make(**settings: Any) -> Writing:
        modules.append(Writing(**settings))
        return modules[0]

    train(strategy, make, {"name": "mixtral"}, {}, samples=batches, max_steps=2)
    return modules[0].written.tolist(), modules[0].write().tolist()


def test_texts_of_other_lengths(world: Any) -> None:
    """A hang, if the rank that has ended did not compute the other's tokens."""
    lengths = []
    for in_fit, afterwards in world(2).run(write_in_validation, {"expert_parallel": 2}):
        assert in_fit == afterwards
        lengths.append(len(in_fit[0]))
    assert lengths == [7, 10]


def refused(kind: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train({"expert_parallel": 2}, Dense, {"kind": kind}, {}, samples=batches)
    return str(caught.value)


class Dense(Hugging):
    def __init__(self, kind: str) -> None:
        super().__init__("mixtral")
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)) if kind == "llama" else self.model
        if kind == "style":
            self.model._ep_plan = {**self.model.ep_plan, "model.layers.*.mlp.gate": "ep_router"}


def test_refusals_are_alike_on_all_ranks(world: Any) -> None:
    told = world(2).run(refused, "llama")
    assert told[0] == told[1]
    assert "no experts were found to spread over 2 ranks: LlamaForCausalLM (llama) of transformers has no plan for experts" in told[0]
    told = world(2).run(refused, "style")
    assert told[0] == told[1]
    assert "has the style 'ep_router'" in told[0]
