"""Nothing that a step or a fit has made is left behind: objects, tensors, descriptors, threads and connections stay as many."""

import gc
import json
import os
import tempfile
import warnings
from array import array
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_overlap import OverlapStrategy, PipelineParallel, TensorParallel

SHORT = {"steps": (10, 30), "fits": 4}
"""Four fits, since what one fit happens to leave once (a socket that a thread still closes) is one more after two, as a leak is."""
LONG = {"steps": (100, 400), "fits": 20}
"""With ``--long``: flat over 300 steps and 20 fits."""
PER_STEP = {"tensor bytes": 1000}
"""What may be more after each step, of all else less than one in two steps. What is counted while a loop runs differs by a few, and
buffers that are used again are as many as transfers have been in flight at once."""


class Block(nn.Module):
    """Two regions, of which one has two column layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(16), Attention(), MLP()

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.value(x).tanh())


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Net(LightningModule):
    parallel_plan = {  # noqa: RUF012
        "blocks": "blocks",
        "attention.value": "column",
        "attention.out": "row",
        "mlp.gate": "column",
        "mlp.up": "column",
        "mlp.down": "row",
        "embedding": "vocab_embedding",
        "head": "vocab_head",
    }

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)

    def training_step(self, ids, index):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())
        self.log("loss", loss)
        return loss

    def validation_step(self, ids, index):
        self.log("val_loss", self.training_step(ids, index), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def counted():
    """What there is in this process, by kind, as a string, which is no object that is counted."""
    gc.collect()
    objects = gc.get_objects()
    found = Counter(f"{type(x).__module__}.{type(x).__qualname__}" for x in objects)
    del found["torch.storage.UntypedStorage"]  # which the next lines make
    found["builtins.list"] -= len(dist.distributed_c10d._world.tags_to_pg)  # torch keeps an empty list of each group that has ended
    storages = {}
    with torch._C.DisableTorchFunctionSubclass():  # placeholders would be gathered
        for x in objects:
            # torch.compile keeps what it was compiling when an earlier test's error came: placeholders and fake tensors
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and x.layout == torch.strided and not x.is_meta:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    targets = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    found["tensor bytes"] = sum(storages.values())
    found["descriptors"] = len(targets)
    found["sockets"] = sum(target.startswith("socket:") for target in targets)
    found["threads"] = len(os.listdir("/proc/self/task"))
    return json.dumps(found)


def identities():
    """The ids of all objects, as bytes, which are no object that is counted."""
    return array("Q", map(id, gc.get_objects())).tobytes()


def holders(kind, before):
    """Of objects of a kind that are new: what refers to them."""
    known = set(array("Q", before))
    new = [x for x in gc.get_objects() if f"{type(x).__module__}.{type(x).__qualname__}" == kind and id(x) not in known]
    return [f"{x!r:.150} in {[f'{type(y).__qualname__} {y!r:.300}' for y in gc.get_referrers(x) if y is not new]}" for x in new[-5:]]


def grown(before, after, times):
    """What there is more of after so many steps or fits."""
    first, last = json.loads(before), json.loads(after)
    return {kind: more for kind in last if (more := last[kind] - first.get(kind, 0)) > PER_STEP.get(kind, 0.45) * times}


class Counts(Callback):
    def __init__(self, at):
        self.at, self.found = at, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.at:
            trainer.strategy.checkpoints.wait()
            self.found.append(counted())


def fit(strategy, settings, steps, folder):
    counts = Counts(steps)
    saving = ModelCheckpoint(folder, "{step}", save_top_k=1, monitor="step", mode="max", save_last=True, every_n_train_steps=5)
    module, devices = Net(), dist.get_world_size()
    data = DataLoader(torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(3)), batch_size=2)
    chosen = OverlapStrategy(**strategy, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 1,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=chosen, max_steps=steps[-1], callbacks=[counts, saving], **quiet, **settings
    )
    trainer.fit(module, data, data)
    return counts.found


def growth(layout, steps, fits):
    """What has grown over the steps of a fit, and over fits, on this rank; of the latter also what holds it."""
    warnings.simplefilter("ignore")
    _, strategy, settings = LAYOUTS[layout]
    folder = tempfile.mkdtemp()
    with mock.patch("lightning_overlap.ranks.members.REMEMBERED_TRANSFERS", 4):  # transfers, for errors: as many as that are kept
        fit(strategy, settings, (2, 4), folder)  # of what is made once
        after = []
        for number in range(fits):
            fit(strategy, settings, (2, 4), folder)
            after.append(counted())
            if number == 0:
                known = identities()
        over_fits = {kind: (more, holders(kind, known)) for kind, more in grown(after[0], after[-1], fits - 1).items()}
        few, many = fit(strategy, settings, steps, folder)
    return grown(few, many, steps[1] - steps[0]), over_fits


SEQUENCE = TensorParallel(size=2)
WHOLE = TensorParallel(size=2, sequence_parallel=False)
PIPELINE = PipelineParallel(size=2, microbatches=2)
MIXED = {"precision": "bf16-mixed"}
LAYOUTS = {
    "dp2": (2, {}, {}),
    "dp2, bf16-mixed": (2, {}, MIXED),
    "dp2, sharded in the background": (2, {"state_dict_type": "sharded", "async_save": True}, {}),
    "tp2": (2, {"tensor_parallel": SEQUENCE}, {}),
    "tp2, bf16-mixed": (2, {"tensor_parallel": SEQUENCE}, MIXED),
    "tp2, all tokens": (2, {"tensor_parallel": WHOLE}, {}),
    "tp2, all tokens, bf16-mixed": (2, {"tensor_parallel": WHOLE}, MIXED),
    "pp2": (2, {"pipeline_parallel": PIPELINE}, {}),
    "tp2, lanes": (2, {"tensor_parallel": SEQUENCE, "pipeline_parallel": PipelineParallel(microbatches=2, lanes=True)}, {}),
    "tp2 x pp2": (4, {"tensor_parallel": SEQUENCE, "pipeline_parallel": PIPELINE}, {}),
    "dp2 x tp2, bf16-mixed, sharded": (4, {"tensor_parallel": SEQUENCE, "state_dict_type": "sharded"}, MIXED),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_left_of_a_step_or_a_fit(world, layout, request, monkeypatch):
    size = LAYOUTS[layout][0]
    lengths, workers = SHORT, world(size)
    if request.config.getoption("--long"):
        lengths = LONG
        monkeypatch.setattr(workers, "timeout", 3600.0)
    assert workers.run(growth, layout, lengths["steps"], lengths["fits"]) == [({}, {})] * size
