"""Combinations of parameters that are independent of each other."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Case, A, B = TypeVar("Case"), TypeVar("A"), TypeVar("B")


def pairwise(cases: Iterable[Case], first: Sequence[A], second: Sequence[B]) -> list[tuple[Case, A, B]]:
    """Of all cases with all values of two parameters: each case with each value, and each two values with each other.

    The parameters have two values each. A fault that shows only where three meet is not looked for.
    """
    return [(case, value, second[(number + index) % 2]) for number, case in enumerate(cases) for index, value in enumerate(first)]
