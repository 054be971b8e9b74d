"""The command on paper: it rehearses the examples' GPT, and its best layout is a configuration that the other commands read."""

import sys

import pytest

from lightning_overlap.cli import main
from tests.test_cli import HERE

SMALL = ["--model.n_layer", "2", "--model.n_embd", "16", "--model.block_size", "16", "--data.block_size", "16"]


def command(monkeypatch, *arguments):
    monkeypatch.chdir(HERE.parent)
    monkeypatch.setattr(sys, "argv", ["lightning-overlap", *arguments])
    main()


def test_the_best_layout_is_a_configuration(monkeypatch, capsys, tmp_path):
    best = str(tmp_path / "best.yaml")
    base = ["-c", "configs/base.yaml", *SMALL]
    link = ["--devices", "1", "--num-nodes", "2", "--link", "1mbit,1ms"]
    tensor = ["--trainer.strategy.init_args.tensor_parallel", "2"]
    command(monkeypatch, "tune", *base, *tensor, *link, "--seconds", "0", "--output", best)
    table = capsys.readouterr().out
    assert "2 ranks on 2 hosts, on paper; 2 layouts rehearsed; between hosts: 1 Mbit/s, 1.00 ms" in table
    assert "(configured): transfers of " in table
    assert "(data parallelism alone): transfers of " in table
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "fit", *base, "-c", best, "--print_config")
    assert not ended.value.code
    config = capsys.readouterr().out
    assert "tensor_parallel:\n" in config
    assert "num_nodes: 2" in config
    assert "batch_size: 16" in config, "the configured layout's batch: one data rank of 16"
    command(monkeypatch, "plan", *base, "-c", best)
    assert "2 ranks on cpu with gloo, precision 32-true: tensor 2" in capsys.readouterr().out


def test_without_ranks_links_must_be_given(monkeypatch):
    with pytest.raises(SystemExit, match=r"links cannot be measured: pass --link 300mbit,0\.5ms \(the link between hosts\)"):
        command(monkeypatch, "tune", "-c", "configs/base.yaml", "--devices", "1", "--num-nodes", "2")
    with pytest.raises(SystemExit, match="one rank has no layout to choose"):
        command(monkeypatch, "tune", "-c", "configs/base.yaml", "--trainer.devices", "1")


def test_the_help_lists_no_class_of_the_rehearsals(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # class paths in one piece
    with pytest.raises(SystemExit):
        command(monkeypatch, "fit", "--trainer.strategy.help", "lightning_overlap.OverlapStrategy")
    text = capsys.readouterr().out
    assert "TorchElasticEnvironment" in text, "it lists the environments that a user can choose"
    assert "RehearsedEnvironment" not in text
