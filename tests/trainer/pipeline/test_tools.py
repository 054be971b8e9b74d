"""The profiler, verify and bench with a pipeline."""

import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader

from lightning_overlap import DataParallel, OverlapProfiler, OverlapStrategy, PipelineParallel, verify
from lightning_overlap.bench.measure import measure
from lightning_overlap.ranks.group import Group
from lightning_overlap.steps.named_schedules import build
from tests.helpers.pipelined import Net, loader, pipelined


def profiled(folder: Any) -> tuple[bool, list[Any], Any]:
    profiler = OverlapProfiler(every_n_steps=1, warmup=1, report=str(folder / "report.html"))
    how: Any = ({"size": 2, "schedule": "zb_h1", "microbatches": 4}, {"blocks": 4})
    done = pipelined(*how, callbacks=[profiler], max_epochs=1)
    alone = pipelined(*how, max_epochs=1)
    return done["weights"].equal(alone["weights"]), list(profiler.steps), profiler.summary


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
    assert "simulated, with forward " in table
