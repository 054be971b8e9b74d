"""The examples, as their configurations run them: the model that is saved is the one that was trained, alone or on several ranks."""

import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from examples.train_gpt import GPTModule, StandardLibraryText
from examples.train_huggingface import Functions, HuggingFaceModule
from examples.train_lora import LoRAModule
from examples.train_own_model import Regressor
from lightning_overlap import ContextParallel, OverlapStrategy

ROOT = Path(__file__).parent.parent.parent
DATA = {"length": 64, "documents": 200}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def strategy(sizes):
    # Lightning's own environment would remove the variables of the worker, which lives on.
    return OverlapStrategy(**sizes, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")


def fit(folder, batching, sizes):
    torch.manual_seed(1)
    module = HuggingFaceModule(layers=2, width=32, save_to=str(folder))
    length = {"max_steps": 4, "val_check_interval": 4, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    trainer = Trainer(strategy=strategy(sizes), devices=2, accelerator="cpu", **length, **QUIET)
    trainer.fit(module, Functions(batching, **DATA))
    return float(trainer.callback_metrics["val_loss"])


def long_context():
    arguments = yaml.safe_load((ROOT / "configs" / "long_context.yaml").read_text())["trainer"]["strategy"]["init_args"]
    return {"context_parallel": ContextParallel(**arguments["context_parallel"])}


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["tensor_parallel", "pipeline_parallel", "context_parallel"])
def test_a_saved_model_is_the_trained_one(world, tmp_path, batching, mode):
    sizes = long_context() if (mode, batching) == ("context_parallel", "packed") else {mode: 2}
    losses = world(2).run(fit, tmp_path / "saved", batching, sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    data = Functions(batching, **DATA)
    data.setup("fit")
    with torch.no_grad():
        batches = [batch for batch, _ in zip(data.val_dataloader(), range(3), strict=False)]
        expected = sum(float(model(**batch, use_cache=False).loss) * len(batch["input_ids"]) for batch in batches)
    expected /= sum(len(batch["input_ids"]) for batch in batches)
    assert losses == pytest.approx([expected] * 2, rel=1e-4)


def trained(kind, options, batches, sizes=None):
    """The loss and the weights after a step on each batch: in one process, or on the ranks of a world."""
    torch.manual_seed(1)
    module = kind(**options)
    where = {"strategy": strategy(sizes), "devices": 2} if sizes else {"strategy": "auto", "devices": 1}
    trainer = Trainer(accelerator="cpu", max_epochs=1, use_distributed_sampler=False, **where, **QUIET)  # in this order
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return float(trainer.callback_metrics["loss"]), module.state_dict()


def text_batches(count):
    data = StandardLibraryText(block_size=32, batch_size=4, megabytes=0.02)
    data.setup("fit")
    return list(islice(data.val_dataloader(), count))


SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


@pytest.mark.parametrize(
    ("kind", "options"), [(LoRAModule, {**SMALL, "lr": 1e-2}), (Regressor, {"width": 16, "depth": 2})], ids=["lora", "own model"]
)
@pytest.mark.parametrize("mode", ["tensor_parallel", "pipeline_parallel"])
def test_an_own_model_is_sharded_by_its_roles(world, kind, options, mode):
    batches = text_batches(4) if kind is LoRAModule else list(islice(Regressor().train_dataloader(), 4))
    loss, weights = trained(kind, options, batches)
    for ours, our_weights in world(2).run(trained, kind, options, batches, {mode: 2}):
        assert ours == pytest.approx(loss, rel=1e-5)
        # AdamW divides by the size of a gradient: where it is nearly zero, another order of partial sums moves a weight by more.
        torch.testing.assert_close(our_weights, weights, rtol=1e-3, atol=1e-5)


def test_adapters_begin_at_the_model_that_was_trained(tmp_path):
    torch.manual_seed(1)
    base = GPTModule(**SMALL)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    adapted = LoRAModule(pretrained=str(tmp_path / "base.ckpt"), **SMALL)
    (batch,) = text_batches(1)
    assert adapted.loss(batch).item() == base.loss(batch).item()
    assert {name.rpartition(".qkv.")[2] for name, p in adapted.named_parameters() if p.requires_grad} == {"a.weight", "b.weight"}


def run(*command, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_notebook_runs():
    ran = run(sys.executable, "-m", "tests.helpers.notebook", "examples/notebook.ipynb")
    output, _ = ran.communicate(timeout=120)
    assert ran.returncode == 0, output
    assert "tensor_parallel 2 2 parallel_plan of GPTModule" in " ".join(output.split()), "the plan"


def test_two_nodes_train(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(tmp_path)]
    short += ["--trainer.logger", "false", "--trainer.callbacks", "null", "--trainer.enable_checkpointing", "false"]
    short += ["--model.n_layer", "1", "--model.n_embd", "32", "--data.megabytes", "0.05"]
    nodes = [run("bash", "examples/two_nodes.sh", str(node), "127.0.0.1", *short, PORT=port) for node in range(2)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 ranks on cpu with gloo, precision 32-true: data 2" in outputs[0]
    assert not [output for output in outputs if "LeafSpec" in output], "what no user can act on"
    assert all("`Trainer.fit` stopped: `max_steps=2` reached." in output for output in outputs[:1]), outputs
