"""Models of transformers with experts, unchanged: the numbers of one process."""

from typing import Any

import pytest

from tests.helpers.experts import MODELS
from tests.trainer.expert.fits import compare, fit


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_one_process(world: Any, name: str) -> None:
    expected = fit(None, name)
    ranks = world(2).run(fit, {"expert_parallel": 2}, name)
    compare(ranks, expected)
