"""Training with experts spread over ranks: the numbers of one process, in every mixture and setting.

Tests that are named after a public report of another project say which.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_overlap import ExpertParallel, PipelineParallel, TensorParallel
from tests.helpers.sequences import train
from tests.trainer.expert.fits import Hugging, batches, compare, fit

WITHOUT_SP, WITHOUT_SP_4 = (TensorParallel(size=size, sequence_parallel=False) for size in (2, 4))
MIXTURES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "ep 4": (4, "mixtral", {"expert_parallel": 4}, {}),
    "ep 2 x dp 2": (4, "qwen2", {"expert_parallel": 2}, {}),
    "allgather": (2, "gpt_oss", {"expert_parallel": ExpertParallel(size=2, dispatcher="allgather")}, {}),
    "ep 2 of 5 experts": (2, "olmoe", {"expert_parallel": 2}, {"num_experts": 5}),
    "ep 2 over tp 2, dp 2": (4, "mixtral", {"expert_parallel": 2, "tensor_parallel": 2}, {}),
    "ep 4 over tp 2 and dp 2": (4, "qwen3", {"expert_parallel": 4, "tensor_parallel": 2}, {}),
    "ep 2 over tp 2 without sp, dp 2": (4, "deepseek", {"expert_parallel": 2, "tensor_parallel": WITHOUT_SP}, {}),
    "ep 4 over tp 2 without sp and dp 2": (4, "qwen2", {"expert_parallel": 4, "tensor_parallel": WITHOUT_SP}, {}),
    "ep 2 over tp 2": (2, "gpt_oss", {"expert_parallel": 2, "tensor_parallel": 2}, {}),
    "ep 2 over tp 2 without sp": (2, "gpt_oss", {"expert_parallel": 2, "tensor_parallel": WITHOUT_SP}, {}),
    "ep 2 over tp 4, dp 2": (8, "mixtral", {"expert_parallel": 2, "tensor_parallel": 4}, {"num_key_value_heads": 4}),
    "ep 2 over tp 4": (4, "mixtral", {"expert_parallel": 2, "tensor_parallel": 4}, {"num_key_value_heads": 4}),
    "ep 2 over tp 4 without sp": (4, "qwen2", {"expert_parallel": 2, "tensor_parallel": WITHOUT_SP_4}, {"num_key_value_heads": 4}),
    "ep 3 of 4 experts over cp 3": (3, "mixtral", {"expert_parallel": 3, "context_parallel": 3}, {}),
    "ep 2 over cp 2, dp 2": (4, "mixtral", {"expert_parallel": 2, "context_parallel": 2}, {"packed": True}),
    "ep 4 over cp 2 and dp 2": (4, "qwen3", {"expert_parallel": 4, "context_parallel": 2}, {}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures(world: Any, mixture: str) -> None:
    """Also DS 6545, MLM 5956: gradients of experts as many times too large as there are ranks; TT 4054: a router's gradient summed
    over tensor ranks never, or twice."""
    size, name, strategy, model = MIXTURES[mixture]
    expected = fit(None, name, model)
    compare(world(size).run(fit, strategy, name, model), expected)


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_mlm_1462_dense_stages_beside_stages_with_experts(world: Any, name: str) -> None:
    """A hang elsewhere. The first stage of qwen3 has no experts; deepseek has one layer of experts on the first stage and two on the
    second."""
    model = {"num_hidden_layers": 4} if name == "deepseek" else {}
    pipeline = PipelineParallel(size=2, microbatches=2)
    expected = fit(None, name, model)
    compare(world(4).run(fit, {"expert_parallel": 2, "pipeline_parallel": pipeline}, name, model), expected)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "clipping": ({"gradient_clip_val": 0.1}, {}, 1e-5),
    "accumulation": ({"accumulate_grad_batches": 2, "max_steps": 3}, {}, 1e-5),
    "adamw": ({}, {"optimizer": "adamw"}, 1e-4),
    "bf16": ({"precision": "bf16-mixed"}, {}, 1e-2),  # bf16 keeps 8 bits of each activation
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_a_fit(world: Any, setting: str) -> None:
    """Also AM 3816, MLM 5916: another norm by group of experts, or one without experts."""
    trainer, model, tolerance = SETTINGS[setting]
    expected = fit(None, "qwen2", model, **trainer)
    compare(world(4).run(fit_with, trainer, {"expert_parallel": 2}, "qwen2", model), expected, tolerance)


def fit_with(trainer: dict[str, Any], *arguments: Any) -> Any:
    return fit(*arguments, **trainer)


class Forced(Hugging):
    """Every token goes to experts 0 and 1, which are on the first of two ranks. The optimizer is made with the model."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(self._force)
        self.made = torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)

    @staticmethod
    def _force(router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = output
        return logits, weights, torch.tensor([0, 1]).expand_as(indices)

    def configure_optimizers(self) -> Any:
        return self.made


def fit_forced(strategy: dict[str, Any] | None) -> Any:
    return train(strategy, Forced, {"name": "mixtral"}, {}, samples=batches)


@pytest.mark.parametrize("size", [2, 4])
def test_experts_and_ranks_without_tokens(world: Any, size: int) -> None:
    """MLM 4851, AM 935, DS 4966, Lightning 20982: a hang; AM 2995: decay and momentum of idle experts are skipped; DS 8354: an
    optimizer that was made before the experts were spread trains none of them."""
    expected = fit_forced(None)
    ranks = world(size).run(fit_forced, {"expert_parallel": size})
    compare(ranks, expected, 1e-4)


def moves_in_the_first_step(optimizer: str) -> list[bool]:
    """By parameter of experts and expert, whether one step has changed it."""
    before: dict[str, Tensor] = {}

    def make(**settings: Any) -> Hugging:
        module = Hugging(**settings)
        before.update({name: parameter.detach().clone() for name, parameter in module.named_parameters()})
        return module

    settings = {"name": "mixtral", "optimizer": optimizer}
    weights = train({"expert_parallel": 2}, make, settings, {}, samples=batches, max_steps=1, val_check_interval=1)["weights"]
    experts = [name for name in weights if ".experts." in name]
    return [not torch.equal(new, old) for n in experts for new, old in zip(weights[n], before[n], strict=True)]


def test_ds_8354_every_expert_moves_in_the_first_step(world: Any) -> None:
    for moves in world(2).run(moves_in_the_first_step, "adamw"):
        assert moves == [True] * 16


@pytest.mark.parametrize("name", ["qwen2", "deepseek"])
def test_overlap_changes_no_bit(world: Any, name: str) -> None:
    """Nor do shared experts that compute before the block calls them."""
    on, off = (world(2).run(fit, {"expert_parallel": 2, "overlap": overlap}, name) for overlap in ("auto", "off"))
    assert "overlap_shared_experts auto on" in on[0]["plan"]
    for a, b in zip(on, off, strict=True):
        assert a["losses"] == b["losses"]
        assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])


def fit_twice(strategy: dict[str, Any] | None) -> Any:
    """Two fits of one module, whose optimizer keeps its momentum."""
    torch.manual_seed(5)
    module = Hugging("mixtral")
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    train(strategy, lambda: module, {}, {}, samples=batches)
    return train(strategy, lambda: module, {}, {}, samples=batches)


def test_a_second_fit_goes_on_with_the_state_of_each_ranks_experts(world: Any) -> None:
    """All ranks have the same number for a parameter of experts, and each has other experts."""
    expected = fit_twice(None)
    compare(world(2).run(fit_twice, {"expert_parallel": 2}), expected, 1e-4)


class Unweighted(Hugging):
    """On the first rank every other microbatch counts nothing."""

    calls = 0

    def microbatch_weight(self, batch: Tensor) -> float:
        self.calls += 1
        return float(torch.distributed.get_rank() > 0 or self.calls % 2)


def fit_unweighted(strategy: dict[str, Any]) -> str:
    with pytest.raises(Exception, match="has weight 0, so it has no backward") as caught:
        train(strategy, Unweighted, {"name": "mixtral"}, {}, samples=batches)
    return str(caught.value)


def test_a_microbatch_without_weight_is_refused(world: Any) -> None:
    """Ranks with other samples would wait for its backward."""
    pipeline = PipelineParallel(size=1, microbatches=2)
    world(2).run(fit_unweighted, {"expert_parallel": 2, "pipeline_parallel": pipeline})
