"""Tensor and sequence parallelism through Trainer: the numbers of one process, and what Lightning's users rely on."""

import warnings
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_overlap import ConfigError, OverlapStrategy, PipelineParallel, TensorParallel
from tests.helpers import sequences, transformer
from tests.helpers.pairwise import pairwise
from tests.helpers.sequences import QUIET, compare

VOCABULARY = 31
"""Entries that no number of ranks divides."""


class Attention(transformer.Attention):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__(width, bias, norm_queries=True)


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width, bias=bias), nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(transformer.Block):
    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__(width, lambda: Attention(width, bias), lambda: MLP(width, bias), dropout)


class Net(LightningModule):
    """A vocabulary that nothing divides, biases, a norm of each query's head; blocks recomputed in backward, or not."""

    parallel_plan: ClassVar[dict[str, str]] = {
        "attention.qkv": "column[3]",
        "attention.out": "row",
        "mlp.gate": "column",
        "mlp.up": "column",
        "mlp.down": "row",
        "embedding": "vocab_embedding",
        "head": "vocab_head",
    }

    def __init__(
        self,
        bias: bool = True,
        dropout: float = 0.0,
        tied: bool = False,
        recompute: bool | None = None,
        tokens: int = 9,
        optimizer: str = "sgd",
        plan: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["parallel_plan"] = {name: role for name, role in {**self.parallel_plan, **(plan or {})}.items() if role}
        self.recompute, self.length, self.optimizer = recompute, tokens, optimizer
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(Block(16, bias, dropout) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.losses: list[float] = []
        self.masks: list[Any] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def loader(self) -> DataLoader:
        return DataLoader(sequences.token_samples(self.length, VOCABULARY), batch_size=4)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader


def train(strategy: dict[str, Any] | None, model: dict[str, Any], **options: Any) -> Any:
    """Trains as one rank of the world, or alone: see :func:`tests.helpers.sequences.train`."""
    return sequences.train(strategy, Net, model, {"tokens": model.get("tokens", 9), "vocabulary": VOCABULARY}, **options)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "even length": ({"tokens": 8}, {}),
    "no bias, tied": ({"bias": False, "tied": True}, {}),
    "one token": ({"tokens": 1}, {}),
    "accumulation and clipping": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "recomputed": ({"recompute": False}, {}),
    "recomputed, reentrant": ({"recompute": True}, {}),
}


@pytest.mark.parametrize(("case", "size", "sequence"), pairwise(CASES, (2, 4), (True, False)))
def test_close_to_one_process(world: Any, case: str, size: int, sequence: bool) -> None:
    model, trainer = CASES[case]
    expected = train(None, model, **trainer)
    strategy = {"tensor_parallel": TensorParallel(vocab_parallel=True, size=size, sequence_parallel=sequence)}
    found = world(size).run(train_with, strategy, model, trainer)
    for rank in range(size):
        compare(found[rank], expected)
    assert f"tensor {size}" in found[0]["plan"]


def train_with(strategy: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any]) -> Any:
    return train(strategy, model, **trainer)


MIXTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor x data": (4, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2)}),
    "tensor x data, replicated tokens": (4, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2, sequence_parallel=False)}),
    "tensor x data, plain": (4, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2), "overlap": "off"}),
    "tensor x pipeline": (
        4,
        {
            "tensor_parallel": TensorParallel(vocab_parallel=True, size=2),
            "pipeline_parallel": PipelineParallel(size=2, microbatches=2),
        },
    ),
    "tensor x pipeline x data": (
        8,
        {
            "tensor_parallel": TensorParallel(vocab_parallel=True, size=2),
            "pipeline_parallel": PipelineParallel(size=2, microbatches=2),
        },
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_with_other_modes(world: Any, mixture: str, tied: bool) -> None:
    size, strategy = MIXTURES[mixture]
    model = {"tied": tied, "tokens": 8}
    trainer = {"gradient_clip_val": 0.5}
    for found in world(size).run(train_with, strategy, model, trainer):
        compare({**found, "losses": []}, {**train(None, model, **trainer), "losses": []})


@pytest.mark.parametrize("sequence", [True, False])
def test_bf16(world: Any, sequence: bool) -> None:
    trainer = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    expected = train(None, {}, **trainer)
    for found in world(2).run(
        train_with, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2, sequence_parallel=sequence)}, {}, trainer
    ):
        compare(found, expected, tolerance=1e-2)  # bf16 keeps 8 bits of each activation, and a sum of two halves rounds twice


def test_a_whole_vocabulary(world: Any) -> None:
    expected = train(None, {})
    for found in world(2).run(train_with, {"tensor_parallel": 2}, {}, {}):
        compare(found, expected)
        assert "31 entries: sums over the ranks" in found["plan"]


def test_off_and_keeping_inputs_are_the_same_layout(world: Any) -> None:
    expected = train(None, {})
    for strategy in ({"overlap": "off"}, {}):
        keeping = TensorParallel(vocab_parallel=True, size=2, keep_gathered_input=True, splits=3)
        for found in world(2).run(train_with, {"tensor_parallel": keeping, **strategy}, {}, {}):
            compare(found, expected)


@pytest.mark.parametrize("data", [1, 2])
def test_checkpoints_are_of_the_whole_model(world: Any, data: int, tmp_path: Any) -> None:
    """From two ranks to one, to four, to a single device; and back."""
    path, other = str(tmp_path / "cut.ckpt"), str(tmp_path / "whole.ckpt")
    # Without biases: a key's has no gradient but rounding, of which Adam makes whole steps.
    model = {"optimizer": "adamw", "tied": True, "bias": False}
    half = {"max_steps": 2}
    world(2 * data).run(train_with, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2)}, model, {**half, "save": path})
    train(None, model, save=other, **half)
    expected = train(None, model, resume=other)
    mine, theirs = torch.load(path, weights_only=False), torch.load(other, weights_only=False)
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], value, rtol=1e-4, atol=1e-4)
    for number, state in theirs["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(mine["optimizer_states"][0]["state"][number][key], value, rtol=1e-4, atol=1e-5)

    # Adam divides by roots of sums that begin near zero, so that rounding shows.
    def close(found: Any) -> None:
        compare(found, expected, tolerance=1e-4)

    close(train(None, model, resume=path))
    # The files have the same values, as was seen above: each is read by one of the sizes, and with other data ranks by the other one.
    for saved, size in ((path, 4 // data), (other, 2 * data)):
        for found in world(size).run(
            train_with, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=size)}, model, {"resume": saved}
        ):
            close(found)


class Compiled(Net):
    def __init__(self, what: str) -> None:
        super().__init__()
        for number, block in enumerate(self.blocks):
            if what == "block":
                block.compile(backend="aot_eager")
            elif what == "wrapped block":
                self.blocks[number] = torch.compile(block, backend="aot_eager")
            else:
                block.mlp.compile(backend="aot_eager")


def train_compiled(what: str, sequence: bool) -> Any:
    with mock.patch(f"{__name__}.Net", Compiled):
        return train({"tensor_parallel": TensorParallel(size=2, vocab_parallel=True, sequence_parallel=sequence)}, {"what": what})


@pytest.mark.parametrize(("what", "sequence"), [("block", True), ("block", False), ("wrapped block", True), ("mlp", False)])
def test_compiled_blocks(world: Any, what: str, sequence: bool) -> None:
    """Blocks in both ways; each of the other two in one."""
    for found in world(2).run(train_compiled, what, sequence):
        weights = {name.replace("._orig_mod", ""): weight for name, weight in found["weights"].items()}
        compare({**found, "weights": weights}, train(None, {}))


def saved_in_shards(strategy: dict[str, Any], model: dict[str, Any], folder: str) -> Any:
    """A folder that is written in the middle of a fit, which goes on."""
    saving = ModelCheckpoint(folder, "two", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False)
    last = {"max_steps": 3, "enable_checkpointing": True, "callbacks": [saving]}
    return train({**strategy, "state_dict_type": "sharded"}, model, **last)


CUT: dict[str, Any] = {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2)}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, CUT),
    (4, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=4)}),
    (4, CUT),
    (4, {**CUT, "pipeline_parallel": PipelineParallel(size=2, microbatches=2)}),
    (2, {}),
]


@pytest.mark.parametrize("saved", range(len(LAYOUTS)))
def test_sharded_checkpoints_load_into_any_layout(world: Any, saved: int, tmp_path: Any) -> None:
    model = {"optimizer": "adamw", "tied": True, "bias": False, "tokens": 8}
    plain = str(tmp_path / "plain.ckpt")
    train(None, model, max_steps=2, save=plain)
    expected = train(None, model, resume=plain)
    size, layout = LAYOUTS[saved]
    world(size).run(saved_in_shards, layout, model, str(tmp_path))
    # Each layout writes once, and reads what two others have written: what it reads of a file depends on its own part only.
    for ranks, other in [*LAYOUTS, *LAYOUTS][saved + 1 : saved + 3]:
        for found in world(ranks).run(train_with, other, model, {"resume": str(tmp_path / "two.ckpt")}):
            # With data parallelism a rank's losses are of its share. The last validation is not at the same step.
            same = {"losses": [], "val_loss": 0.0}
            compare({**found, **same}, {**expected, **same}, tolerance=1e-4)


def dropped(strategy: dict[str, Any]) -> Any:
    """The masks of dropout in the first block, by rank: of the residual stream, then whether the embedding's are the same."""
    masks: list[Tensor] = []

    class Seen(Net):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.masks.append(F.dropout(torch.ones(64), 0.5))
            return super().training_step(batch, index)

    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module = Seen(dropout=0.5, tokens=8)
    module.blocks[0].dropout.register_forward_hook(lambda m, _, out: masks.append((out == 0).float()) if m.training else None)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    chosen = OverlapStrategy(**strategy, verify_first_step=False, **env)
    run = Trainer(accelerator="cpu", devices=2, strategy=chosen, max_steps=1, limit_val_batches=0, **QUIET)  # type: ignore[arg-type]
    run.fit(module)
    return masks[0].tolist(), module.masks[0].tolist()


def test_dropout_differs_where_tokens_are_cut_and_nowhere_else(world: Any) -> None:
    for sequence in (True, False):
        first, second = world(2).run(
            dropped, {"tensor_parallel": TensorParallel(vocab_parallel=True, size=2, sequence_parallel=sequence)}
        )
        assert (first[0] != second[0]) == sequence, "the residual stream"
        assert first[1] == second[1], "outside of the blocks"


class Halved(Attention):
    """Takes a part of each head's features, where it should take a part of the heads: no shape tells."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def refused(kind: str, strategy: dict[str, Any], plan: dict[str, Any] | None = None) -> str:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module = Net(plan=plan)
    if kind == "heads":
        for block in module.blocks:
            block.attention.__class__ = Halved
    if kind == "convolution":
        module.blocks[1].norm1 = nn.Sequential(nn.LayerNorm(16), nn.Conv1d(9, 9, 1))
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    with pytest.raises(ConfigError) as error:
        Trainer(
            accelerator="cpu",
            devices=2,
            strategy=OverlapStrategy(**strategy, verify_first_step=False, **env),
            max_steps=1,
            limit_val_batches=0,
            **QUIET,
        ).fit(module)
    return str(error.value)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "cut heads": ("heads", {"tensor_parallel": 2}, None, "blocks.0 computes another output when its layers are sharded"),
    "parts not told": ("", {"tensor_parallel": 2}, {"attention.qkv": "column[1]"}, "blocks.0 computes another output"),
    "a layer that mixes tokens": (
        "convolution",
        {"tensor_parallel": TensorParallel(size=2, sequence_parallel=True)},
        None,
        "blocks.1.norm1.1 may mix tokens",
    ),
    "overlap of what is not cut": (
        "",
        {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False, overlap=True)},
        None,
        "only sequence_parallel has these",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(world: Any, case: str) -> None:
    kind, strategy, plan, words = REFUSED[case]
    said = world(2).run(refused, kind, strategy, plan)
    assert said[0] == said[1]
    assert words in said[0]


def saved(strategy: dict[str, Any] | None) -> float:
    """Bytes that the blocks keep for backward in a step, weights left out."""
    kept: dict[int, int] = {}
    inside: list[bool] = []

    class Counted(Net):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            weights = {p.untyped_storage().data_ptr() for p in self.parameters()}

            def pack(x: Tensor) -> Tensor:
                storage = x.untyped_storage()
                if inside and storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage.nbytes()
                return x

            kept.clear()
            with saved_tensors_hooks(pack, lambda x: x):
                return super().training_step(batch, index)

    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module = Counted(tokens=64)
    for block in module.blocks:
        block.register_forward_pre_hook(lambda *_: inside.append(True))
        block.register_forward_hook(lambda *_: inside.pop() and None)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    chosen: Any = SingleDeviceStrategy(torch.device("cpu")) if strategy is None else OverlapStrategy(**strategy, **env)
    run = Trainer(accelerator="cpu", devices=1 if strategy is None else 2, strategy=chosen, max_steps=2, limit_val_batches=0, **QUIET)
    run.fit(module)
    return float(sum(kept.values()))


def test_activation_memory(world: Any) -> None:
    """Korthikanti et al., 2022: with sequence parallelism all of a block's activations are cut, without it norms, dropouts and the
    inputs of attention and mlp are not."""
    whole = saved(None)
    cut = world(2).run(saved, {"tensor_parallel": 2})
    replicated = world(2).run(saved, {"tensor_parallel": TensorParallel(size=2, sequence_parallel=False)})
    for rank in range(2):
        assert cut[rank] == pytest.approx(whole / 2, rel=0.05)
        assert replicated[rank] > 1.15 * cut[rank]
