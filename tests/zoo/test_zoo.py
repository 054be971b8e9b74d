"""Models of the zoo give, under each layout of two ranks, what the table says: the numbers of one process, or a refusal."""

from __future__ import annotations

import pytest

from tests.zoo.case import LAYOUTS
from tests.zoo.keeper import Keeper, cases, expectation
from tests.zoo.models import MODELS
from tests.zoo.sample import SAMPLE
from tests.zoo.table import TABLE
from tests.zoo.verdict import unexpected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--zoo", "sample") == "whole"
        chosen = list(cases()) if whole else SAMPLE
        metafunc.parametrize(("name", "data", "layout"), chosen, ids=[", ".join(case) for case in chosen])


def test_as_the_table_says(keeper: Keeper, name: str, data: str, layout: str) -> None:
    expected = expectation(name, data, layout)
    verdict = keeper.run(name, data, layout)
    if surprise := unexpected(verdict, expected):
        pytest.fail(f"{name}, {data}, {layout}: {surprise}", pytrace=False)


def test_the_sample_and_the_table_name_models_of_the_zoo() -> None:
    assert set(SAMPLE) <= set(cases())
    assert set(TABLE) <= set(MODELS)
    assert {layout for *_, layout in SAMPLE} == set(LAYOUTS)
