"""Verdicts of runs, from what the ranks report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.zoo.case import STEPS
from tests.zoo.models import MODELS
from tests.zoo.training import Report, Result, differing
from tests.zoo.verdict import EQUAL, OTHER_OBJECTIVE, WHOLE, as_microbatches, expected_of, judge, refused, unexpected

GPT = MODELS["gpt"]
LOSSES = [4.0, 3.0, 2.0, 1.0, 1.5]
FINE = Report(steps=STEPS, losses=LOSSES, expected={WHOLE: LOSSES}, wrong={WHOLE: []}, digest="a")
REFUSED = Report(error="It cannot be cut.")


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (FINE, FINE, "equal"),
        (replace(FINE, losses=[*LOSSES[:4], 1.6]), replace(FINE, losses=[*LOSSES[:4], 1.6]), "differs"),
        (FINE, replace(FINE, wrong={WHOLE: [("head.weight", 0.1)]}), "differs"),
        (FINE, replace(FINE, digest="b"), "differs"),
        (FINE, replace(FINE, losses=[*LOSSES[:4], math.nan]), "differs"),
        (REFUSED, REFUSED, "refused"),
        (REFUSED, FINE, "crash"),
        (REFUSED, replace(REFUSED, error="In other words."), "crash"),
        (replace(REFUSED, steps=2), replace(REFUSED, steps=2), "crash"),
        (replace(FINE, crash="KeyError: 3"), REFUSED, "crash"),
    ],
)
def test_of_what_ranks_report(first: Report, second: Report, word: str) -> None:
    assert judge(GPT, "pp", [first, second]).word == word


def test_losses_of_data_parallel_ranks_are_of_their_samples() -> None:
    first, second = (replace(FINE, losses=[x + more for x in LOSSES[:4]] + LOSSES[4:]) for more in (0.5, -0.5))
    assert judge(GPT, "dp", [first, second]).word == "equal"
    assert judge(GPT, "tp", [first, second]).word == "differs"


def test_another_reference() -> None:
    kind = "microbatches in one process"
    report = replace(
        FINE, expected={WHOLE: [5.0] * 5, kind: LOSSES}, wrong={WHOLE: [], kind: []}, words="The loss is not a mean over samples"
    )
    verdict = judge(GPT, "pp", [report, report])
    assert verdict.word == kind
    assert unexpected(verdict, as_microbatches("a sum", "not a mean over samples")) is None
    assert "not said" in str(unexpected(verdict, as_microbatches("a sum", "another sentence")))


def test_what_is_not_expected() -> None:
    verdict = judge(GPT, "pp", [REFUSED, REFUSED])
    assert unexpected(verdict, refused("cannot be cut")) is None
    assert "not by the words" in str(unexpected(verdict, refused("has no plan")))
    assert "expected equal" in str(unexpected(verdict, EQUAL))


def test_the_most_particular_entry_of_a_row_counts() -> None:
    one, two, three = refused("one"), refused("two"), refused("three")
    row = {"pp*": one, "pp_zb_v": two, "pp* padded": three}
    found = [
        expected_of(row, layout, data) for layout, data in (("pp", "plain"), ("pp_zb_v", "plain"), ("pp", "padded"), ("tp", "plain"))
    ]
    assert found == [one, two, three, EQUAL]


def test_weights_are_compared_with_their_own_update() -> None:
    before, after = torch.ones(4), torch.ones(4) + 1e-3
    reference = Result([], 0.0, {"w": after, "n": torch.tensor(3)}, {"w": before, "n": torch.tensor(0)})
    near, far = after + 1e-7, after + 1e-4  # of an update of 1e-3
    assert differing(replace(reference, state={"w": near, "n": torch.tensor(3)}), reference) == []
    assert [name for name, _ in differing(replace(reference, state={"w": far, "n": torch.tensor(4)}), reference)] == ["n", "w"]
    assert differing(replace(reference, state={"w": near * math.nan, "n": torch.tensor(3)}), reference)
    assert differing(replace(reference, state={"w": near}), reference)


def test_numbers_of_its_own_are_told() -> None:
    report = replace(FINE, losses=[*LOSSES[:4], 1.6], words=f"the loss is 3 in microbatches: {OTHER_OBJECTIVE}")
    assert judge(GPT, "pp", [report, report]).word == "told"
