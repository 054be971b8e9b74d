"""On a device: the numbers of one process under every mode and mixture, and the bits of overlap off."""

import pytest
import torch

from lightning_overlap import DataParallel, PipelineParallel, TensorParallel
from tests.gpu.training import fit, fit_alone, fit_by_hand

pytestmark = pytest.mark.gpu

DATA = {"data_parallel": DataParallel(bucket_size=2000)}
SETTINGS = {
    "plain": ({}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 3}),
    "clipping": ({}, {"gradient_clip_val": 0.1}),
    "tied": ({"tied": True}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
}
SCHEDULES = [
    *(("1f1b", 1), ("eager_1f1b", 1), ("gpipe", 2), ("interleaved", 2)),
    *(("zb_h1", 1), ("interleaved_zb", 2), ("zb_v", 2), ("dualpipev", 2)),
]
TENSOR = {
    "sequence": {"size": 2, "vocab_parallel": True},
    "all tokens": {"size": 2, "sequence_parallel": False},
    "symmetric memory": {"size": 2, "backend": "symm_mem"},
}
MIXTURES = {
    "tensor x data": {"tensor_parallel": TensorParallel(size=2), **DATA},
    "pipeline x data": {"pipeline_parallel": PipelineParallel(size=2, microbatches=2), **DATA},
    "tensor x pipeline": {"tensor_parallel": TensorParallel(size=2), "pipeline_parallel": PipelineParallel(size=2, microbatches=2)},
    "tensor x interleaved": {
        "tensor_parallel": TensorParallel(size=2),
        "pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, microbatches=4),
    },
}


def close(answers, expected, precision="32-true"):
    within = 1e-2 if "bf16" in str(precision) else 1e-5
    for answer in answers:
        torch.testing.assert_close(answer["weights"], expected["weights"], rtol=within, atol=within)
        for name in ("loss", "val_loss"):
            assert answer["metrics"][name] == pytest.approx(expected["metrics"][name], rel=within)


@pytest.mark.parametrize("setting", SETTINGS)
def test_data_parallelism(hosts, device, setting):
    model, trainer = SETTINGS[setting]
    overlapped = hosts(2).run(fit, device, DATA, model, trainer)
    plain = hosts(2).run(fit, device, {**DATA, "overlap": "off"}, model, trainer)
    for one, other in zip(overlapped, plain, strict=True):
        assert torch.equal(one["weights"], other["weights"])
    close(overlapped, hosts(2).run(fit_alone, device, model, trainer)[0], trainer.get("precision"))


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_schedules(hosts, device, schedule, virtual):
    layout = {"pipeline_parallel": PipelineParallel(size=2, schedule=schedule, virtual_stages=virtual, microbatches=4)}
    expected = hosts(2).run(fit_by_hand, device, {}, 4)[0]
    for answer in hosts(2).run(fit, device, layout, {}, {}):
        torch.testing.assert_close(answer["weights"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("setting", ["accumulation", "clipping", "tied", "bf16-mixed"])
def test_a_pipeline_has_the_bits_of_overlap_off(hosts, device, setting):
    model, trainer = SETTINGS[setting]
    layout = {"pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, microbatches=4)}
    overlapped = hosts(2).run(fit, device, layout, model, trainer)
    plain = hosts(2).run(fit, device, {**layout, "overlap": "off"}, model, trainer)
    for one, other in zip(overlapped, plain, strict=True):
        assert torch.equal(one["weights"], other["weights"])
    close(overlapped, hosts(2).run(fit_alone, device, model, trainer)[0], trainer.get("precision"))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", TENSOR)
def test_tensor_parallelism(hosts, device, kind, setting):
    if kind == "symmetric memory" and device == "cpu":
        pytest.skip("symmetric memory is of CUDA")
    model, trainer = SETTINGS[setting]
    answers = hosts(2).run(fit, device, {"tensor_parallel": TensorParallel(**TENSOR[kind])}, model, trainer)
    close(answers, hosts(2).run(fit_alone, device, model, trainer)[0], trainer.get("precision"))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_of_four_ranks(hosts, device, mixture):
    answers = hosts(4).run(fit, device, MIXTURES[mixture], {}, {})
    close(answers, hosts(4).run(fit_alone, device, {}, {})[0])


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("mixture", ["tensor x data", "pipeline x data", "tensor x pipeline"])
def test_a_checkpoint_goes_on_as_the_run_that_was_not_stopped(hosts, device, tmp_path, mixture, kind):
    layout = {**MIXTURES[mixture], "state_dict_type": kind}
    path = str(tmp_path / "half.ckpt")
    hosts(4).run(fit, device, layout, {}, {"max_epochs": 1}, None, path)
    whole = hosts(4).run(fit, device, layout, {}, {})
    resumed = hosts(4).run(fit, device, layout, {}, {}, path)
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(one["weights"], other["weights"])
