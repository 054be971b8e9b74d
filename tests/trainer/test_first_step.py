"""The first step of the sharded model is compared with that of the unsharded one: faults that no other check sees are errors."""

import random
import re
import warnings
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel, TensorParallel
from lightning_overlap.steps.dropout import DROPOUTS
from lightning_overlap.strategy.first_step import _without_dropout
from tests.helpers import transformer
from tests.helpers.sequences import train
from tests.trainer.expert.fits import Hugging, batches

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WIDTH = 16
PIPELINE = {"pipeline_parallel": PipelineParallel(size=2, microbatches=2)}
INTERLEAVED = {"pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, microbatches=2)}
TENSOR = {"tensor_parallel": TensorParallel(size=2)}
SUMMED = {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)}
BOTH = {**TENSOR, **PIPELINE}


class Attention(transformer.Attention):
    def __init__(self) -> None:
        super().__init__(WIDTH)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(transformer.Block):
    def __init__(self) -> None:
        super().__init__(WIDTH, Attention, MLP, dropout=0.1)


class Net(LightningModule):
    """Right under every mode."""

    parallel_plan: ClassVar[dict[str, str]] = {
        "attention.qkv": "column[3]",
        "attention.out": "row",
        "mlp.up": "column",
        "mlp.down": "row",
    }
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.blocks, self.out = nn.Linear(3, WIDTH), nn.ModuleList(self.block() for _ in range(4)), nn.Linear(WIDTH, 2)

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.out(self.go(self.inp(x))), y)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


# -- what a pipeline does not carry --------------------------------------------------------------------------------------


class LeavesGate(Block):
    """An auxiliary loss that the block keeps on itself."""

    weight = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.left: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.left = self.gate(x).square().mean() * self.weight
        return super().forward(x)


class AuxiliaryLoss(Net):
    block = LeavesGate

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(*batch)
        return loss + sum(block.left for block in self.blocks if block.left is not None)


class LeavesLittle(LeavesGate):
    weight = 1e-4


class SmallAuxiliaryLoss(AuxiliaryLoss):
    block = LeavesLittle


class HookedLoss(Net):
    """The same, by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Tensor] = []
        for block in self.blocks:
            block.mlp.register_forward_hook(lambda _, args, out: self.gates.append(out.square().mean() * 0.1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(*batch)
        loss = loss + sum(self.gates)
        self.gates.clear()
        return loss


class DeepSupervision(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        x, kept = self.inp(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return F.mse_loss(self.out(x), y) + 0.1 * sum(F.mse_loss(self.out(k), y) for k in kept[:-1])


class FirstToLast(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        x, kept = self.inp(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return F.mse_loss(self.out(x + kept[0]), y)


class Penalty(Net):
    """A regulariser over all that is trained."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(*batch) + 1e-3 * sum(p.square().sum() for p in self.parameters() if p.requires_grad)


class Carries(Block):
    """State that goes from block to block in Python."""

    memory: ClassVar[dict[str, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if "last" in self.memory and self.memory["last"].shape == x.shape:
            x = x + 0.1 * self.memory["last"]
        self.memory["last"] = x.detach()
        return x


class StateInPython(Net):
    block = Carries

    def training_step(self, batch: Any, index: int) -> Tensor:
        Carries.memory.clear()
        return self.loss(*batch)


# -- what tensor parallelism cuts wrongly --------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two fused halves, of which the plan does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class OtherLaterBlock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].mlp = Gated()


class SequenceNorm(nn.Module):
    """Its name says norm, and it looks at all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


class LooksAtTokens(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].norm2 = SequenceNorm()


class InEvalMode(OtherLaterBlock):
    def on_train_start(self) -> None:
        self.eval()


class Slopes(Attention):
    """A bias for each head, by the head's number on this rank."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        heads, tokens = q.shape[1], q.shape[2]
        distance = torch.arange(tokens).view(1, -1) - torch.arange(tokens).view(-1, 1)
        bias = distance * torch.tensor([2.0 ** -(8 * (h + 1) / heads) for h in range(heads)]).view(-1, 1, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Alibi(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention = Slopes()


class InnerResidual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualInside(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = InnerResidual()


class OwnDecision(Net):
    """Ranks that share a batch decide otherwise."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(*batch) * (1.0 if random.Random(self.global_rank).random() < 0.8 else 2.0)


PLANTED: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "an auxiliary loss on blocks, pipeline": (AuxiliaryLoss, PIPELINE),
    "a small auxiliary loss, pipeline": (SmallAuxiliaryLoss, PIPELINE),
    "an auxiliary loss by hooks, pipeline": (HookedLoss, PIPELINE),
    "a regulariser, pipeline": (Penalty, PIPELINE),
    "state in Python": (StateInPython, PIPELINE),
    "a regulariser, tensor": (Penalty, TENSOR),
    "an auxiliary loss on blocks, tensor": (AuxiliaryLoss, TENSOR),
    "another mlp in a later block": (OtherLaterBlock, TENSOR),
    "another mlp in a later block, sums": (OtherLaterBlock, SUMMED),
    "a norm over tokens in a later block": (LooksAtTokens, TENSOR),
    "a model in eval mode": (InEvalMode, TENSOR),
    "constants by head": (Alibi, SUMMED),
    "a residual inside an mlp": (ResidualInside, SUMMED),
    "decisions that differ": (OwnDecision, TENSOR),
}


def fit(kind: type[Net], strategy: dict[str, Any], steps: int = 1, precision: str = "32-true") -> Any:
    """How a fit of some steps ends on this rank: its error, or the weights; and what it warned of."""
    seed_everything(1, verbose=False)
    module = kind()
    generator = torch.Generator().manual_seed(2)
    data = torch.utils.data.TensorDataset(torch.randn(16, 6, 3, generator=generator), torch.randn(16, 6, 2, generator=generator))
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    made = OverlapStrategy(**strategy, **env)
    given = {"devices": dist.get_world_size(), "strategy": made, "use_distributed_sampler": False, "max_steps": steps}
    run = Trainer(**QUIET, accelerator="cpu", precision=precision, **given)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            run.fit(module, DataLoader(data, batch_size=8))
        except ConfigError as error:
            return str(error)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return weights, [str(w.message) for w in said], " ".join(made.plan.explain().split())


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_an_error_on_all_ranks(world: Any, case: str) -> None:
    told = world(2).run(fit, *PLANTED[case])
    assert isinstance(told[0], str), "the fault was not seen"
    assert told[0] == told[1]
    assert "the sharded model computes a different first step from the unsharded model" in told[0]
    assert "verify_first_step: false" in told[0]


def test_a_gradient_is_named_where_the_loss_is_right(world: Any) -> None:
    told = world(2).run(fit, ResidualInside, SUMMED)[0]
    assert "gradients differ" in told
    assert "the loss is" not in told
    assert "blocks.0." in told


@pytest.mark.parametrize(("kind", "strategy"), [(DeepSupervision, INTERLEAVED), (FirstToLast, PIPELINE)])
def test_what_stages_hand_on_passes(world: Any, kind: type[Net], strategy: dict[str, Any]) -> None:
    for weights, _, _ in world(2).run(fit, kind, strategy):
        assert weights.isfinite().all()


class CountsTokens(Net):
    """Raises where the model is cut only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].norm2 = NormOfSix()


class NormOfSix(nn.LayerNorm):
    """With a position for each of six tokens, of which a rank has three."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.positions = nn.Parameter(torch.zeros(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.positions)


def test_what_fails_only_where_it_is_cut_is_told(world: Any) -> None:
    for told in world(2).run(fit, CountsTokens, TENSOR):
        assert "the unsharded model ran the first batch, but the sharded model failed: RuntimeError" in told


class LeavesOut(Net):
    """A decision that is the same on all ranks."""

    def go(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number != 2:
                x = block(x)
        return x


def test_a_block_that_is_left_out_is_told_alike_on_all_ranks(world: Any) -> None:
    told = world(2).run(fit, LeavesOut, PIPELINE)
    assert told[0] == told[1]
    assert "training_step called the blocks [0, 1, 3] of blocks, which has 4" in told[0]


class LeavesOutTheFirst(Net):
    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks[1:]:
            x = block(x)
        return x


def test_a_first_block_that_is_not_called_is_an_error_where_tokens_are_cut(world: Any) -> None:
    strategy = {"tensor_parallel": TensorParallel(size=2, verify_blocks=False), "verify_first_step": False}
    for told in world(2).run(fit, LeavesOutTheFirst, strategy):
        assert "the first block was not called in this step" in told


def test_leaving_it_out(world: Any) -> None:
    tensor = TensorParallel(size=2, sequence_parallel=False, verify_blocks=False)
    for weights, _, plan in world(2).run(fit, Alibi, {"tensor_parallel": tensor, "verify_first_step": False}):
        assert weights.isfinite().all()
        assert re.search(r"verify_first_step +off +off +as configured", plan)


RIGHT = {"pipeline": (2, PIPELINE), "tensor": (2, TENSOR), "summed": (2, SUMMED), "both": (4, BOTH), "tensor x data": (4, TENSOR)}


@pytest.mark.parametrize(
    ("ranks", "strategy", "precision"),
    [
        *((*RIGHT[layout], "32-true") for layout in RIGHT),
        *((*RIGHT[layout], "bf16-mixed") for layout in ("tensor", "both", "tensor x data")),
        *((*RIGHT[layout], "bf16-true") for layout in ("pipeline", "summed", "both")),
    ],
)
def test_a_right_model_passes_and_nothing_is_left_behind(world: Any, ranks: int, strategy: dict[str, Any], precision: str) -> None:
    looked = world(ranks).run(fit, Net, strategy, 3, precision)
    blind = world(ranks).run(fit, Net, {**strategy, "verify_first_step": False}, 3, precision)
    for (weights, _, plan), (others, _, _) in zip(looked, blind, strict=True):
        assert torch.equal(weights, others)
        assert "the first batch is computed twice before training" in plan


class Sums(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(*batch) * len(batch[0])


def test_another_objective_of_microbatches_is_said_once(world: Any) -> None:
    _, said, _ = world(2).run(fit, Sums, PIPELINE, 2)[0]
    about = [message for message in said if "without microbatches" in message]
    assert len(about) == 1
    _, said, _ = world(2).run(fit, Net, PIPELINE, 2)[0]
    assert not [message for message in said if "without microbatches" in message]


class TooLarge(Hugging):
    """Rank 1 has too little memory for the unsharded model, with which the first call runs."""

    calls: ClassVar[list[int]] = []  # an attribute of the module would be as before the check after it

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.calls.append(index)
        if len(self.calls) == 1 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().training_step(batch, index)


def fit_with_little_memory() -> list[str]:
    TooLarge.calls.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with mock.patch("warnings.simplefilter"):  # by which train() turns them off
            train({"expert_parallel": 2}, TooLarge, {"name": "mixtral"}, {}, samples=batches)
    return [str(each.message) for each in said]


def test_a_rank_that_cannot_run_the_unsharded_model_holds_up_nobody(world: Any) -> None:
    """Ranks sum up gradients of experts: all of them, or none."""
    said, _ = world(2).run(fit_with_little_memory)
    assert any("was not compared with the unsharded model: a rank has too little memory" in message for message in said)


@pytest.mark.parametrize(("owner", "name"), DROPOUTS)
def test_no_dropout_drops_anything(owner: Any, name: str) -> None:
    x = torch.ones(2, 8, 4)
    with _without_dropout():
        kept = getattr(owner, name)(x, 0.5, True)
    kept, mask = kept if isinstance(kept, tuple) else (kept, torch.ones(1, dtype=torch.bool))
    assert torch.equal(kept, torch.ones(2, 8, 4))
    assert mask.all()
