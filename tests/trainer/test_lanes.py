"""Lanes through Trainer: the bits of the same microbatches one after the other, under every mode that waits inside a stage."""

import threading
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_overlap import ConfigError, ContextParallel, ExpertParallel, PipelineParallel, TensorParallel
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.steps.lanes import Lanes
from tests.trainer.expert import fits as experts
from tests.trainer.tensor import test_numbers as tensor_numbers

TENSOR = {"tensor_parallel": TensorParallel(size=2, vocab_parallel=True)}
WHOLE = {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)}
CONTEXT = {"context_parallel": ContextParallel(size=2)}
CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
EVEN = {"dropout": 0.2, "tokens": 8}
FOUR = {"microbatches": 4}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tensor, dropout, adamw": (2, TENSOR, FOUR, {"dropout": 0.2, "optimizer": "adamw"}, {"max_steps": 3}),
    "tensor, dropout, recomputed, clipped": (2, TENSOR, FOUR, {"dropout": 0.2, "recompute": False}, CLIPPED),
    "tensor, bf16, recomputed": (2, TENSOR, FOUR, {"dropout": 0.2, "recompute": False}, {"precision": "bf16-mixed"}),
    "tensor, all tokens, recomputed": (2, WHOLE, FOUR, {"dropout": 0.2, "recompute": False}, {}),
    "context, recomputed, clipped": (2, CONTEXT, FOUR, {**EVEN, "recompute": False}, CLIPPED),
    "context, bf16, two of unequal size": (2, CONTEXT, {"microbatches": 3}, EVEN, {"precision": "bf16-mixed"}),
    "tensor x context": (4, {**TENSOR, **CONTEXT}, FOUR, {**EVEN, "recompute": False}, {}),
    "tensor x pipeline": (4, TENSOR, {"size": 2, **FOUR}, {**EVEN, "recompute": False}, CLIPPED),
    "context x pipeline, split backward": (4, CONTEXT, {"size": 2, "schedule": "dualpipev", "virtual_stages": 2, **FOUR}, EVEN, {}),
}


class Net(tensor_numbers.Net):
    """A block for each stage of four. Logs a metric too, and tells at the end what was logged."""

    logged: ClassVar[dict[str, float]] = {}

    def __init__(self, **model: Any) -> None:
        super().__init__(**model)
        self.blocks.append(tensor_numbers.Block(16, True, model["dropout"]))
        self.seen = torchmetrics.MeanMetric()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.seen(loss.detach() * len(batch))
        self.log("seen", self.seen, on_step=True, on_epoch=True)
        return loss

    def on_train_end(self) -> None:
        Net.logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}


def with_and_without(strategy: dict[str, Any], pipeline: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """One fit with lanes, which run from the second batch on, and one without; and how often a lane handed over."""
    hand_overs = 0

    def hand_over(lanes: Lanes) -> None:
        nonlocal hand_overs
        hand_overs += hasattr(lanes._local, "place")
        plain(lanes)

    plain = Lanes.hand_over
    runs = []
    with mock.patch.object(tensor_numbers, "Net", Net), mock.patch.object(Lanes, "hand_over", hand_over):
        for lanes in (True, False):
            mode = {"pipeline_parallel": PipelineParallel(lanes=lanes, **pipeline)}
            runs.append(tensor_numbers.train({**strategy, **mode}, model, **{"max_steps": 2, **trainer}))
            runs[-1] |= {"hand_overs": hand_overs, "logged": Net.logged}
            hand_overs = 0
    return runs


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_one_microbatch_after_the_other(world: Any, case: str) -> None:
    size, *arguments = CASES[case]
    for lanes, plain in world(size).run(with_and_without, *arguments):
        assert "forwards run beside another microbatch's backward" in lanes["plan"]
        assert lanes["hand_overs"] > 30
        assert plain["hand_overs"] == 0
        assert lanes["losses"] == plain["losses"]
        assert lanes["val_loss"] == plain["val_loss"]
        assert lanes["logged"] == plain["logged"]
        assert {"loss", "seen_epoch"} <= lanes["logged"].keys()
        for name, weight in plain["weights"].items():
            assert torch.equal(lanes["weights"][name], weight), name


class Keeps(nn.Module):
    """A block that keeps a tensor on itself, as some keep their router's loss."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.detach().mean()  # before the block: a checkpoint stops where it has all tensors that backward needs
        return self.block(x)


class Awkward(tensor_numbers.Net):
    """Recomputes blocks that keep a tensor, or fails in the forward of the second batch, which runs in a lane."""

    def __init__(self, kind: str) -> None:
        super().__init__(tokens=8)
        self.kind = kind
        if kind == "keeps":
            self.blocks = nn.ModuleList(map(Keeps, self.blocks))
            roles = self.parallel_plan.items()
            self.__dict__["parallel_plan"] = {
                name if "head" in name or "emb" in name else f"block.{name}": role for name, role in roles
            }

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False)
            if self.kind == "fails" and number and self.trainer.training and self.trainer.fit_loop.batch_idx == 1:
                raise ZeroDivisionError("in a block")
        return self.head(self.norm(x))


def awkward(kind: str, lanes: Any) -> str:
    strategy = {**TENSOR, "pipeline_parallel": PipelineParallel(lanes=lanes, microbatches=4), "verify_first_step": False}
    with mock.patch.object(tensor_numbers, "Net", Awkward), mock.patch("lightning_overlap.modes.pipeline.mode.warnings.warn") as warn:
        try:
            tensor_numbers.train(strategy, {"kind": kind}, max_steps=2)
        except (ConfigError, TransferError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            assert not any(thread.name == "backward lane" for thread in threading.enumerate())
    messages = [str(call.args[0]) for call in warn.call_args_list]
    return " ".join(message for message in messages if "lanes" in message)


def test_refusals_are_the_same_on_every_rank(world: Any) -> None:
    workers = world(2)
    for message in workers.run(awkward, "keeps", True):
        assert message.startswith(
            "ConfigError: pipeline_parallel.lanes: true cannot run here: an activation checkpoint writes Keeps.mean"
        )
    for message in workers.run(awkward, "keeps", "auto"):
        assert message.startswith("pipeline_parallel.lanes is off: an activation checkpoint writes Keeps.mean")
    assert workers.run(awkward, "fine", True) == ["", ""]
    for message in workers.run(awkward, "fails", True):
        assert message == "ZeroDivisionError: in a block"


def experts_with_and_without(name: str, strategy: dict[str, Any]) -> Any:
    def train(lanes: bool) -> Any:
        return experts.fit({**strategy, "pipeline_parallel": PipelineParallel(microbatches=2, lanes=lanes)}, name, max_steps=3)

    return train(True), train(False)


EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek": (2, {"expert_parallel": ExpertParallel(size=2, update_bias_rate=0.05)}),  # routers count in backward
    "mixtral": (4, {"expert_parallel": 2, "context_parallel": 2}),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_beside_those_of_another_microbatch(world: Any, name: str) -> None:
    size, strategy = EXPERTS[name]
    for lanes, plain in world(size).run(experts_with_and_without, name, strategy):
        assert "what context_parallel and expert_parallel would" in lanes["plan"] or size == 2
        assert "1 of 2 forwards run beside another microbatch's backward" in lanes["plan"]
        assert (lanes["losses"], lanes["val_loss"]) == (plain["losses"], plain["val_loss"])
        for parameter, weight in plain["weights"].items():
            assert torch.equal(lanes["weights"][parameter], weight), parameter
