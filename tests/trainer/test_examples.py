"""The examples, as their configurations run them: the model that is saved is the one that was trained."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from transformers import AutoModelForCausalLM

from examples.train_huggingface import Functions, HuggingFaceModule
from lightning_overlap import OverlapStrategy

DATA = {"length": 64, "documents": 200}


def fit(folder, batching, sizes):
    torch.manual_seed(1)
    module = HuggingFaceModule(layers=2, width=32, save_to=str(folder))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {"max_steps": 4, "val_check_interval": 4, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    # Lightning's own environment would remove the variables of the worker, which lives on.
    strategy = OverlapStrategy(**sizes, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    trainer = Trainer(strategy=strategy, devices=2, accelerator="cpu", **length, **quiet)
    trainer.fit(module, Functions(batching, **DATA))
    return float(trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["tensor_parallel", "pipeline_parallel", "context_parallel"])
def test_a_saved_model_is_the_trained_one(world, tmp_path, batching, mode):
    losses = world(2).run(fit, tmp_path / "saved", batching, {mode: 2})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    data = Functions(batching, **DATA)
    data.setup("fit")
    with torch.no_grad():
        batches = [batch for batch, _ in zip(data.val_dataloader(), range(3), strict=False)]
        expected = sum(float(model(**batch, use_cache=False).loss) * len(batch["input_ids"]) for batch in batches)
    expected /= sum(len(batch["input_ids"]) for batch in batches)
    assert losses == pytest.approx([expected] * 2, rel=1e-4)
