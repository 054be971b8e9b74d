"""Pipeline parallelism through Trainer: the numbers of one process, for every schedule, and what Lightning's users rely on."""

import copy
import gc
import itertools
import os
import pickle
import re
import tempfile
import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_overlap import ConfigError, DataParallel, OverlapProfiler, OverlapStrategy, PipelineParallel, verify
from lightning_overlap.bench.measure import measure
from lightning_overlap.modes.pipeline.stage import Stages
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.group import Group
from lightning_overlap.steps.schedule import build
from lightning_overlap.strategy.evaluation import explaining, failing_together

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(LightningModule):
    """Embedding, blocks, norm and head; logs a loss and a metric; ``checkpoint`` recomputes blocks in backward."""

    def __init__(
        self, blocks: int = 12, tied: bool = False, dropout: float = 0.0, checkpoint: bool = False, optimizer: str = "adamw"
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.optimizer = optimizer
        self.tokens = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.seen = torchmetrics.MeanMetric()
        self.val_seen = torchmetrics.MeanMetric()
        self.outputs: list[float] = []
        self.at_epoch_end: list[float] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return self.head(self.norm(x))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.seen(loss.detach())
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        if index % 2:
            self.log("odd", 2 * loss)
        return {"loss": loss, "twice": 2 * loss.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.outputs.append(float(outputs["twice"]))

    def on_train_epoch_end(self) -> None:
        self.at_epoch_end.append(float(self.seen.compute()))

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.val_seen.update(self(batch).float().mean())
        self.log("val_seen", self.val_seen)

    def configure_optimizers(self) -> Any:
        sgd = self.optimizer == "sgd"
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9) if sgd else torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


def loader(batch: int, samples: int = 40) -> DataLoader:
    data = torch.randint(0, 32, (samples, 9), generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_size=batch)  # type: ignore[arg-type]


def told(trainer: Trainer, module: Net) -> dict[str, Any]:
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "outputs": module.outputs,
        "at_epoch_end": module.at_epoch_end,
        "step": trainer.global_step,
    }


def pipelined(
    pipeline: dict[str, Any],
    model: dict[str, Any] | None = None,
    overlap: str = "auto",
    resume: str | None = None,
    proof: bool = True,
    **trainer: Any,
) -> dict[str, Any]:
    """One rank's fit."""
    warnings.simplefilter("ignore")
    seed_everything(1 + dist.get_rank(), verbose=False)  # rank 0's weights count
    module = Net(**(model or {}))
    size = dist.get_world_size()
    strategy = OverlapStrategy(
        DataParallel(bucket_size=1000),
        pipeline_parallel=PipelineParallel(**pipeline),
        overlap=overlap,  # type: ignore[arg-type]
        verify_first_step="auto" if proof else False,
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="gloo",
        **trainer.pop("strategy_kwargs", {}),
    )
    replicas = size // pipeline["size"]
    given = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "use_distributed_sampler": False}
    save = trainer.pop("save", None)
    run = Trainer(**{**QUIET, "accelerator": "cpu", "devices": size, "strategy": strategy, **given, **trainer})
    data = loader(8 // replicas)
    if replicas > 1:  # all replicas together see, batch by batch, what one process does
        sampler = DistributedSampler(data.dataset, replicas, dist.get_rank() % replicas, shuffle=False)
        data = DataLoader(data.dataset, batch_size=8 // replicas, sampler=sampler)
    run.fit(module, data, data, ckpt_path=resume)
    if save:
        run.save_checkpoint(save)
    return {**told(run, module), "plan": " ".join(strategy.plan.explain().split())}


def single(model: dict[str, Any] | None = None, resume: str | None = None, **trainer: Any) -> dict[str, Any]:
    """Plain Lightning on the whole batch."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Net(**(model or {}))
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    given = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2}
    run = Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, "strategy": strategy, **given, **trainer})
    run.fit(module, loader(8), loader(8), ckpt_path=resume)
    return told(run, module)


def by_hand(microbatches: int, model: dict[str, Any], epochs: int = 2, accumulate: int = 1) -> torch.Tensor:
    """One process that goes through the same microbatches, with nothing of Lightning or this package."""
    seed_everything(1, verbose=False)
    module = Net(**model)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for _ in range(epochs):
        for number, batch in enumerate(itertools.islice(loader(8), 3)):
            if number % accumulate == 0:
                optimizer.zero_grad()
            for part in batch.tensor_split(microbatches):
                (module.loss(part) * (len(part) / len(batch) / accumulate)).backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                scheduler["scheduler"].step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


SCHEDULES = [
    ("1f1b", 1),
    ("eager_1f1b", 1),
    ("gpipe", 1),
    ("gpipe", 3),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zb_h1", 1),
    ("interleaved_zb", 2),
    ("zb_v", 2),
    ("dualpipev", 2),
]


@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
@pytest.mark.parametrize("size", [2, 4])
def test_equal_bits_to_one_process(world, size, schedule, virtual, microbatches):
    pipeline = {"size": size, "virtual_stages": virtual, "schedule": schedule, "microbatches": microbatches}
    # The proof of the first step takes as long as two more steps: with one of the three.
    expected = by_hand(microbatches, {})
    for rank in world(size).run(pipelined, pipeline, {}, "auto", None, microbatches == 3):
        assert torch.equal(rank["weights"], expected)


@pytest.mark.parametrize("pipeline", [{"virtual_stages": 2}, {"schedule": "zb_h1"}])
@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({"tied": True}, {}),
        ({}, {"accumulate_grad_batches": 3}),
        ({"checkpoint": True}, {}),
        ({"tied": True}, {"gradient_clip_val": 0.1}),
        ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ({"dropout": 0.2}, {}),
        ({}, {"precision": "bf16-mixed"}),
    ],
)
def test_overlap_changes_no_number(world, pipeline, model, trainer):
    pipeline = {"size": 2, "microbatches": 4, **pipeline}
    on = (
        world(2).run(pipelined, pipeline, model, "auto", None, *[])
        if not trainer
        else world(2).run(with_trainer, pipeline, model, "auto", trainer)
    )
    off = world(2).run(with_trainer, pipeline, model, "off", trainer)
    for one, other in zip(on, off, strict=True):
        assert torch.equal(one["weights"], other["weights"])
        assert one["metrics"] == other["metrics"]
    assert torch.equal(on[0]["weights"], on[1]["weights"])
    assert on[0]["metrics"] == on[1]["metrics"]


@pytest.mark.parametrize(("schedule", "virtual", "limit"), [("gpipe", 1, 0), ("1f1b", 1, 1), ("interleaved", 2, 2), ("zb_v", 2, 0)])
def test_the_heads_gradients_come_later_and_are_the_same(world, schedule, virtual, limit):
    how = {"schedule": schedule, "virtual_stages": virtual, "wgrad_deferral_limit": limit}
    for rank in world(2).run(pipelined, {"size": 2, "microbatches": 4, "defer_embedding_wgrad": True, **how}):
        assert torch.equal(rank["weights"], by_hand(4, {}))
        assert "where its rank waits" in rank["plan"]


class Shares(Net):
    """A norm and the head's weight are used on the first stage, too."""

    def __init__(self) -> None:
        super().__init__(blocks=4, tied=True)
        self.norm = self.blocks[0].norm  # type: ignore[assignment]


def order(kind: type[Net], pipeline: dict[str, Any]) -> tuple[list[str], str]:
    """What one step's backward does, and the schedule's row that it follows."""
    warnings.simplefilter("ignore")
    events: list[str] = []

    def listen(own: Any, verb: str, said: str, heard: Any = None) -> None:
        act = getattr(own, verb)

        def says(*arguments: Any, **how: Any) -> Any:
            events.append(said)
            result = act(*arguments, **how)
            if heard is not None:
                heard(result)
            return result

        setattr(own, verb, says)

    class Listens(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            mode: Any = trainer.strategy.modes[0]  # type: ignore[attr-defined]
            listen(mode._weight_gradients, "run", "weights")
            listen(mode.channels["B", False, 1], "send", "sent")
            for group in mode._tied.groups.values():
                listen(group, "all_reduce", "sum", lambda pending: listen(pending, "wait", "wait"))
            if module.head.weight.requires_grad:
                module.head.weight.register_post_accumulate_grad_hook(lambda _: events.append("head"))

        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            ((runner, _),) = trainer.strategy.modes[0]._runs.values()  # type: ignore[attr-defined]
            events.append(" ".join(map(str, runner.actions)))

    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    own = PipelineParallel(size=2, microbatches=4, **pipeline)
    strategy = OverlapStrategy(pipeline_parallel=own, verify_first_step=False, **env)  # type: ignore[arg-type]
    given: Any = {"limit_val_batches": 0, "max_steps": 1, "callbacks": [Listens()], "use_distributed_sampler": False}
    Trainer(**QUIET, accelerator="cpu", devices=2, strategy=strategy, **given).fit(kind(), loader(8))
    return events[:-1], events[-1]


def test_shared_gradients_are_summed_under_what_is_left_of_backward(world):
    for events, row in world(2).run(order, Shares, {"schedule": "zb_h1", "defer_embedding_wgrad": False}):
        told = [event for event in events if event in ("weights", "sum", "wait")]
        after = row.rpartition("I")[2].count("W")
        assert after > 0
        assert told == ["weights"] * (4 - after) + ["sum"] * 3 + ["weights"] * after + ["wait"] * 3


def test_the_heads_gradients_come_after_what_the_stage_before_waits_for(world):
    events, row = world(2).run(order, Net, {"schedule": "1f1b", "defer_embedding_wgrad": True, "wgrad_deferral_limit": 1})[1]
    assert row == "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 F1.3 I1.3 W1.2 W1.3"
    for action in row.split():
        expected = {"F": [], "I": ["sent"], "W": ["weights", "head"]}[action[0]]
        assert events[: len(expected)] == expected
        del events[: len(expected)]
    assert not events


def with_trainer(pipeline, model, overlap, trainer):
    return pipelined(pipeline, model, overlap, **trainer)


def close(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({}, {}),
        ({"tied": True}, {"gradient_clip_val": 0.1}),
        ({}, {"accumulate_grad_batches": 3}),
        ({"checkpoint": True}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    ],
)
@pytest.mark.parametrize(("size", "virtual"), [(2, 1), (2, 2), (4, 3)])
def test_close_to_plain_lightning(world, size, virtual, model, trainer):
    """Weights, everything logged, outputs and metrics are those of a Trainer without a pipeline, on every rank."""
    model = {**model, "optimizer": "sgd"}  # Adam's step is as long for a gradient of rounding errors as for any other
    expected = single(model, **trainer)
    for rank in world(size).run(with_trainer, {"size": size, "virtual_stages": virtual, "microbatches": 4}, model, "auto", trainer):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        close(rank["metrics"], expected["metrics"])
        for key in ("outputs", "at_epoch_end"):
            assert rank[key] == pytest.approx(expected[key], rel=2e-5)
        assert rank["step"] == expected["step"]


LATE = {"defer_embedding_wgrad": True}  # no bucket may be reduced before the head's last gradient is in it
ONE_RANK = {"virtual_stages": 2, "schedule": "zb_v"}  # has both the embedding and the head, each with a last backward of its own
CLIP, ACCUMULATE = {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}


@pytest.mark.parametrize(
    ("pipeline", "tied", "trainer"),
    [
        *[(LATE, False, {}), (LATE, False, ACCUMULATE), (LATE, True, {}), (LATE, True, CLIP)],
        *[({"virtual_stages": 2}, tied, how) for tied, how in [(False, CLIP), (False, ACCUMULATE), (True, {}), (True, ACCUMULATE)]],
        *[(ONE_RANK, True, {}), (ONE_RANK, True, ACCUMULATE)],
    ],
)
def test_with_data_parallelism(world, pipeline, tied, trainer):
    pipeline = {"size": 2, "microbatches": 2, **pipeline}
    ranks = world(4).run(with_trainer, pipeline, {"tied": tied}, "auto", trainer)
    plain = world(4).run(with_trainer, pipeline, {"tied": tied}, "off", trainer)
    for rank, other in zip(ranks, plain, strict=True):
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert torch.equal(rank["weights"], other["weights"])
        assert rank["metrics"]["val_loss"] == ranks[0]["metrics"]["val_loss"]
    assert ranks[0]["metrics"] == ranks[2]["metrics"]  # of one pipeline


def gathered(aligned: bool) -> tuple[list[list[str]], dict[int, set[int]], torch.Tensor]:
    """Actions and data transfers of each step in their order, the stages of each bucket's parameters, and the weights."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    steps: list[list[str]] = []
    stages_of: dict[int, set[int]] = {}

    def heard(act: Any, said: Any) -> Any:
        def says(*arguments: Any, **how: Any) -> Any:
            steps[-1].append(said(*arguments, **how))
            return act(*arguments, **how)

        return says

    class Listens(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            pipeline, data = trainer.strategy.modes  # type: ignore[attr-defined]
            for bucket in data._buckets:
                stages_of[bucket.key] = {stage for name in bucket.names for stage in pipeline.partition.users[name]}
            for verb, said in (("reduce_scatter", "reduce"), ("all_gather", "gather")):
                setattr(data.group, verb, heard(getattr(data.group, verb), lambda *_, key, said=said, **__: f"{said} {key}"))

        def on_train_batch_start(self, *_: Any) -> None:
            steps.append([])

    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    own = PipelineParallel(size=2, virtual_stages=2, microbatches=4)
    data = DataParallel(bucket_size=1000, align_param_gather=aligned)  # type: ignore[arg-type]
    strategy = OverlapStrategy(data, pipeline_parallel=own, verify_first_step=False, **env)
    given: Any = {"max_steps": 3, "limit_val_batches": 0, "callbacks": [Listens()], "use_distributed_sampler": False}
    module = Net(blocks=8)
    with (
        mock.patch.object(Stages, "forward", heard(Stages.forward, lambda _, stage, microbatch, *__: f"F{stage}.{microbatch}")),
        mock.patch.object(Stages, "backward", heard(Stages.backward, lambda _, action, *__: str(action))),
    ):
        Trainer(**QUIET, accelerator="cpu", devices=4, strategy=strategy, **given).fit(module, loader(4))
    return steps, stages_of, torch.cat([p.detach().flatten() for p in module.parameters()])


def test_each_stage_is_reduced_in_its_last_backward_and_gathered_before_its_next_forward(world):
    """In its backward, or, aligned, after all of them, and then in the order of forward."""
    found = {aligned: world(4).run(gathered, aligned) for aligned in (False, True)}
    for aligned, ranks in found.items():
        for rank, (steps, stages_of, _) in enumerate(ranks):
            assert set.union(*stages_of.values()) == {rank // 2, rank // 2 + 2}
            for events in steps:
                actions = [n for n, event in enumerate(events) if event[0] in "FB"]
                for key, stages in stages_of.items():
                    (stage,) = stages  # a bucket of two would wait for the other
                    last = actions.index(events.index(f"B{stage}.3"))
                    during = range(actions[last], [*actions, len(events)][last + 1])
                    assert events.index(f"reduce {key}") in during
                    assert events.index(f"gather {key}") > (actions[-1] if aligned else during[0])
                gathers = [stages_of[int(event.split()[1])] for event in events if event.startswith("gather")]
                assert len(gathers) == len(stages_of)
                if aligned:
                    assert gathers == sorted(gathers, key=min)
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.equal(one[2], other[2])


def test_two_stages_by_four_data_ranks(world):
    model = {"optimizer": "sgd"}
    expected = single(model)
    for rank in world(8).run(with_trainer, {"size": 2, "microbatches": 2}, model, "auto", {}):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


class Watched(Net):
    """Collects what its validation gives, and tells it at the end; and looks at gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[torch.Tensor] = []
        self.norms: list[dict[str, float]] = []

    def validation_step(self, batch, index):
        self.collected.append(self.loss(batch).detach())

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.collected).mean())
        self.collected.clear()

    def on_before_optimizer_step(self, optimizer):
        self.norms.append({name: float(p.grad.norm()) for name, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def watched(pipeline: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if pipeline is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = dist.get_world_size(), OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=2, min_delta=0.2)
    length = {"max_epochs": 9, "limit_train_batches": 3, "limit_val_batches": 2, "use_distributed_sampler": False}
    given = {**QUIET, "enable_checkpointing": True, "callbacks": [saving, stopping], **length}
    module = Watched()
    run = Trainer(**given, accelerator="cpu", devices=devices, strategy=strategy)
    run.fit(module, loader(8), loader(8))
    best = os.path.basename(saving.best_model_path), float(saving.best_model_score)
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    return {**told(run, module), "norms": module.norms, "best": best, "rates": rates, "stopped": stopping.stopped_epoch}


def test_what_watches_a_validation_sees_what_it_does_without_a_pipeline(world, tmp_path):
    """EarlyStopping, ModelCheckpoint, ReduceLROnPlateau, by outputs that each rank has collected; and a hook that reads gradients."""
    expected = watched(None, str(tmp_path / "plain"))
    assert 0 < expected["stopped"] < 8
    assert expected["rates"][0] < 0.1
    ranks = world(2).run(watched, {"size": 2, "virtual_stages": 2, "microbatches": 4}, str(tmp_path / "piped"))
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        assert rank["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)
        assert rank["best"] == (expected["best"][0], pytest.approx(expected["best"][1], rel=1e-5))
        assert (rank["rates"], rank["stopped"], rank["step"]) == (expected["rates"], expected["stopped"], expected["step"])
    for step, norms in enumerate(expected["norms"]):
        here = [rank["norms"][step] for rank in ranks]
        assert not here[0].keys() & here[1].keys()
        assert here[0] | here[1] == pytest.approx(norms, rel=1e-4, abs=1e-6)


def saved_by_all(pipeline, model, trainer, folder):
    return pipelined(pipeline, model, "auto", None, **trainer, save=f"{folder}/x.ckpt")


def resumed(pipeline, model, trainer, path):
    return pipelined(pipeline, model, "auto", path, **trainer)


LAYOUTS = [
    (2, {"size": 2, "virtual_stages": 2, "microbatches": 4}),
    (4, {"size": 4, "microbatches": 4}),
    (4, {"size": 2, "microbatches": 4}),
]


@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_checkpoints_load_into_any_layout(world, tmp_path, ranks, pipeline):
    """Optimizer and schedule included; and into plain Lightning and back."""
    model = {"tied": True, "optimizer": "sgd"}
    half, whole = {"max_epochs": 1}, {"max_epochs": 2}
    world(ranks).run(saved_by_all, pipeline, model, half, str(tmp_path))
    path = f"{tmp_path}/x.ckpt"
    expected = single(model, **whole)
    file = torch.load(path, weights_only=True)
    assert list(file["state_dict"]) == list(Net(**model).state_dict())
    assert len(file["optimizer_states"][0]["state"]) == len(list(Net(**model).parameters()))
    torch.testing.assert_close(single(model, path, **whole)["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    for other, layout in LAYOUTS:
        for rank in world(other).run(resumed, layout, model, whole, path):
            torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


def saved_in_shards(pipeline, model, folder, asynchronous):
    """A folder that is written in the middle of a fit, which goes on."""
    strategy = {"state_dict_type": "sharded", "async_save": asynchronous}
    saving = ModelCheckpoint(folder, "first", save_on_train_epoch_end=True, save_top_k=-1)
    trainer = {"enable_checkpointing": True, "callbacks": [saving], "limit_train_batches": 3}
    return pipelined(pipeline, model, "auto", None, **trainer, strategy_kwargs=strategy)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_sharded_checkpoints_load_into_any_layout(world, tmp_path, ranks, pipeline, asynchronous):
    model = {"tied": True, "optimizer": "sgd"}
    expected = single(model, max_epochs=2)
    for rank in world(ranks).run(saved_in_shards, pipeline, model, str(tmp_path), asynchronous):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    folder = tmp_path / "first.ckpt"
    written = [sum(file.stat().st_size for file in folder.glob(f"__{rank}_*.distcp")) for rank in range(ranks)]
    assert max(written) < 1.5 * min(written)
    for other, layout in [*LAYOUTS, (2, {"size": 1})] if asynchronous else LAYOUTS[:1]:
        for rank in world(other).run(resumed, layout, model, {"max_epochs": 2}, str(folder)):
            torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


def test_a_folder_of_plain_data_parallelism_loads_into_a_pipeline(world, tmp_path):
    model = {"tied": True}
    world(2).run(saved_in_shards, {"size": 1}, model, str(tmp_path), False)
    expected = world(2).run(resumed, {"size": 1}, model, {"max_epochs": 2}, str(tmp_path / "first.ckpt"))
    for rank in world(4).run(resumed, LAYOUTS[1][1], model, {"max_epochs": 2}, str(tmp_path / "first.ckpt")):
        torch.testing.assert_close(rank["weights"], expected[0]["weights"], rtol=1e-4, atol=1e-5)


class NobodyInitialises(Net):
    def configure_model(self) -> None:
        self.head.bias = nn.Parameter(torch.empty(32, device="meta"))
        self.head.reset_parameters = lambda: None  # type: ignore[method-assign, assignment]


def test_what_nothing_gives_values_to_is_named(world):
    for said in world(2).run(refused, NobodyInitialises, {"size": 2, "microbatches": 2}):
        assert said.startswith("ConfigError: head.bias came from the meta device, and nothing gives values")


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
        assert "another rank has the values, from a fit" in found["refused"]
    # The same that a model in memory makes of the first one's checkpoint, on one rank or on four.
    for pipeline in ({"size": 1}, layout):
        expected = world(4).run(fit_from_meta, pipeline, None, first, kind, False, 2)
        for mine, theirs in zip(gone_on, expected, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            for name, weight in mine["weights"].items():
                if not weight.isnan().any():
                    torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    pipeline, model = LAYOUTS[0][1], {"dropout": 0.2}
    world(2).run(saved_by_all, pipeline, model, {"max_epochs": 1}, str(tmp_path))
    whole = world(2).run(resumed, pipeline, model, {"max_epochs": 2}, None)
    again = world(2).run(resumed, pipeline, model, {"max_epochs": 2}, f"{tmp_path}/x.ckpt")
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one["weights"], other["weights"])


class Odd(Net):
    """A head with two names, a buffer beside the blocks that the loss is written to, and no ``batch_idx``."""

    def __init__(self) -> None:
        super().__init__(blocks=4, optimizer="sgd")
        self.again = self.head
        self.register_buffer("mean_loss", torch.zeros(()))
        self.drawn: list[float] = []

    def training_step(self, batch):  # type: ignore[override]
        self.drawn.append(float(torch.rand(())))
        loss = self.loss(batch)
        self.mean_loss.lerp_(loss.detach(), 0.1)
        return {"loss": loss, "twice": 2 * loss.detach()}

    def on_train_epoch_end(self) -> None: ...

    def validation_step(self, batch) -> None:  # type: ignore[override]
        self.log("val_mean_loss", self.mean_loss)


def kept_in_a_checkpoint(folder, pipeline):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Odd()
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if pipeline is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = pipeline["size"], OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    saving = ModelCheckpoint(folder, "mine" if pipeline else "plain", monitor="val_mean_loss")
    given = {"max_epochs": 2, "limit_train_batches": 2, "use_distributed_sampler": False}
    run = Trainer(
        **{**QUIET, "enable_checkpointing": True}, **given, accelerator="cpu", devices=devices, strategy=strategy, callbacks=[saving]
    )
    run.fit(module, loader(8), loader(8))
    return float(saving.best_model_score), module.drawn


def test_checkpoints_have_what_the_last_stage_wrote_by_all_its_names(world, tmp_path):
    expected, _ = kept_in_a_checkpoint(tmp_path, None)
    for score, drawn in world(2).run(kept_in_a_checkpoint, tmp_path, {"size": 2, "microbatches": 1}):
        assert score == pytest.approx(expected, rel=1e-5)
        assert len(set(drawn)) == len(drawn) == 4, "each batch draws its own random numbers"
    mine, plain = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("mine", "plain"))
    assert list(mine) == list(plain)
    for name in mine:
        torch.testing.assert_close(mine[name], plain[name], rtol=1e-5, atol=1e-6)


def odd_batches(pipeline):
    """A last batch that is short, and batches of several lengths."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Net(optimizer="sgd")
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 32, (size, length), generator=generator) for size, length in [(8, 9), (8, 5), (3, 9), (1, 4), (7, 9)]]
    given = {**QUIET, "accelerator": "cpu", "max_epochs": 2, "limit_val_batches": 5}
    if pipeline is None:
        run = Trainer(**given, devices=1, strategy=SingleDeviceStrategy(torch.device("cpu")))
    else:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
        run = Trainer(**given, devices=dist.get_world_size(), strategy=strategy, use_distributed_sampler=False)
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    run.fit(module, data, data)
    return told(run, module)


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_batches_of_any_size(world, schedule):
    expected = odd_batches(None)
    for rank in world(2).run(odd_batches, {"size": 2, "virtual_stages": 2, "microbatches": 4, "schedule": schedule}):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        assert rank["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-5)


def test_layouts_that_are_given(world):
    expected = by_hand(2, {"blocks": 4})
    validated = single({"blocks": 4})["metrics"]["val_loss"]
    for given in ({"layers_per_stage": (3, 1)}, {"layout": "E|t*4L"}, {"layout": "Et*4|L"}):
        for rank in world(2).run(with_trainer, {"size": 2, "microbatches": 2, **given}, {"blocks": 4}, "auto", {}):
            assert torch.equal(rank["weights"], expected)
            assert rank["metrics"]["val_loss"] == pytest.approx(validated, rel=1e-5)
    pipeline = {"size": 2, "virtual_stages": 2, "microbatches": 2, "layout": "E||t*4|L"}
    for rank in world(2).run(with_trainer, pipeline, {"blocks": 4}, "auto", {}):
        assert torch.equal(rank["weights"], expected)


def test_a_schedule_of_the_users_own(world, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("F0.0 F0.1 B0.0 B0.1\nF1.0 I1.0 F1.1 I1.1 W1.0 W1.1\n")
    for rank in world(2).run(pipelined, {"size": 2, "microbatches": 2, "schedule": str(file)}):
        assert torch.equal(rank["weights"], by_hand(2, {}))
        assert "mine.txt" in rank["plan"].replace(" ", "")  # a long path is folded


def memory(pipeline):
    """Bytes of parameters that a rank holds while it trains, and what the whole model has."""
    held = []

    class Measured(Net):
        def on_train_batch_end(self, *arguments):
            held.append(sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.parameters()}.values()))

    module = Measured()
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    run = Trainer(**QUIET, accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, max_steps=2, limit_val_batches=0)
    run.fit(module, loader(8))
    return max(held), sum(p.nbytes for p in module.parameters())


def test_a_rank_holds_its_stages_only(world):
    for held, whole in world(4).run(memory, {"size": 4, "microbatches": 2}):
        assert held < whole / 4 * 1.2


class Twice(Net):
    def training_step(self, batch, index):
        return self.loss(batch) + self.loss(batch)


class Between(Net):
    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x) * 1.0
        return self.head(self.norm(x))


class Swallows(Net):
    def training_step(self, batch, index):
        try:
            return self.loss(batch)
        except:  # noqa: E722
            return None


class TiedByHand(Net):
    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class Trims(Net):
    def training_step(self, batch, index):
        return self.loss(batch[:, : int(batch.sum()) % 4 + 3])


class Scalar(Net):
    """A parameter without dims, which the first stage alone uses."""

    def __init__(self):
        super().__init__()
        self.tokens.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))


class NoLoss(Net):
    def training_step(self, batch, index):
        self.loss(batch)


class Fails(Net):
    def on_train_batch_end(self, outputs, batch, index):
        if dist.get_rank() == 1 and index == 3:  # the first batches are compared by a blocking collective, which nobody can leave
            raise ZeroDivisionError("the user's")


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NoBlocks(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList(Block(16, 0.0) for _ in range(12))


class Short(Net):
    def __init__(self):
        super().__init__(blocks=3)


def refused(kind, pipeline, different=False, validate=0, verify="auto"):
    warnings.simplefilter("ignore")
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    try:
        seed_everything(1, verbose=False)
        strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), verify_first_step=verify, **env)
        given = {
            "devices": dist.get_world_size(),
            "strategy": strategy,
            "use_distributed_sampler": False,
            "limit_val_batches": validate,
        }
        own = torch.Generator().manual_seed(dist.get_rank())  # torch's common one is the first rank's
        data = DataLoader(loader(8).dataset, batch_size=8, shuffle=different, generator=own)
        Trainer(**QUIET, accelerator="cpu", max_steps=5, val_check_interval=2, **given).fit(kind(), data, data)
    except (ConfigError, TransferError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_an_error_of_one_rank_reaches_the_others(world):
    first, second = world(2).run(refused, Fails, {"size": 2, "microbatches": 2})
    assert second == "ZeroDivisionError: the user's"
    assert first == "TransferError: rank 1 has failed: ZeroDivisionError: the user's"


class FailsInValidation(Net):
    def validation_step(self, batch, index):
        if dist.get_rank() == 0 and index == 1:
            raise ZeroDivisionError("the user's")
        super().validation_step(batch, index)


def test_an_error_of_an_early_stage_in_validation_reaches_the_others(world):
    first, second = world(2).run(refused, FailsInValidation, {"size": 2, "microbatches": 2}, False, 2)
    assert first == "ZeroDivisionError: the user's"
    assert second == "TransferError: rank 0 has failed: ZeroDivisionError: the user's"


@pytest.mark.parametrize(
    ("kind", "pipeline", "said"),
    [
        (Twice, {}, "called twice in one training_step"),
        (Between, {}, "the loop does something with the hidden states"),
        (Swallows, {}, "catches every exception"),
        (NoLoss, {}, "training_step gave no loss"),
        (Trims, {"microbatches": 8}, "for an input of the same shapes"),
        (Net, {"microbatch_group": 1}, "is below size=2"),
        (TiedByHand, {}, "that does not hold it"),
        (Manual, {}, "manual optimization"),
        (NoBlocks, {}, "equally long"),
        (Short, {"virtual_stages": 2}, "at least 4 alike modules"),
        (Net, {"layers_per_stage": (3, 3)}, "layers_per_stage"),
        (Net, {"layout": "Et|tL"}, "has 2 blocks, and the model has 12"),
        (Net, {"schedule": "zb_v"}, "needs virtual_stages: 2"),
        (Net, {"schedule": "no such file"}, "neither one of"),
        (Net, {"microbatches": 0}, "must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_rank(world, kind, pipeline, said):
    answers = world(2).run(refused, kind, {"size": 2, "microbatches": 2, **pipeline})
    assert all(said in answer for answer in answers), answers


def test_a_parameter_without_dims(world):
    assert world(2).run(refused, Scalar, {"size": 2, "microbatches": 2}) == ["trained"] * 2


def test_ranks_of_a_pipeline_that_read_different_batches_are_told(world):
    for answer in world(2).run(refused, Net, {"size": 2, "microbatches": 2}, True):
        assert "have read another batch than rank 0" in answer


def changes_weights(how: str) -> str:
    """What Lightning does to all weights in the middle of a fit."""
    warnings.simplefilter("ignore")
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, microbatches=2), **env)
    callbacks = [EMAWeightAveraging()] if how == "average" else [LearningRateFinder(num_training_steps=2)]
    given = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "callbacks": callbacks, "limit_val_batches": 0}
    module = Net()
    module.lr = 1e-2  # type: ignore[assignment]
    where = {**given, "default_root_dir": tempfile.gettempdir()}
    with pytest.raises(ConfigError) as caught:
        Trainer(**QUIET, accelerator="cpu", max_steps=4, **where).fit(module, loader(8))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"), [("average", "EMAWeightAveraging averages all weights"), ("find", "weights are loaded in the middle of a fit")]
)
def test_what_changes_all_weights_is_refused_on_every_rank(world, how, said):
    assert all(said in answer for answer in world(2).run(changes_weights, how))


class Leaves(Block):
    left = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left = x.detach().abs().mean()
        return super().forward(x)


class LeavesBehind(Net):
    """What blocks leave behind is added to the loss: that of another stage's is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Leaves(16, 0.0) for _ in range(4))

    def training_step(self, batch, index):
        loss = self.loss(batch) + sum(block.left for block in self.blocks)
        return {"loss": loss, "twice": 2 * loss.detach()}


def test_what_the_unsplit_model_knows_better_is_found_in_the_first_batch(world):
    pipeline = {"size": 2, "microbatches": 2}
    assert world(2).run(refused, LeavesBehind, pipeline, False, 0, False) == ["trained"] * 2
    said = world(2).run(refused, LeavesBehind, pipeline)
    assert said[0] == said[1]
    found, expected = map(float, re.match(r"ConfigError: .* the loss is ([\d.]+) and should be ([\d.]+)\. ", said[0]).groups())
    assert expected - found > 0.1


class Counts(Net):
    """With a batch norm, and a list that training_step fills."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**{"blocks": 4, "dropout": 0.2, **model})
        self.extra = nn.BatchNorm1d(8)
        self.steps: list[int] = []

    def training_step(self, batch, index):
        self.steps.append(index)
        return super().training_step(batch, index)

    def forward(self, ids):
        return self.extra(super().forward(ids))


def verified(pipeline, trainer, tied, verify):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    plan = {"pipeline_parallel": PipelineParallel(**pipeline), "verify_first_step": verify}
    strategy = OverlapStrategy(DataParallel(bucket_size=1000), **plan, **env)
    module = Counts(tied=tied)
    given = {"devices": dist.get_world_size(), "strategy": strategy, "use_distributed_sampler": False, "limit_val_batches": 0}
    run = Trainer(**QUIET, accelerator="cpu", max_epochs=1, limit_train_batches=2, **given, **trainer)
    run.fit(module, loader(8))
    return {**told(run, module), "buffers": torch.cat([b.double().flatten() for b in module.buffers()]), "steps": module.steps}


@pytest.mark.parametrize(
    ("ranks", "pipeline", "trainer", "tied"),
    [(2, {"virtual_stages": 2}, {}, True), (4, {"schedule": "zb_h1"}, {"precision": "bf16-mixed"}, False)],
)
def test_verifying_the_first_batch_leaves_nothing_behind(world, ranks, pipeline, trainer, tied):
    pipeline = {"size": 2, "microbatches": 4, **pipeline}
    plain = world(ranks).run(verified, pipeline, trainer, tied, False)
    looked = world(ranks).run(verified, pipeline, trainer, tied, True)
    for one, other in zip(plain, looked, strict=True):
        assert torch.equal(one.pop("weights"), other.pop("weights"))
        assert torch.equal(one.pop("buffers"), other.pop("buffers"))
        assert one == other


def fit_twice_and_more(with_pipeline):
    """A second fit of the same Trainer, and evaluation between and after, when every rank has the whole model."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    devices, strategy = 1, SingleDeviceStrategy(torch.device("cpu"))
    if with_pipeline:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        devices, strategy = 2, OverlapStrategy(pipeline_parallel=PipelineParallel(size=2, virtual_stages=2, microbatches=4), **env)
    module = Net(optimizer="sgd")
    length = {"max_epochs": 1, "limit_train_batches": 3, "use_distributed_sampler": False}
    run = Trainer(**QUIET, **length, accelerator="cpu", devices=devices, strategy=strategy)
    run.fit(module, loader(8))
    (between,) = run.validate(module, loader(8), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(8))
    (after,) = run.validate(module, loader(8), verbose=False)
    predicted = torch.cat(run.predict(module, loader(8)))
    return {**told(run, module), "losses": [between["val_loss"], after["val_loss"]], "predicted": predicted}


class CountsBefore(Net):
    """Batch norm and a metric before the blocks."""

    def __init__(self) -> None:
        super().__init__(blocks=4)
        self.bn = nn.BatchNorm1d(16)
        names = dict.fromkeys(["tokens", "bn", *self._modules])
        self._modules = {name: self._modules[name] for name in names}
        self.tokens_seen = torchmetrics.SumMetric()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.tokens(ids).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        self.tokens_seen.update(batch.numel())
        return super().training_step(batch, index)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.counted = self.tokens_seen.compute().item()


def counting(pipeline: dict[str, Any]) -> Any:
    strategy = OverlapStrategy(
        pipeline_parallel=PipelineParallel(**pipeline), cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
    )
    seed_everything(1, verbose=False)
    module = CountsBefore()
    given = {"max_epochs": 1, "limit_train_batches": 3, "use_distributed_sampler": False}
    run = Trainer(**QUIET, **given, accelerator="cpu", devices=2, strategy=strategy)
    run.fit(module, loader(8))
    return module.counted, module.bn.num_batches_tracked.item(), module.bn.running_mean


def counted_by_hand(microbatches: int) -> Any:
    seed_everything(1, verbose=False)
    module = CountsBefore()
    (optimizer,), _ = module.configure_optimizers()
    for batch in itertools.islice(loader(8), 3):
        optimizer.zero_grad()
        for part in batch.tensor_split(microbatches):
            (module.loss(part) * (len(part) / len(batch))).backward()
        optimizer.step()
    return 3 * 8 * 9, module.bn.num_batches_tracked.item(), module.bn.running_mean


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_what_comes_before_the_blocks_counts_once(world, schedule):
    """A rank with several stages comes by it for each: interleaved has the first and the last stage on two ranks, zb_v on one."""
    expected = counted_by_hand(4)
    for found in world(2).run(counting, {"size": 2, "virtual_stages": 2, "schedule": schedule, "microbatches": 4}):
        assert found[:2] == expected[:2]
        torch.testing.assert_close(found[2], expected[2])


def test_fit_twice_and_evaluation_alone(world):
    expected = fit_twice_and_more(False)
    for rank in world(2).run(fit_twice_and_more, True):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["predicted"], expected["predicted"], rtol=1e-4, atol=1e-5)
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["step"] == expected["step"] == 6


def profiled(folder: Any) -> tuple[bool, list[Any], Any]:
    profiler = OverlapProfiler(every_n_steps=1, warmup=1, report=str(folder / "report.html"))
    how: Any = ({"size": 2, "schedule": "zb_h1", "microbatches": 4}, {"blocks": 4})
    done = pipelined(*how, callbacks=[profiler], max_epochs=1)
    alone = pipelined(*how, max_epochs=1)
    return done["weights"].equal(alone["weights"]), list(profiler._drawn), profiler.summary


def test_the_profiler_tells_a_pipelines_actions_and_its_bubble(world, tmp_path):
    unchanged, steps, summary = world(2).run(profiled, tmp_path)[0]
    assert unchanged, "looking changes nothing"
    plan = build("zb_h1", 2, 1, 4)
    for step in steps:
        assert [[name for name, *_ in own.work] for own in step] == [[str(action) for action in row] for row in plan.actions]
        for own in step:
            assert all(own.start <= start <= end <= own.end for _, start, end in own.work)
    assert len(steps) == summary.steps == 2
    assert summary.mean("pipeline").late > 0, "the bubble"
    assert "its bubble" in summary.table()
    page = (tmp_path / "report.html").read_text()
    assert "rank 1 compute, stages" in page
    assert "gradients of weights" in page


class WithData(Net):
    def train_dataloader(self) -> DataLoader:
        return loader(8)


def proven(fault: bool) -> list[tuple[bool, str]]:
    """``fault``: gradients of hidden states are sent with a wrong scale, with overlap on and off."""
    warnings.simplefilter("ignore")
    real = Group.send

    def send(group: Group, x: torch.Tensor, to: int, **how: Any) -> Any:
        return real(group, x * 1.5 if how["label"].startswith("pipeline.backward") else x, to, **how)

    strategy = OverlapStrategy(
        pipeline_parallel=PipelineParallel(size=2, virtual_stages=2, microbatches=4),
        verify_first_step=False,  # which would show the fault by itself
        cluster_environment=TorchElasticEnvironment(),
    )
    strategy.parallel_devices = [torch.device("cpu")] * 2
    given = {"accelerator": "cpu", "devices": 2, "plugins": [TorchElasticEnvironment()]}
    with mock.patch.object(Group, "send", send) if fault else nullcontext():
        verdicts = verify(WithData(4, tied=True), None, strategy, given, steps=3, against="single")
    return [(verdict.equal, str(verdict)) for verdict in verdicts]


def test_verify_compares_a_pipeline_with_one_process(world):
    for equal, said in world(2).run(proven, False)[0]:
        assert equal, said
    (on_and_off, _), (single, said) = world(2).run(proven, True)[0]
    assert on_and_off, "both are wrong"
    assert not single
    assert "tokens.weight differs by" in said


def benched() -> tuple[dict[str, Any], str]:
    warnings.simplefilter("ignore")
    strategy = OverlapStrategy(
        DataParallel(bucket_size=1000),
        pipeline_parallel=PipelineParallel(size=2, microbatches=2),
        cluster_environment=TorchElasticEnvironment(),
    )
    strategy.parallel_devices = [torch.device("cpu")] * 4
    trainer = {"accelerator": "cpu", "devices": 4, "plugins": [TorchElasticEnvironment()]}
    measured = measure(WithData(4), None, strategy, trainer, steps=1, warmup=1, repeats=1, with_peers=False)
    return measured.as_dict(), measured.table()


def test_a_benchmark_tells_modes_apart_and_simulates_the_schedule(world):
    figures, table = world(4).run(benched)[0]
    assert set(figures["modes"]) == set(figures["efficiency"]) == {"pipeline", "data"}
    assert {kind.split(".")[0] for run in figures["rows"][0]["exposed"] for kind in run} == {"pipeline", "data"}
    assert min(figures["efficiency"].values()) > 0
    paper = figures["on_paper"]
    assert 0 < paper["forward"] < paper["ideal"] <= paper["simulated"]
    assert "pipeline: communication " in table
    assert "on paper, with forward " in table


class OneForward(Net):
    """A validation that calls the model once, logs, has a metric's batch value, and returns numbers."""

    def __init__(self, **model: Any) -> None:
        super().__init__(**model)
        self.returned: list[float] = []
        self.held: list[int] = []

    def validation_step(self, batch, index):
        loss = self.loss(batch)
        self.held.append(sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.parameters()}.values()))
        self.log("val_loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.val_seen(loss)
        self.log("val_seen", self.val_seen)
        return {"twice": 2 * loss}

    def on_validation_batch_end(self, outputs, batch, index):
        self.returned.append(float(outputs["twice"]))

    def on_validation_epoch_end(self):
        self.log("val_again", self.val_seen.compute())


class Collects(OneForward):
    def validation_step(self, batch, index):
        self.returned.append(self.loss(batch).detach())

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.returned).mean())

    on_validation_batch_end = LightningModule.on_validation_batch_end


class TwiceInValidation(OneForward):
    def validation_step(self, batch, index):
        return {"twice": self.loss(batch) + self.loss(batch)}


def validated(kind, pipeline):
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), **env)
    module = kind()
    given = {"devices": dist.get_world_size(), "strategy": strategy, "use_distributed_sampler": False}
    run = Trainer(**QUIET, accelerator="cpu", max_epochs=2, limit_train_batches=2, limit_val_batches=2, **given)
    try:
        run.fit(module, loader(8), loader(8))
    except (ConfigError, TransferError) as error:
        return {"said": f"{type(error).__name__}: {error}"}
    weights = sum(p.nbytes for p in module.parameters())
    return {**told(run, module), "returned": module.returned, "held": max(module.held, default=0) / weights}


@pytest.mark.parametrize(
    ("ranks", "pipeline"),
    [
        (2, {"size": 2, "virtual_stages": 2}),
        (4, {"size": 4, "schedule": "zb_v", "virtual_stages": 2}),
        (4, {"size": 2}),
        (2, {"size": 2, "layout": "E|t*12L"}),
        (2, {"size": 2, "layout": "Et*12|L"}),
    ],
)
def test_mirrored_and_replicated_validation_tell_the_same(world, ranks, pipeline):
    pipeline = {"microbatches": 2, **pipeline}
    replicated = world(ranks).run(validated, OneForward, pipeline)
    mirrored = world(ranks).run(validated, OneForward, {**pipeline, "evaluation": "mirror"})
    for one, other in zip(replicated, mirrored, strict=True):
        assert {"val_loss", "val_seen", "val_again"} <= one["metrics"].keys()
        assert one["metrics"] == other["metrics"]
        assert one["returned"] == other["returned"]
        assert torch.equal(one["weights"], other["weights"])
    assert len(mirrored[0]["returned"]) == 4 + 2  # and the sanity check


def test_mirrored_validation_holds_its_own_weights_only(world):
    for rank in world(4).run(validated, OneForward, {"size": 4, "microbatches": 2, "evaluation": "mirror"}):
        assert rank["held"] < 1 / 4 * 1.2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [Collects, TwiceInValidation])
def test_what_mirrored_validation_cannot_do_names_the_other_way(world, kind, size):
    said = [rank["said"] for rank in world(size).run(validated, kind, {"size": size, "microbatches": 2, "evaluation": "mirror"})]
    assert said == [said[0]] * size
    assert said[0].startswith("ConfigError")
    assert "evaluation='replicate'" in said[0]


def test_a_module_is_copied_while_its_hooks_are_replaced():
    module = Collects()
    with failing_together(module, mock.Mock()), explaining(module, mock.Mock()):
        twin = copy.deepcopy(module)
        assert pickle.loads(pickle.dumps(module)).on_validation_epoch_end.__func__ is Collects.on_validation_epoch_end
    assert twin.on_validation_epoch_end.__self__ is twin
