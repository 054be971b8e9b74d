"""Models that were made on the meta device: each rank makes what it holds."""

import gc
import itertools
import os
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn

from lightning_overlap import ConfigError, DataParallel, OverlapStrategy, PipelineParallel
from tests.helpers.pipelined import QUIET, Block, Net, loader, refused


class NobodyInitialises(Net):
    def configure_model(self) -> None:
        self.head.bias = nn.Parameter(torch.empty(32, device="meta"))
        self.head.reset_parameters = lambda: None  # type: ignore[method-assign, assignment]


def test_what_nothing_gives_values_to_is_named(world):
    for said in world(2).run(refused, NobodyInitialises, {"size": 2, "microbatches": 2}):
        assert said.startswith("ConfigError: head.bias came from the meta device and got no values")


class OnMeta(Net):
    """Made in ``configure_model``, on the meta device, and large: a block has more bytes than all else."""

    def __init__(self, tied: bool = True, optimizer: str = "sgd", lazy: bool = True) -> None:
        super().__init__(blocks=1, optimizer=optimizer)
        self.lazy, self.is_tied, self.made = lazy, tied, False

    def configure_model(self) -> None:
        if self.made:
            return
        self.made = True
        with torch.device("meta") if self.lazy else nullcontext():
            self.blocks = nn.ModuleList(Block(16, 0.0) for _ in range(4))
            for block in self.blocks:
                block.up, block.down = nn.Linear(16, 512), nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 16))  # type: ignore[assignment]
                block.register_buffer("scale", torch.ones(3))
            self.tokens, self.head, self.norm = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False), nn.LayerNorm(16)
            self.norm.register_buffer("late", torch.ones(3))
            self.register_buffer("around", torch.ones(3))
            if self.is_tied:
                self.head.weight = self.tokens.weight

    def _init_weights(self, part: nn.Module) -> None:
        for buffer in part.buffers(recurse=False):
            buffer.fill_(1.0)
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)


def peak(work: Any, mapped: str | None = None) -> tuple[Any, int]:
    """What ``work`` gives, and by how many bytes torch's memory on the CPU grew at most meanwhile; not by a file's mapping."""
    mapping = os.path.getsize(mapped) if mapped else 0
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = work()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() != mapping]
    return found, max(itertools.accumulate(changes, initial=0))


def fit_from_meta(pipeline, path, resume, kind, lazy=True, epochs=1):
    """Weights that are here after the fit, and the most memory that it took."""
    warnings.simplefilter("ignore")
    seed_everything(1 + dist.get_rank(), verbose=False)
    module = OnMeta(lazy=lazy)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo", "state_dict_type": kind}
    strategy = OverlapStrategy(DataParallel(bucket_size=1000), pipeline_parallel=PipelineParallel(**pipeline), **env)
    length = {"limit_train_batches": 2, "limit_val_batches": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    given = {"accelerator": "cpu", "devices": dist.get_world_size(), "max_epochs": epochs, **length, **QUIET}
    run = Trainer(strategy=strategy, **given)
    seen: list[torch.Tensor] = []
    module.on_train_start = lambda: seen.append(torch.cat([module.around, module.norm.late]))  # type: ignore[method-assign, arg-type]

    def write() -> None:  # what the holder of a block has written is every rank's afterwards
        for number, block in enumerate(module.blocks):
            block.scale.fill_(10 * dist.get_rank() + number)

    module.on_train_end = write  # type: ignore[method-assign]
    _, most = peak(lambda: run.fit(module, loader(8), loader(8), ckpt_path=resume), resume)
    del module.on_train_end
    if path:
        run.save_checkpoint(path)
    found = {"weights": {name: p.detach().clone() for name, p in module.named_parameters()}, "peak": most}
    found["loss"] = float(run.callback_metrics["loss"])
    found["buffers"] = seen[0].tolist()
    found["written"] = [float(block.scale[0]) for block in module.blocks]
    if path:
        try:
            run.validate(module, loader(8), verbose=False)
        except ConfigError as error:
            found["refused"] = str(error)
        (found["validated"],) = run.validate(module, loader(8), ckpt_path=path, verbose=False)
    return found


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_no_rank_holds_a_model_from_the_meta_device(world, tmp_path, kind):
    layout = {"size": 4, "microbatches": 2}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    begun = world(4).run(fit_from_meta, layout, first, None, kind)
    gone_on = world(4).run(fit_from_meta, layout, second, first, kind, True, 2)
    block = (512 + 2 * 16) * 512 * 4  # bytes
    for rank, found in enumerate([*begun, *gone_on]):
        # A block, its gradient, what is added to it, its momentum, and activations. With the weights of all four: seven and more.
        assert found["peak"] < 5 * block, rank
        assert found["buffers"] == [1.0] * 6, "what is around the blocks is read on every rank"
        assert found["written"] == [0.0, 11.0, 22.0, 33.0]
        here = [name for name, weight in found["weights"].items() if ".up.weight" in name and not weight.isnan().any()]
        assert here == [f"blocks.{rank % 4}.up.weight"]
        assert found["validated"] == begun[0]["validated"] or rank > 3
        assert found["refused"] == begun[0]["refused"]
        assert "blocks.1.norm.weight" in found["refused"]
        assert "After a fit, another rank may have the values" in found["refused"]
    # The same that a model in memory makes of the first one's checkpoint, on one rank or on four.
    for pipeline in ({"size": 1}, layout):
        expected = world(4).run(fit_from_meta, pipeline, None, first, kind, False, 2)
        for mine, theirs in zip(gone_on, expected, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            for name, weight in mine["weights"].items():
                if not weight.isnan().any():
                    torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=1e-5)
