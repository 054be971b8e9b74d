"""The numbers of one process, for every schedule, alone and with data parallelism."""

import pytest
import torch

from tests.helpers.pairwise import pairwise
from tests.helpers.pipelined import by_hand, close, pipelined, single, with_trainer

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


COUNTS = [*pairwise(SCHEDULES, (1, 3), (2, 4)), *((schedule, 8, size) for schedule in SCHEDULES for size in (2, 4))]
"""Every schedule on two and on four ranks; with fewer microbatches than it needs to fill the ranks, each count on one of them."""


@pytest.mark.parametrize(("named", "microbatches", "size"), COUNTS, ids=str)
def test_equal_bits_to_one_process(world, named, microbatches, size):
    schedule, virtual = named
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


def test_two_stages_by_four_data_ranks(world):
    model = {"optimizer": "sgd"}
    expected = single(model)
    for rank in world(8).run(with_trainer, {"size": 2, "microbatches": 2}, model, "auto", {}):
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
