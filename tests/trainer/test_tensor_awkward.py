"""Models that a cut would train wrongly: they are refused with a sentence, or their numbers are those of one process."""

import tempfile
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap import ConfigError, OverlapStrategy, TensorParallel
from lightning_overlap.strategy import CHECKED_BATCHES
from tests.trainer.test_tensor import MLP, QUIET, Attention, Block, Net


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaled(MLP):
    def __init__(self) -> None:
        super().__init__(16, True)
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Routed(MLP):
    """With losses of a router's, one left on the module and one in the result."""

    def __init__(self) -> None:
        super().__init__(16, True)
        self.router = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        p = self.router(x).softmax(-1)
        self.left = p.mean((0, 1)).square().sum()
        return super().forward(x), p.amax(-1).mean()


class Kept(MLP):
    """With its output left on the module, for a regulariser."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.left = 10 * out.square().mean()
        return out


class Routing(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        more, self.given = self.mlp(self.norm2(x))
        return x + more


class Recomputed(Block):
    """A reentrant checkpoint, which knows no gradients of chosen tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, self.norm1(x), use_reentrant=True)


class Conditioned(Block):
    def forward(self, x: Tensor, condition: Any = 0.0) -> Tensor:
        return super().forward(x + (condition[0][:, None] if isinstance(condition, tuple) else condition))


class Awkward(Net):
    def __init__(self, kind: str) -> None:
        super().__init__(dropout=0.5 if kind == "random numbers" else 0.0)
        self.lr = 0.01
        self.kind, self.automatic_optimization = kind, kind not in ("two backwards", "own backward")
        for block in self.blocks:
            if kind == "residual":
                block.mlp.__class__ = Residual
            if kind == "scale":
                block.mlp = Scaled()
            if kind == "router":
                block.mlp, block.__class__ = Routed(), Routing
            if kind == "kept output":
                block.mlp.__class__ = Kept
            if kind == "recomputed":
                block.__class__ = Recomputed
            if kind == "condition":
                block.__class__ = Conditioned
        if kind == "shared norm":
            self.norm = self.blocks[1].norm2
        if kind == "one block":
            self.blocks = nn.ModuleList([self.blocks[0]] * 3)
        if kind == "unequal heads":
            for block in self.blocks:
                block.attention.__class__ = Counting

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        self.seen: Any = 0.0
        if self.kind == "random numbers":
            x = F.dropout(x, 0.5)
        given = ((self.head.weight[:1] + x.mean((0, 1)),),) if self.kind == "condition" else ()
        for block in list(self.blocks)[: 2 if self.kind == "left out" and self.global_step >= CHECKED_BATCHES else 3]:
            x = block(x, *given)
            self.seen = self.seen + (x.square().mean() if self.kind == "between" else 0.0)
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:
        if self.kind == "left out":
            return F.cross_entropy(self(batch).mean(1), batch[:, 0])
        loss = super().loss(batch) + self.seen
        if self.kind == "kept output":
            return loss + sum(block.mlp.left for block in self.blocks)
        return loss + sum(block.mlp.left + block.given for block in self.blocks) if self.kind == "router" else loss

    def training_step(self, batch: Tensor, index: int) -> Any:
        if self.automatic_optimization:
            return super().training_step(batch, index)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for part in (batch[:1], batch[1:]):
            loss = self.loss(part)
            self.manual_backward(loss) if self.kind == "two backwards" else loss.backward()
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        kind = torch.optim.Adagrad if self.kind == "adagrad" else torch.optim.SGD
        return kind([p for name, p in self.named_parameters() if self.kind != "adagrad" or "qkv.bias" not in name], 0.01)


class Counting(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape) + self.qkv(x).split(16, dim=-1)[2]


def train(kind: str, sequence: Any) -> Any:
    warnings.simplefilter("ignore")
    world = dist.is_initialized()
    seed_everything(5, verbose=False)
    module = Awkward(kind)
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if world:
        seed_everything(5 + dist.get_rank(), verbose=False)
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        chosen = OverlapStrategy(tensor_parallel=TensorParallel(size=2, sequence_parallel=sequence, vocab_parallel=False), **env)
    length: dict[str, Any] = {"max_steps": CHECKED_BATCHES + 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    if kind == "searched rate":
        length |= {"callbacks": [LearningRateFinder(num_training_steps=2)], "default_root_dir": tempfile.gettempdir()}
    run = Trainer(accelerator="cpu", devices=2 if world else 1, strategy=chosen, **QUIET, **length)  # type: ignore[arg-type]
    try:
        run.fit(module)
    except ConfigError as error:
        return str(error)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


KINDS = list(product(["shared norm", "two backwards", "adagrad", "recomputed", "one block", "router"], ["auto", False]))


@pytest.mark.parametrize(("kind", "sequence"), [*KINDS, ("kept output", False)])
def test_the_numbers_of_one_process(world: Any, kind: str, sequence: Any) -> None:
    expected = train(kind, None)
    for found in world(2).run(train, kind, sequence):
        assert not isinstance(found, str), found
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


REFUSED: dict[str, tuple[Any, str]] = {
    "residual": (False, "other gradients when its layers are cut over the ranks, of "),
    "scale": (False, "other gradients when its layers are cut over the ranks, of blocks.0.mlp.scale"),
    "unequal heads": ("auto", "blocks.0 fails when its layers are cut over the ranks: "),
    "condition": ("auto", "a block is called with a second tensor that gradients flow through"),
    "between": ("auto", "share a batch and come to the losses"),
    "kept output": ("auto", "share a batch and come to the losses"),
    "own backward": ("auto", "call self.manual_backward(loss)"),
    "searched rate": ("auto", "weights are loaded in the middle of a fit"),
    "left out": ("auto", "the last block was left out in this step"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_on_every_rank(world: Any, kind: str) -> None:
    sequence, words = REFUSED[kind]
    for said in world(2).run(train, kind, sequence):
        assert words in said


@pytest.mark.parametrize("sequence", ["auto", False])
def test_replicated_weights_stay_alike_where_ranks_are_seeded_otherwise(world: Any, sequence: Any) -> None:
    first, second = world(2).run(train, "random numbers", sequence)
    for name, weight in first.items():
        assert weight.equal(second[name]), name
