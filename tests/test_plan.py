import ast
from pathlib import Path

import pytest

import lightning_overlap
from lightning_overlap import ConfigError, DataParallel, OverlapConfig, OverlapStrategy, TensorParallel
from lightning_overlap.config import Degrees
from lightning_overlap.facts import Facts, OptimizerFacts
from lightning_overlap.mesh import ParallelMesh
from lightning_overlap.plan import resolve

PACKAGE = Path(lightning_overlap.__file__).parent
STDLIB_ONLY = ["config.py", "decision.py", "plan.py", "modes/data/layout.py", *sorted(
    str(p.relative_to(PACKAGE)) for p in PACKAGE.glob("modes/*/config.py"))]  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", STDLIB_ONLY)
def test_stdlib_only(path):
    assert not [name for name in imports(path) if name.split(".")[0] in ("torch", "lightning", "torchmetrics")]


def test_modes_know_neither_each_other_nor_lightning():
    for path in PACKAGE.glob("modes/*/*.py"):
        own = f"lightning_overlap.modes.{path.parent.name}"
        for name in imports(path.relative_to(PACKAGE)):
            assert not name.startswith("lightning."), f"{path} imports {name}"
            assert not name.startswith("lightning_overlap.modes.") or name.startswith((own, "lightning_overlap.modes.base"))


def choices(config=None, **facts):
    plan = resolve(config or OverlapConfig(), Facts(world_size=facts.pop("world_size", 2), **facts))
    return {d.feature.removeprefix("data_parallel."): d.choice for d in plan.decisions}


ADAM = OptimizerFacts("AdamW", True, True, True, "AdamW updates each element on its own")
NORM = OptimizerFacts("Norm", False, False, False, "Norm looks at all parameters at once")
MUON = OptimizerFacts("Muon", True, False, False, "Muon does not update each element on its own")


def test_everything_overlaps_by_default():
    found = choices(optimizers=(ADAM,), parameters=14_700_000)
    assert found["distributed_optimizer"] == "elementwise shards"
    assert found["gradients"] == "reduce-scatter"
    assert found["overlap_grad_reduce"] == found["overlap_optimizer_step"] == "in backward"
    assert found["overlap_param_gather"] == "under next forward"
    assert found["bucket_size"] == str(14_700_000 // 32)


@pytest.mark.parametrize(("world_size", "size"), [(8, "40000000"), (64, "64000000")])
def test_large_models_get_the_reference_bucket_size(world_size, size):
    assert choices(world_size=world_size, parameters=10**11)["bucket_size"] == size


@pytest.mark.parametrize(
    ("facts", "feature", "choice"),
    [
        ({"gradient_clip_val": 1.0}, "overlap_optimizer_step", "by bucket after backward"),
        ({"gradient_readers": ("Net.on_after_backward",)}, "gradients", "all-reduce"),
        ({"gradient_readers": ("Net.on_after_backward",)}, "overlap_optimizer_step", "by bucket after backward"),
        ({"automatic_optimization": False}, "distributed_optimizer", "off"),
        ({"automatic_optimization": False}, "overlap_param_gather", "off"),
        ({"optimizers": (MUON,)}, "distributed_optimizer", "whole parameters"),
        ({"optimizers": (MUON,)}, "overlap_optimizer_step", "off"),
    ],
)
def test_auto_declines(facts, feature, choice):
    assert choices(**facts)[feature] == choice


def test_overlap_off_keeps_the_layout():
    found = choices(OverlapConfig(overlap="off"))
    assert found["distributed_optimizer"] == "elementwise shards"
    assert {found[k] for k in ("overlap_grad_reduce", "overlap_param_gather", "overlap_optimizer_step")} == {"off"}


@pytest.mark.parametrize(
    ("data", "facts", "words"),
    [
        ({"overlap_optimizer_step": True}, {"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"overlap_optimizer_step": True, "check_for_nan_in_grad": True}, {"gradient_clip_val": 1.0}, "check_for_nan"),
        ({"distributed_optimizer": True}, {"automatic_optimization": False}, "manual optimization"),
        ({"overlap_param_gather": True, "distributed_optimizer": False}, {}, "needs the distributed optimizer"),
        ({"num_optimizer_instances": 3}, {"world_size": 4}, "must divide"),
        ({"size": 3}, {"world_size": 4}, "needs 3 ranks, and there are 4"),
        ({}, {"precision": "16-mixed"}, "use bf16-mixed"),
        ({"distributed_optimizer": True}, {"unfreezers": ("BackboneFinetuning",)}, "BackboneFinetuning brings in parameters"),
        ({"distributed_optimizer": True}, {"optimizers": (NORM,)}, "looks at all parameters at once"),
        ({}, {"optimizers": (OptimizerFacts("LBFGS", False, False, False, ""),)}, "L-BFGS"),
    ],
)
def test_explicit_requests_are_not_dropped(data, facts, words):
    with pytest.raises(ConfigError, match=words):
        choices(OverlapConfig(data_parallel=DataParallel(**data)), **facts)


@pytest.mark.parametrize("bad", [{"size": 0}, {"bucket_size": "big"}, {"overlap_grad_reduce": "yes"}, {"grad_reduce_dtype": "fp8"}])
def test_bad_values(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DataParallel(**bad)


def test_modes_to_come_are_refused():
    config = OverlapConfig(tensor_parallel=TensorParallel(size=2))
    with pytest.raises(ConfigError, match="tensor parallelism is not in this version; set tensor_parallel: 1"):
        resolve(config, Facts(world_size=4))


def test_strategy_refuses_before_anything_starts():
    from lightning.pytorch import Trainer

    with pytest.raises(ConfigError, match=r"data_parallel\.size=4"):
        Trainer(strategy=OverlapStrategy(data_parallel=4), accelerator="cpu", devices=2)


def test_mesh():
    mesh = ParallelMesh(Degrees(pp=2, dp=2, ep=1, cp=1, tp=2), rank=5)
    assert mesh.coordinates() == {"pp": 1, "dp": 0, "ep": 0, "cp": 0, "tp": 1}
    assert mesh.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [4, 5] in mesh.groups("tp")
    assert [4, 5, 6, 7] in mesh.groups("dp", "tp")
