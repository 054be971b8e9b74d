import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import lightning_overlap
from lightning_overlap import (
    ConfigError,
    DataParallel,
    OverlapConfig,
    OverlapStrategy,
    PipelineParallel,
    TensorParallel,
)
from lightning_overlap.facts import Facts, OptimizerFacts
from lightning_overlap.modes.pipeline.config import PipelineFacts
from lightning_overlap.modes.tensor.config import TensorFacts
from lightning_overlap.plan import resolve

PACKAGE = Path(lightning_overlap.__file__).parent
STDLIB_ONLY = ["config.py", "decision.py", "facts.py", "plan.py", "modes/data/layout.py", *sorted(
    str(p.relative_to(PACKAGE)) for p in PACKAGE.glob("modes/*/config.py"))]  # fmt: skip


SHARED = tuple(f"lightning_overlap.modes.{name}" for name in ("base", "descriptor", "piece_holder"))


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
            assert not name.startswith("lightning_overlap.modes.") or name.startswith((own, *SHARED))


def choices(config=None, **facts):
    plan = resolve(config or OverlapConfig(), Facts(world_size=facts.pop("world_size", 2), **facts))
    return {name.removeprefix("data_parallel."): choice.value for name, choice in plan.features().items()}


ADAM = OptimizerFacts("AdamW", True, True, True, "AdamW updates each element on its own")
NORM = OptimizerFacts("Norm", False, False, False, "Norm looks at all parameters at once")
MUON = OptimizerFacts("Muon", True, False, False, "Muon does not update each element on its own")
REFUSES = OptimizerFacts("Shy", False, False, False, "Shy fails on test matrices (TypeError: no), so it is unknown", known=False)
SWAPS = OptimizerFacts("Free", True, True, True, "Free updates each element on its own", methods=("eval", "train"))


def test_everything_overlaps_by_default():
    found = choices(optimizers=(ADAM,), parameters=14_700_000)
    assert found["distributed_optimizer"] == "elementwise shards"
    assert found["gradients"] == "reduce-scatter"
    assert found["overlap_grad_reduce"] is True
    assert found["overlap_optimizer_step"] == "in backward"
    assert found["overlap_param_gather"] == "under next forward"
    assert found["bucket_size"] == 14_700_000 // 32


@pytest.mark.parametrize(("world_size", "size"), [(8, 40_000_000), (64, 64_000_000)])
def test_large_models_get_the_reference_bucket_size(world_size, size):
    assert choices(world_size=world_size, parameters=10**11)["bucket_size"] == size


@pytest.mark.parametrize(
    ("facts", "feature", "choice"),
    [
        ({"gradient_clip_val": 1.0}, "overlap_optimizer_step", "after backward"),
        ({"gradient_readers": ("Net.on_after_backward",)}, "gradients", "all-reduce"),
        ({"gradient_readers": ("Net.on_after_backward",)}, "overlap_optimizer_step", "after backward"),
        ({"automatic_optimization": False}, "distributed_optimizer", "off"),
        ({"automatic_optimization": False}, "overlap_param_gather", "off"),
        ({"optimizers": (MUON,)}, "distributed_optimizer", "whole parameters"),
        ({"optimizers": (MUON,)}, "overlap_optimizer_step", "off"),
        ({"optimizers": (REFUSES,)}, "distributed_optimizer", "off"),
        ({"optimizers": (SWAPS,)}, "distributed_optimizer", "off"),
    ],
)
def test_auto_declines(facts, feature, choice):
    assert choices(**facts)[feature] == choice


@pytest.mark.parametrize(
    ("data", "pipeline", "facts", "choice", "why"),
    [
        ({"align_param_gather": True}, 2, {}, True, "after the step, all stages gather"),
        ({}, 2, {}, False, "each stage gathers when its own backward ends"),
        ({}, 2, {"gradient_clip_val": 1.0}, False, "all stages gather after backward without it"),
        ({}, 1, {}, False, "no pipeline: there are no stages to align"),
    ],
)
def test_gathers_of_several_stages_are_aligned_when_asked_to(data, pipeline, facts, choice, why):
    config = OverlapConfig(data_parallel=DataParallel(**data), pipeline_parallel=PipelineParallel(size=pipeline))
    plan = resolve(config, Facts(world_size=4, **facts))
    decision = plan.features()["data_parallel.align_param_gather"]
    assert decision.value is choice
    assert why in decision.why


def test_overlap_off_keeps_the_layout():
    found = choices(OverlapConfig(overlap="off"))
    assert found["distributed_optimizer"] == "elementwise shards"
    assert [found[k] for k in ("overlap_grad_reduce", "overlap_param_gather", "overlap_optimizer_step")] == [False, "off", "off"]


@pytest.mark.parametrize(
    ("data", "facts", "words"),
    [
        ({"overlap_optimizer_step": True}, {"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"overlap_optimizer_step": True, "check_for_nan_in_grad": True}, {"gradient_clip_val": 1.0}, "check_for_nan"),
        ({"distributed_optimizer": True}, {"automatic_optimization": False}, "manual optimization"),
        ({"overlap_param_gather": True, "distributed_optimizer": False}, {}, "needs the distributed optimizer"),
        ({"align_param_gather": True}, {}, "no pipeline: .*; remove the setting, or set pipeline_parallel.size"),
        ({"align_param_gather": True, "distributed_optimizer": False}, {}, "no pipeline: .*; it needs the distributed optimizer"),
        ({"align_param_gather": True, "overlap_param_gather": False}, {}, "set data_parallel.overlap_param_gather: true"),
        (
            {"align_param_gather": True, "param_gather_prefetch": 2},
            {},
            "forward posts the gathers; set it to all",
        ),
        ({"num_optimizer_instances": 3}, {"world_size": 4}, "must divide"),
        ({"size": 3}, {"world_size": 4}, "needs 3 ranks, and there are 4"),
        ({}, {"precision": "16-mixed"}, "use bf16-mixed"),
        ({"distributed_optimizer": True}, {"unfreezers": ("BackboneFinetuning",)}, "BackboneFinetuning adds parameters"),
        ({"distributed_optimizer": True}, {"optimizers": (NORM,)}, "looks at all parameters at once"),
        ({"distributed_optimizer": True}, {"optimizers": (REFUSES,)}, r"Shy fails on test matrices \(TypeError: no\)"),
        ({"distributed_optimizer": True}, {"optimizers": (SWAPS,)}, "Free.eval, Free.train reads the optimizer's state outside"),
        ({}, {"optimizers": (OptimizerFacts("LBFGS", False, False, False, ""),)}, "L-BFGS"),
    ],
)
def test_explicit_requests_are_not_dropped(data, facts, words):
    with pytest.raises(ConfigError, match=words):
        choices(OverlapConfig(data_parallel=DataParallel(**data)), **facts)


def test_what_a_pipeline_cannot_run_with():
    config = OverlapConfig(pipeline_parallel=PipelineParallel(size=2))
    with pytest.raises(
        ConfigError, match=r"EMAWeightAveraging averages all weights, but a rank has only its stages': save checkpoints"
    ):
        resolve(config, Facts(world_size=2, averagers=("EMAWeightAveraging",)))


DEFER = "pipeline_parallel.defer_embedding_wgrad"
EVEN = {"of_modes": (PipelineFacts("blocks", (2, 2), (12, 12), 4, 0.9, ("Conv1D",)),)}


@pytest.mark.parametrize(
    ("pipeline", "facts", "choice", "why"),
    [
        ({}, EVEN, True, r"would wait, for at most 2 microbatches: estimated gain 3\.7% of a step"),
        ({"wgrad_deferral_limit": 1}, EVEN, True, r"at most 1 microbatches: estimated gain 2\.5%"),
        ({"defer_embedding_wgrad": True}, EVEN, True, r"at most 8 microbatches: estimated gain 7\.4%"),
        ({"schedule": "zb_h1"}, EVEN, True, "while its rank would wait: estimated gain"),
        ({}, {"of_modes": (PipelineFacts("blocks", (2, 2), (12, 12), 0),)}, False, "there is no trained nn.Linear"),
        ({}, {"of_modes": (PipelineFacts("blocks", (2, 2), (120, 120), 1),)}, False, "estimated gain is only 0"),
        ({}, {}, False, "the model is not known yet"),
        ({"defer_embedding_wgrad": False}, EVEN, False, "as configured"),
        ({"size": 1, "microbatches": 4}, {}, False, "one rank"),
    ],
)
def test_the_heads_gradients_are_deferred_where_that_wins(pipeline, facts, choice, why):
    config = OverlapConfig(pipeline_parallel=PipelineParallel(**{"size": 2, **pipeline}))
    decision = resolve(config, Facts(world_size=2, **facts)).features()[DEFER]
    assert decision.value is choice
    assert re.search(why, decision.why)


def test_the_plan_tells_stages_and_what_a_split_backward_leaves():
    config = OverlapConfig(pipeline_parallel=PipelineParallel(size=2, schedule="zb_h1"))
    features = resolve(config, Facts(world_size=2, **EVEN)).features()
    assert features["pipeline_parallel.size"].why == "2 stages, one per rank; blocks by stage: 2, 2 (blocks)"
    expected = "in linear layers: 90% of the blocks' trained parameters; not in Conv1D"
    assert features["pipeline_parallel.split_backward"].why == expected


def test_a_schedules_file_is_run_as_it_stands(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("F0.0 B0.0\nF1.0 B1.0\n")
    own = PipelineParallel(size=2, microbatches=1, schedule=str(file))
    assert choices(OverlapConfig(pipeline_parallel=own), **EVEN)[DEFER] is False
    asked = replace(own, defer_embedding_wgrad=True)
    assert choices(OverlapConfig(pipeline_parallel=asked), **EVEN)[DEFER] is True


@pytest.mark.parametrize(
    ("pipeline", "facts", "words"),
    [
        ({}, {"of_modes": (PipelineFacts("blocks", (2, 2), (12, 12), 0),)}, "there is no trained nn.Linear after the blocks"),
        ({"size": 1, "microbatches": 4}, {}, "one rank waits for no other"),
        ({"schedule": "zb_h1", "wgrad_deferral_limit": 2}, EVEN, "remove wgrad_deferral_limit"),
    ],
)
def test_deferral_that_cannot_be_is_not_dropped(pipeline, facts, words):
    config = OverlapConfig(pipeline_parallel=PipelineParallel(**{"size": 2, "defer_embedding_wgrad": True, **pipeline}))
    with pytest.raises(ConfigError, match=words):
        resolve(config, Facts(world_size=2, **facts))


@pytest.mark.parametrize(
    "bad",
    [{"wgrad_deferral_limit": -1}, {"defer_embedding_wgrad": "yes"}, {"wgrad_deferral_limit": 2, "defer_embedding_wgrad": False}],
)
def test_bad_values_of_deferral(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PipelineParallel(size=2, **bad)


@pytest.mark.parametrize("bad", [{"size": 0}, {"bucket_size": "big"}, {"overlap_grad_reduce": "yes"}, {"grad_reduce_dtype": "fp8"}])
def test_bad_values(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DataParallel(**bad)


def test_strategy_refuses_before_anything_starts():
    from lightning.pytorch import Trainer

    with pytest.raises(ConfigError, match=r"data_parallel\.size=4"):
        Trainer(strategy=OverlapStrategy(data_parallel=4), accelerator="cpu", devices=2)


def tensor_plan(*, found=("plan of Llama: 4 column", (), 32000), overall="auto", pipeline=None, facts=None, **given):
    own = TensorParallel(**{"size": 2, **given})
    facts = dict(facts or {})
    more = facts.pop("of_modes", ())
    config = OverlapConfig(tensor_parallel=own, overlap=overall, pipeline_parallel=pipeline or PipelineParallel())
    return resolve(config, Facts(world_size=4, of_modes=(*((TensorFacts(*found),) if found else ()), *more), **facts))


def test_tensor_parallelism_says_what_it_does():
    plan = tensor_plan()
    choices = plan.choices["tensor"]
    assert choices.sequence_parallel.value
    assert choices.overlap.value
    assert "tokens are multiplied piece by piece as they are received" in choices.overlap.why
    assert choices.vocab_parallel.value
    assert choices.size.why == "plan of Llama: 4 column"
    assert tensor_plan(found=None).choices["tensor"].size.value == 2, "before the model is known"
    assert not tensor_plan(overall="off").choices["tensor"].overlap.value
    assert not tensor_plan(found=("", (), 256)).choices["tensor"].vocab_parallel.value
    assert tensor_plan(found=("", (), 256), vocab_parallel=True).choices["tensor"].vocab_parallel.value
    loose = tensor_plan(found=("", ("blocks.0.conv", "b", "c", "d"), 32000)).choices["tensor"]
    assert not loose.sequence_parallel.value
    assert "blocks.0.conv, b, c and 1 more may mix tokens" in loose.sequence_parallel.why
    assert loose.overlap.value
    assert "inputs' gradients are summed while weights' gradients are computed" in loose.overlap.why


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"found": ("", ("blocks.0.conv",), 0), "sequence_parallel": True}, "blocks.0.conv may mix tokens"),
        ({"sequence_parallel": False, "overlap": True}, "only sequence_parallel has these"),
        ({"sequence_parallel": False, "methods": {"row_fprop": "plain"}}, "for sequence_parallel, which is off"),
        ({"overlap": False, "methods": {"row_fprop": "pipeline"}}, "overlap: false makes all of them plain: remove it"),
        (
            {"keep_gathered_input": True, "methods": {"column_wgrad": "plain"}},
            "nothing is gathered for column_wgrad: remove one of the two",
        ),
        ({"backend": "symm_mem", "methods": {"row_fprop": "plain"}, "facts": {"device": "cuda"}}, "set backend: p2p"),
        ({"size": 1, "methods": {"row_fprop": "plain"}}, "needs tensor_parallel.size of at least 2"),
        ({"found": ("", (), 0), "vocab_parallel": True}, "no embedding or head has the role"),
        ({"facts": {"precision": "16-mixed"}}, "precision 16-mixed scales the loss"),
        ({"facts": {"optimizers": (OptimizerFacts("Muon", True, False, True, ""),)}}, "Muon needs complete matrices"),
        (
            {"facts": {"clippers": ("Net.configure_gradient_clipping",)}},
            "clips by the norm of this rank's gradients only, which are pieces",
        ),
        ({"facts": {"optimizers": (REFUSES,)}}, "Shy fails on test matrices (TypeError: no)"),
        ({"facts": {"averagers": ("EMAWeightAveraging",)}}, "EMAWeightAveraging averages copies of complete weights"),
        ({"pipeline": PipelineParallel(size=2, microbatches=4, schedule="zb_h1")}, "zb_h1 splits backward"),
        (
            {
                "pipeline": PipelineParallel(size=2, microbatches=4, defer_embedding_wgrad=True),
                "facts": {"of_modes": (PipelineFacts("blocks", (2, 2), (9, 9), 5),)},
            },
            "in its own order",
        ),
    ],
)
def test_tensor_parallelism_refuses(given, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        tensor_plan(**given)


def test_methods_that_are_not_the_default_are_in_the_plan():
    plan = tensor_plan(methods={"column_dgrad": "bulk", "row_dgrad": "plain", "row_fprop": "pipeline"})
    methods = {product: choice.value for product, choice in plan.choices["tensor"].methods.items()}
    assert methods == {"column_dgrad": "bulk", "row_dgrad": "plain"}
    assert plan.explain().count("  methods.") == 2
    assert "methods" not in tensor_plan().explain()
    twin = tensor_plan(methods={"column_dgrad": "bulk"}, overall="off")  # the reference keeps the rest of the configuration
    assert twin.choices["tensor"].methods["column_dgrad"].value == "plain"
    assert hash(TensorParallel(methods={"row_fprop": "plain"})) == hash(TensorParallel())
    assert TensorParallel(methods={"row_fprop": "plain"}) != TensorParallel()


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"row_wgrad": "plain"}, "methods has no product 'row_wgrad'; it has column_fprop, column_dgrad"),
        ({"row_fprop": "bulk"}, "methods.row_fprop must be pipeline or plain, got 'bulk'"),
    ],
)
def test_bad_methods(methods, words):
    with pytest.raises(ConfigError, match=words):
        TensorParallel(size=2, methods=methods)


@pytest.mark.parametrize("bad", [{"size": 0}, {"splits": 0}, {"splits": True}, {"sequence_parallel": "yes"}, {"overlap": 1.5}])
def test_bad_values_of_tensor_parallelism(bad):
    with pytest.raises(ConfigError, match=f"tensor_parallel.{next(iter(bad))}"):
        TensorParallel(**{"size": 2, **bad})
