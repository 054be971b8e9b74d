"""Models that a cut would train wrongly: they are refused with a sentence, or their numbers are those of one process."""

import copy
import pickle
import random
import tempfile
import warnings
from itertools import product
from typing import Any

import numpy as np
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
from lightning_overlap.strategy.batches import CHECKED_BATCHES
from lightning_overlap.strategy.probe import examine
from tests.helpers.sequences import QUIET
from tests.trainer.tensor.test_numbers import MLP, Attention, Block, Net


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


class Fused(nn.Module):
    """An mlp that splits what goes up, of which the plan knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 128), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Sloped(Attention):
    """Adds a bias by head, of as many heads as there are on this rank."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        places = torch.arange(q.shape[-2])
        bias = (places[None, :] - places[:, None]) * 2.0 ** -torch.arange(1, q.shape[1] + 1)[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Placed(Block):
    """Learned positions in each block, whose own forward counts the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.places[: x.shape[1]])


class Changing(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.masked_fill_(x > 1, 0.0))


class Chancy(Block):
    """Left out at random, and leaving samples out."""

    def __init__(self) -> None:
        super().__init__(16, True, 0.0)
        self.drawn: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        if self.drawn[-1] < 0.5:
            return x
        kept = torch.bernoulli(torch.full((len(x), 1, 1), 0.5))
        self.drawn.append(kept.flatten().tolist())
        return x + (super().forward(x) - x) * kept


class Conditioned(Block):
    def forward(self, x: Tensor, condition: Any = 0.0) -> Tensor:
        return super().forward(x + (condition[0][:, None] if isinstance(condition, tuple) else condition))


class Awkward(Net):
    def __init__(self, kind: str) -> None:  # noqa: C901  # a list of cases
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
            if kind == "slopes":
                block.attention.__class__ = Sloped
                for parameter in block.parameters():
                    parameter.data.mul_(0.1 if parameter.dim() > 1 else 1)
            if kind == "counted tokens":
                block.__class__, block.places = Placed, nn.Parameter(torch.randn(64, 16))
            if kind == "changed input":
                block.mlp.__class__ = Changing
            if kind == "collected":
                block.mlp.register_forward_hook(lambda *args: self.collected.append(args[2].square().mean()))
            if kind == "condition":
                block.__class__ = Conditioned
        self.collected: list[Tensor] = []
        if kind == "another mlp":
            self.blocks[2].mlp = Fused()
        if kind == "eval mode":
            self.blocks.eval()
            self.__dict__["parallel_plan"] = {**self.parallel_plan, "attention.qkv": "column[1]"}
        if kind == "shared norm":
            self.norm = self.blocks[1].norm2
        if kind == "one block":
            self.blocks = nn.ModuleList([self.blocks[0]] * 3)
        if kind == "unequal heads":
            for block in self.blocks:
                block.attention.__class__ = Counting

    def on_train_start(self) -> None:
        if self.kind == "changed weights":
            for parameter in self.blocks.parameters():
                parameter.data.mul_(1.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        self.seen: Any = 0.0
        if self.kind == "random numbers":
            x = F.dropout(x, 0.5) * random.random() + float(np.random.rand())
        given = ((self.head.weight[:1] + x.mean((0, 1)),),) if self.kind == "condition" else ()
        for block in list(self.blocks)[: 2 if self.kind == "left out" and self.global_step >= CHECKED_BATCHES else 3]:
            x = block(x, *given)
            self.seen = self.seen + (x.square().mean() if self.kind == "between" else 0.0)
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:
        if self.kind == "left out":
            return F.cross_entropy(self(batch).mean(1), batch[:, 0])
        loss = super().loss(batch) + self.seen
        if self.kind == "collected":
            loss = loss + sum(self.collected)
            self.collected.clear()
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


def train(kind: str, sequence: Any, proven: bool = True) -> Any:
    warnings.simplefilter("ignore")
    world = dist.is_initialized()
    seed_everything(5, verbose=False)
    module = Awkward(kind)
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if world:
        seed_everything(5 + dist.get_rank(), verbose=False)
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        tensor = TensorParallel(size=2, sequence_parallel=sequence, vocab_parallel=False)
        chosen = OverlapStrategy(tensor_parallel=tensor, verify_first_step="auto" if proven else False, **env)
    length: dict[str, Any] = {"max_steps": CHECKED_BATCHES + 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    if kind == "searched rate":
        length |= {"callbacks": [LearningRateFinder(num_training_steps=2)], "default_root_dir": tempfile.gettempdir()}
    run = Trainer(accelerator="cpu", devices=2 if world else 1, strategy=chosen, **QUIET, **length)  # type: ignore[arg-type]
    try:
        run.fit(module)
    except ConfigError as error:
        return str(error)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


KINDS = list(
    product(["shared norm", "two backwards", "adagrad", "recomputed", "one block", "router", "changed weights"], ["auto", False])
)


@pytest.mark.parametrize(("kind", "sequence"), [*KINDS, ("kept output", False), ("collected", False)])
def test_the_numbers_of_one_process(world: Any, kind: str, sequence: Any) -> None:
    if kind == "adagrad" and not examine(torch.optim.Adagrad([nn.Parameter(torch.ones(4, 4))])).known:
        pytest.skip("Adagrad of this version of torch (2.10, say) has state for the parameters only that it is made with")
    expected = train(kind, None)
    for found in world(2).run(train, kind, sequence, sequence == "auto"):
        assert not isinstance(found, str), found
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


REFUSED: dict[str, tuple[Any, str]] = {
    "residual": (False, "other gradients when its layers are sharded, of "),
    "scale": (False, "other gradients when its layers are sharded, of blocks.0.mlp.scale"),
    "unequal heads": ("auto", "blocks.0 fails when its layers are sharded: "),
    "eval mode": ("auto", "blocks.0 computes another output when its layers are sharded"),
    "another mlp": ("auto", "blocks.2 computes another output when its layers are sharded"),
    "slopes": (False, "ALiBi's slopes"),
    "counted tokens": ("auto", "set tensor_parallel.sequence_parallel: false"),
    "changed input": (False, "masked_fill_ changes the input of an attention or mlp"),
    "condition": ("auto", "a block is called with a second tensor that needs a gradient"),
    "between": ("auto", "share a batch but computed different losses"),
    "kept output": ("auto", "share a batch but computed different losses"),
    "own backward": ("auto", "call self.manual_backward(loss)"),
    "searched rate": ("auto", "cannot load weights during a fit"),
    "left out": ("auto", "the last block was not called in this step"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_on_every_rank(world: Any, kind: str) -> None:
    sequence, words = REFUSED[kind]
    for said in world(2).run(train, kind, sequence, False):
        assert words in said


@pytest.mark.parametrize("sequence", ["auto", False])
def test_replicated_weights_stay_alike_where_ranks_are_seeded_otherwise(world: Any, sequence: Any) -> None:
    first, second = world(2).run(train, "random numbers", sequence)
    for name, weight in first.items():
        assert weight.equal(second[name]), name


def left_to_chance(sequence: bool) -> Any:
    """The weights, and what the blocks have drawn."""
    warnings.simplefilter("ignore")
    cut = dist.is_initialized()
    seed_everything(5, verbose=False)
    module = Net()
    module.blocks = nn.ModuleList(Chancy() for _ in range(3))
    module.on_train_start = lambda: torch.manual_seed(7) and None  # type: ignore[method-assign]
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    if cut:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        chosen = OverlapStrategy(tensor_parallel=TensorParallel(size=2, sequence_parallel=sequence), **env)
    length: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 0, "use_distributed_sampler": False}
    Trainer(accelerator="cpu", devices=2 if cut else 1, strategy=chosen, **QUIET, **length).fit(module)  # type: ignore[arg-type]
    return {name: p.detach().clone() for name, p in module.named_parameters()}, [block.drawn for block in module.blocks]


@pytest.mark.parametrize("sequence", [True, False])
def test_what_blocks_decide_at_random_is_what_one_process_decides(world: Any, sequence: bool) -> None:
    expected, drawn = left_to_chance(sequence)
    for found, drawn_there in world(2).run(left_to_chance, sequence):
        assert drawn_there == drawn
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Masked(Block):
    """Activation checkpoints inside of a block, around what dropout is in."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(lambda x: self.drop(self.mlp(self.norm1(x))), x, use_reentrant=self.reentrant)

    def drop(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5)
        self.masks.append((x == 0).flatten()[:32].tolist())
        return x.sin()  # keeps its input, so that what runs again comes to here


def masks_of_checkpoints(reentrant: bool, outer: bool | None) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module = Net(tokens=8, recompute=outer)
    for block in module.blocks:
        block.__class__, block.masks, block.reentrant = Masked, [], reentrant
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(tensor_parallel=TensorParallel(size=2, sequence_parallel=True, verify_blocks=False), **env)
    Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, limit_val_batches=0, **QUIET).fit(module)  # type: ignore[arg-type]
    return [block.masks for block in module.blocks]


@pytest.mark.parametrize(("reentrant", "outer"), [(False, None), (True, None), (False, False), (True, True)])
def test_what_runs_again_draws_the_same_masks(world: Any, reentrant: bool, outer: bool | None) -> None:
    first, second = world(2).run(masks_of_checkpoints, reentrant, outer)
    for mine, theirs in zip(first, second, strict=True):
        assert len(mine) > 1
        assert all(mask == mine[0] for mask in mine)
        assert mine[0] != theirs[0]


class Copied(Net):
    """Copies and pickles its parts in the middle of a step, and computes with the copies on one rank alone."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        twins = [copy.deepcopy(self.blocks[0]), pickle.loads(pickle.dumps(self.blocks[0]))]
        others = [copy.deepcopy(self.head), pickle.loads(pickle.dumps(self.embedding))]
        if self.global_rank == 0:
            for twin in (*twins, *others):
                for parameter in twin.parameters():
                    parameter.data.zero_()
            for twin in twins:
                x = torch.randn(2, 5, 16)
                assert twin(x).equal(x), "a block that adds nothing"
            assert not others[0](x).any()
            assert others[1](torch.zeros(2, 5, dtype=torch.long)).equal(torch.zeros(2, 5, 16))
        return super().training_step(batch, index)


def copied(sequence: bool) -> None:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(tensor_parallel=TensorParallel(size=2, sequence_parallel=sequence, vocab_parallel=True), **env)
    length: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0}
    Trainer(accelerator="cpu", devices=2, strategy=strategy, **QUIET, **length).fit(Copied())  # type: ignore[arg-type]


@pytest.mark.parametrize("sequence", [True, False])
def test_copies_and_pickles_are_ordinary_modules(world: Any, sequence: bool) -> None:
    world(2).run(copied, sequence)
