"""``--zoo whole`` runs every model under every layout, in place of a sample of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.zoo.keeper import Keeper


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known where this folder is named: pytest tests/zoo --zoo whole.
    parser.addoption("--zoo", choices=["sample", "whole"], default="sample", help="models and layouts of the zoo that are trained")


@pytest.fixture(scope="session")
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()
