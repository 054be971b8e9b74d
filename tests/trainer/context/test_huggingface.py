"""Models of transformers, unchanged, under context parallelism: the numbers of one process."""

from typing import Any, NamedTuple
from unittest import mock

import pytest

from lightning_overlap import ContextParallel, PipelineParallel
from lightning_overlap.modes.context.deferred import Projection
from tests.helpers.hugging import Module, samples_of
from tests.helpers.sequences import compare, train


class Case(NamedTuple):
    """Arguments of :class:`Module`, of :func:`samples_of` and of the Trainer, and the number of ranks."""

    model: dict[str, Any]
    data: dict[str, Any]
    size: int = 2
    trainer: dict[str, Any] = {}  # noqa: RUF012  # of a tuple


CASES = {
    "plain, generates": Case({"name": "llama", "generates": True}, {"kind": "plain"}),
    "packed": Case({"name": "llama"}, {"kind": "packed"}, 4),
    "padded left": Case({"name": "llama"}, {"kind": "padded left"}),
    "accumulated, unequal token counts": Case({"name": "llama"}, {"kind": "padded right"}, 2, {"accumulate_grad_batches": 2}),
    "fewer tokens than chunks": Case({"name": "llama"}, {"kind": "plain", "tokens": 5}, 4),
    "adapters": Case({"name": "llama", "adapters": True}, {"kind": "padded left"}),
    "adapters, recomputed": Case({"name": "llama", "adapters": True, "recompute": True}, {"kind": "plain"}),
    "recorded hidden states": Case({"name": "llama", "reads_hidden": True}, {"kind": "packed"}),
    "recorded router logits": Case({"name": "mixtral"}, {"kind": "padded right"}),
    "window, recomputed": Case({"name": "mistral", "recompute": True}, {"kind": "padded right"}, 4),
    "windows and full attention": Case({"name": "gemma3"}, {"kind": "packed"}),
    "soft cap": Case({"name": "gemma2"}, {"kind": "plain"}),
    "learned positions": Case({"name": "gpt2"}, {"kind": "padded right"}),
    "bias of distances": Case({"name": "falcon"}, {"kind": "plain"}),
}


@pytest.mark.parametrize("name", CASES)
def test_close_to_one_process(world: Any, name: str) -> None:
    case = CASES[name]
    expected = train(None, Module, case.model, case.data, samples=samples_of, **case.trainer)
    for rank in world(case.size).run(train_with, {"context_parallel": ContextParallel(size=case.size)}, case):
        compare(rank, expected)


@pytest.mark.parametrize(
    ("kind", "recompute", "trainer", "tolerance"),
    [("packed", False, {}, 1e-5), ("padded left", True, {}, 1e-5), ("padded left", True, {"precision": "bf16-mixed"}, 1e-2)],
)
def test_values_are_made_while_queries_travel(
    world: Any, kind: str, recompute: bool, trainer: dict[str, Any], tolerance: float
) -> None:
    case = Case({"name": "llama", "recompute": recompute}, {"kind": kind}, 2, trainer)
    expected = train(None, Module, case.model, case.data, samples=samples_of, **trainer)
    for rank, deferred in world(2).run(count_deferred, {"context_parallel": ContextParallel(size=2, method="a2a")}, case):
        compare(rank, expected, tolerance=tolerance)
        assert deferred, "values are computed when they are read"


def count_deferred(strategy: dict[str, Any], case: Case) -> Any:
    """The results of training, and the number of projections that were computed later."""
    with mock.patch.object(Projection, "output", autospec=True, side_effect=Projection.output) as output:
        return train_with(strategy, case), output.call_count


@pytest.mark.parametrize("recompute", [False, True])  # which also leaves out the cache, whose values have the keys' dtype
def test_bf16(world: Any, recompute: bool) -> None:
    case = Case({"name": "llama", "recompute": recompute}, {"kind": "padded right"}, 2, {"precision": "bf16-mixed"})
    expected = train(None, Module, case.model, case.data, samples=samples_of, **case.trainer)
    for rank in world(2).run(train_with, {"context_parallel": 2}, case):
        compare(rank, expected, tolerance=1e-2)  # bf16 keeps 8 bits of each activation


def test_documents_and_windows_in_a_pipeline(world: Any) -> None:
    """Stages have layers of other masks, and lay tokens out alike, as the mask of the first block has it."""
    case = CASES["windows and full attention"]
    strategy = {
        "context_parallel": 2,
        "pipeline_parallel": PipelineParallel(size=2, microbatches=2),
        "verify_first_step": False,
    }
    expected = {**train(None, Module, case.model, case.data, samples=samples_of), "losses": []}
    for rank in world(4).run(train_with, strategy, case):
        compare({**rank, "losses": []}, expected)


def test_calls_with_other_documents_are_recomputed_in_their_own_layout(world: Any) -> None:
    case = Case({"name": "llama", "recompute": True, "calls": 4}, {"kind": "packed"})
    expected = train(None, Module, case.model, case.data, samples=samples_of)
    for rank in world(2).run(train_with, {"context_parallel": 2, "verify_first_step": False}, case):
        compare(rank, expected)


def train_with(strategy: dict[str, Any], case: Case) -> Any:
    return train(strategy, Module, case.model, case.data, samples=samples_of, **case.trainer)


@pytest.mark.parametrize("boundary", ["loss", "batch"])
def test_sequences_that_have_fewer_tokens_than_there_are_ranks(world: Any, boundary: Any) -> None:
    """Models of transformers cannot compute without tokens: each rank computes all."""
    case = Case({"name": "llama", "recompute": True}, {"kind": "plain", "tokens": 3})
    expected = train(None, Module, case.model, case.data, samples=samples_of)
    for rank in world(4).run(train_with, {"context_parallel": ContextParallel(size=4, boundary=boundary)}, case):
        compare(rank, expected)
