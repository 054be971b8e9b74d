"""The decision about lanes: where they run, and why they do not."""

import pytest

from lightning_overlap import ConfigError, ContextParallel, OverlapConfig, PipelineParallel, TensorParallel
from lightning_overlap.facts import Facts
from lightning_overlap.plan import resolve

TENSOR = {"tensor_parallel": TensorParallel(size=2)}


def lanes(size=1, microbatches=4, world_size=4, device="cpu", modes=TENSOR, **settings):
    pipeline = PipelineParallel(size=size, microbatches=microbatches, **settings)
    plan = resolve(OverlapConfig(pipeline_parallel=pipeline, **modes), Facts(world_size=world_size, device=device))
    return plan.choices["pipeline"].lanes


def test_lanes_are_on_in_one_process_where_ranks_wait_inside_a_stage():
    choice = lanes()
    assert choice.value
    assert choice.why.startswith("3 of 4 forwards run beside another microbatch's backward: what tensor_parallel would wait for")
    assert choice.why.endswith("peak activations by rank: 2")
    both = lanes(modes={**TENSOR, "context_parallel": ContextParallel(size=2)})
    assert "tensor_parallel and context_parallel would wait for" in both.why
    assert not lanes(lanes=False).value


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"modes": {}}, "there is nothing to hide: no rank waits inside a stage"),
        ({"device": "cuda"}, "on CUDA two lanes would share one stream, and hide nothing"),
        ({"size": 2, "schedule": "1f1b"}, "schedule 1f1b has no forward beside a backward"),
        (
            {"size": 2, "schedule": "eager_1f1b", "overlap_p2p": False},
            "overlap_p2p: false sends between two actions, and not in a pair",
        ),
    ],
)
def test_why_lanes_are_off(settings, why):
    assert (lanes(**settings).value, why in lanes(**settings).why) == (False, True)
    with pytest.raises(ConfigError, match=f"pipeline_parallel.lanes: true cannot run here: {why}"):
        lanes(lanes=True, **settings)


def test_lanes_of_a_pipeline_are_asked_for():
    assert "which makes the pipeline 13% longer where nothing waits: set lanes: true and measure" in lanes(size=2).why
    choice = lanes(size=2, lanes=True)
    assert choice.value
    assert choice.why.startswith("5 of 8 forwards run beside")


def test_lanes_need_microbatches():
    with pytest.raises(ConfigError, match=r"lanes: true cannot run here: there is one microbatch: set microbatches, 4 for example"):
        lanes(size=2, microbatches=1, lanes=True)


def test_a_file_may_have_its_own_pairs(tmp_path):
    path = tmp_path / "schedule"
    path.write_text("F0.0 F0.1|B0.0 F0.2 B0.1 B0.2\n")
    assert lanes(schedule=str(path), microbatches=3).why.startswith("1 of 3 forwards run beside")
