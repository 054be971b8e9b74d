"""Which blocks each stage holds. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from lightning_overlap.decision import ConfigError

Layout = tuple[range, ...]
"""By stage, the numbers of its blocks. What is before the blocks is on the first stage, what is after them on the last."""


def balanced(costs: Sequence[int], stages: int, *, first: int = 0, last: int = 0) -> Layout:
    """Stages of consecutive blocks, the most expensive one as cheap as it can be; of several such, early stages are the fuller ones.

    Args:
        costs: of each block.
        stages: how many; each gets one block at least.
        first: what the first stage costs besides.
        last: what the last stage costs besides.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    if stages > len(costs):
        raise ConfigError(f"{len(costs)} blocks cannot be cut into {stages} stages: at most {len(costs)} (size x virtual_stages)")
    sums = [0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> int:
        return sums[end] - sums[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # best[k][n]: the cheapest worst stage among the last k stages, if they hold the blocks from n on.
    best = [[cost(stages - 1, n, len(costs)) if n < len(costs) else None for n in range(len(costs) + 1)]]
    for k in range(2, stages + 1):
        best.append([None] * (len(costs) + 1))
        for n in range(len(costs) - k + 1):
            cuts = (max(cost(stages - k, n, m), rest) for m in range(n + 1, len(costs)) if (rest := best[k - 2][m]) is not None)
            best[k - 1][n] = min(cuts)
    worst, bounds = best[-1][0], [0]
    for stage in range(stages - 1):
        left = best[stages - stage - 2]
        fits = [
            m
            for m in range(bounds[-1] + 1, len(costs))
            if (rest := left[m]) is not None and rest <= worst and cost(stage, bounds[-1], m) <= worst  # type: ignore[operator]
        ]
        bounds.append(max(fits))
    return tuple(range(a, b) for a, b in pairwise([*bounds, len(costs)]))


def counted(counts: Sequence[int], blocks: int, stages: int) -> Layout:
    """Stages of so many blocks each.

    Raises:
        ConfigError: the numbers do not add up.
    """
    if len(counts) != stages or sum(counts) != blocks or min(counts) < 0:
        raise ConfigError(
            f"layers_per_stage={list(counts)} has {len(counts)} stages and {sum(counts)} blocks, and there are {stages} stages "
            f"(size x virtual_stages) and {blocks} blocks"
        )
    return tuple(range(a, b) for a, b in pairwise([0, *accumulate(counts)]))


def expand(text: str) -> str:
    """A layout without repetitions and groups: ``xy(ab|cd)*2,e`` is ``xyab|cdab|cde``. Commas and blanks are for the reader.

    Raises:
        ConfigError: a bracket or a number is missing.
    """
    plain = re.sub(r"[,\s]", "", text)
    repeated = re.compile(r"(?:\(([^()]*)\)|([^()*]))\*(\d+)|\(([^()]*)\)")
    while (found := repeated.search(plain)) is not None:
        inner, letter, times, once = found.groups()
        part = (inner if inner is not None else letter or "") * int(times) if times else once
        plain = plain[: found.start()] + part + plain[found.end() :]
    if (odd := re.search(r"[()*\d]", plain)) is not None:
        raise ConfigError(f"layout {text!r}: {odd[0]!r} is out of place; a repetition is x*3 or (xy|)*3")
    return plain


def parse(text: str, blocks: int, stages: int) -> Layout:
    """Stages from a layout: E the embedding, t a block, L head and loss, | between two stages.

    The notation is the reference's (``pipeline_model_parallel_layout``).

    Raises:
        ConfigError: what does not fit, and how.
    """
    plain = expand(text)
    parts = plain.split("|")
    letters = plain.replace("|", "")
    if "m" in letters:
        raise ConfigError(f"layout {text!r}: m, multi-token prediction, is not in this version")
    if not re.fullmatch(r"Et*L", letters):
        raise ConfigError(f"layout {text!r} reads {plain!r}: it is to have one E, then blocks (t), then one L, with | between stages")
    if not parts[0].startswith("E") or not parts[-1].endswith("L"):
        raise ConfigError(f"layout {text!r}: E belongs to the first stage and L to the last, and it reads {plain!r}")
    if len(parts) != stages:
        raise ConfigError(f"layout {text!r} has {len(parts)} stages, and there are {stages} (size x virtual_stages)")
    if letters.count("t") != blocks:
        raise ConfigError(f"layout {text!r} has {letters.count('t')} blocks, and the model has {blocks}")
    return tuple(range(a, b) for a, b in pairwise([0, *accumulate(part.count("t") for part in parts)]))
