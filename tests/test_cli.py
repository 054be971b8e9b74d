"""The command: plans of the configurations in configs/, word by word, and what is refused."""

import re
import sys
from pathlib import Path

import pytest

from examples.train_gpt import GPTModule
from lightning_overlap.cli import main

HERE = Path(__file__).parent


def plan(monkeypatch, capsys, *arguments):
    monkeypatch.chdir(HERE.parent)
    monkeypatch.setattr(sys, "argv", ["lightning-overlap", "plan", *arguments])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["base", "dp", "gpt15m", "pp", "tp", "cp", "moe", "gpt54m"])
def test_plans_of_the_configurations(monkeypatch, capsys, name):
    overlay = [] if name == "base" else ["-c", f"configs/{name}.yaml"]
    told = plan(monkeypatch, capsys, "-c", "configs/base.yaml", *overlay, "--devices", "8", "--num-nodes", "2")
    assert told == (HERE / "golden" / f"plan_{name}.txt").read_text()


def test_a_plan_with_the_memory_of_each_stage(monkeypatch, capsys):
    told = plan(monkeypatch, capsys, "-c", "configs/base.yaml", "-c", "configs/pp.yaml", "--devices", "8", "--memory")
    head, *rows = told[told.index("a rank of stage") :].splitlines()
    assert [row.split()[0] for row in rows] == ["0", "1"]
    sizes = [[float(size) for size in re.findall(r"([\d.]+) MB", row)] for row in rows]
    for weights, gradients, optimizer, activations, largest, buffers, together in sizes:
        assert gradients == pytest.approx(weights, rel=0.05)
        assert optimizer == pytest.approx(2 * weights / 4, rel=0.05)  # AdamW's two states, over 4 data ranks
        assert together == pytest.approx(weights + gradients + optimizer + activations + buffers, abs=0.5)
        assert 0 < largest < activations
    parameters = sum(parameter.nbytes for parameter in GPTModule().parameters())
    assert sum(weights for weights, *_ in sizes) == pytest.approx(parameters / 1e6, rel=0.05)
    assert head.split()[-5:] == ["activations", "(largest", "one)", "buffers", "together"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-nodes", "2"], "--num-nodes needs --devices"),
        (["--trainer.strategy", "ddp"], "set trainer.strategy: overlap"),
        (["-c", "configs/dp.yaml", "--trainer.strategy.init_args.data_parallel.size", "3", "--devices", "4"], "needs 3 ranks"),
    ],
)
def test_what_cannot_be_is_told(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        plan(monkeypatch, capsys, "-c", "configs/base.yaml", *arguments)
    assert words in str(caught.value)


STRATEGY = "--trainer.strategy.init_args"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--version"], ""),
        ([f"{STRATEGY}.tensor_paralel", "2"], "unknown setting 'tensor_paralel' of OverlapStrategy; did you mean 'tensor_parallel'?"),
        ([f"{STRATEGY}.tensor_parallel.sise", "2"], "unknown setting 'sise' of TensorParallel; did you mean 'size'?"),
        ([f"{STRATEGY}.tensor_parallel", "two"], "trainer.strategy.tensor_parallel: must be int or TensorParallel, got two"),
        ([f"{STRATEGY}.tensor_parallel", "-2"], "tensor_parallel.size must be an integer of at least 1, got -2"),
        ([f"{STRATEGY}.pipeline_parallel", "0"], "pipeline_parallel.size must be an integer of at least 1, got 0"),
        ([f"{STRATEGY}.overlap", "on"], "trainer.strategy.overlap: must be one of 'auto', 'off', got on"),
        (["--trainer.strategy", "overlapp"], "trainer.strategy: unknown name 'overlapp'; did you mean 'overlap'?"),
        (["--config", "bas.yaml"], "config: File does not exist"),
        (["--model", "examples.train_gpt.GPTModul"], "did you mean 'GPTModule'?"),
        (["--model.blok_size", "3"], "model.blok_size: unknown setting 'blok_size' of GPTModule; did you mean 'block_size'?"),
        (["--devices", "two"], "--devices needs a number of at least 1, got two"),
        (["--trainer.max_steps", "two"], "trainer.max_steps: must be int, got two"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit) as caught:
        plan(monkeypatch, capsys, "-c", "configs/base.yaml", *arguments)
    printed = capsys.readouterr()
    errors = [text for text in (*printed.err.splitlines(), str(caught.value.code)) if text.startswith("error: ")]
    assert len(errors) == (line != ""), (printed, caught.value)
    assert all(line in error for error in errors), errors
    assert "Traceback" not in printed.err
    assert "usage" not in printed.err


def test_a_file_with_an_unknown_setting(monkeypatch, capsys, tmp_path):
    overlay = tmp_path / "typing.yaml"
    overlay.write_text("trainer: {strategy: {init_args: {tensor_parallel: {sise: 2}}}}")
    with pytest.raises(SystemExit):
        plan(monkeypatch, capsys, "-c", "configs/base.yaml", "-c", str(overlay))
    assert "error: trainer.strategy.tensor_parallel: unknown setting 'sise' of TensorParallel" in capsys.readouterr().err


def test_a_switch_needs_no_value(monkeypatch, capsys):
    assert "rank 0  F0.0" in plan(
        monkeypatch, capsys, "-c", "configs/base.yaml", "-c", "configs/pp.yaml", "--devices", "2", "--schedule"
    )


@pytest.mark.parametrize(
    ("machine", "devices", "nodes", "layout"),
    [
        ("1x8", 8, 1, "8 ranks on cpu with gloo, precision bf16-mixed: tensor 2 x data 4"),
        ("4x8", 8, 4, "32 ranks on cpu with gloo, precision bf16-mixed: pipeline 2 x tensor 4 x data 4"),
        ("64x8", 8, 64, "512 ranks on cpu with gloo, precision bf16-mixed: pipeline 8 x tensor 8 x data 8"),
    ],
)
def test_recipes_for_machines(monkeypatch, capsys, machine, devices, nodes, layout):
    ranks = ["--devices", str(devices), "--num-nodes", str(nodes), "--model.n_layer", "16", "--model.n_head", "8"]
    assert layout in plan(monkeypatch, capsys, "-c", "configs/base.yaml", "-c", f"configs/machine_{machine}.yaml", *ranks)


def test_methods_in_a_file(monkeypatch, capsys, tmp_path):
    file = tmp_path / "methods.yaml"
    head = "trainer: {strategy: {class_path: lightning_overlap.OverlapStrategy, init_args: {tensor_parallel: "

    def told(methods):
        file.write_text(head + "{size: 2, methods: {" + methods + "}}}}}")
        return plan(monkeypatch, capsys, "-c", "configs/base.yaml", "-c", str(file), "--devices", "2")

    assert "  methods.row_fprop    plain  plain " in told("row_fprop: plain")
    with pytest.raises(SystemExit, match=r"methods\.row_fprop must be pipeline or plain, got 'fast'"):
        told("row_fprop: fast")


def test_a_plan_needs_no_machine_of_its_size(monkeypatch, capsys):
    pipeline = "--trainer.strategy.init_args.pipeline_parallel"
    model = ["--model.init_args.n_layer", "64", "--model.init_args.n_embd", "8"]
    large = [*model, f"{pipeline}.size", "32", f"{pipeline}.microbatches", "128", "--devices", "8", "--num-nodes", "16"]
    told = plan(monkeypatch, capsys, "-c", "configs/base.yaml", "-c", "configs/pp.yaml", *large, "--times", "22.7,44.8,18.6")
    assert "pipeline 32 x data 4" in told
    assert "simulated: a batch takes 21716 ms" in told
