"""Divides the blocks into stages. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from lightning_overlap.decision import ConfigError

Layout = tuple[range, ...]
"""By stage, the numbers of its blocks. Modules before the blocks are on the first stage, modules after them on the last."""


def balanced(costs: Sequence[int], stages: int, *, first: int = 0, last: int = 0) -> Layout:
    """Stages of consecutive blocks whose most expensive stage is as cheap as possible. Early stages get as many blocks as that allows.

    Args:
        costs: by block, its cost.
        stages: the number of stages; each gets at least one block.
        first: the cost of the first stage's other modules.
        last: the cost of the last stage's other modules.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    if stages > len(costs):
        raise ConfigError(f"{len(costs)} blocks cannot make {stages} stages (size x virtual_stages): use at most {len(costs)}")
    sums = [0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> int:
        return sums[end] - sums[start] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # best[k - 1][n]: the cost of the most expensive of the last k stages, at its lowest, if they hold the blocks from n on.
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
    """Stages with the given numbers of blocks.

    Raises:
        ConfigError: there is not one number for each stage, or they do not sum to the number of blocks.
    """
    if len(counts) != stages or sum(counts) != blocks or min(counts) < 0:
        raise ConfigError(
            f"layers_per_stage={list(counts)} has {len(counts)} stages and {sum(counts)} blocks, but there are {stages} stages "
            f"(size x virtual_stages) and {blocks} blocks"
        )
    return tuple(range(a, b) for a, b in pairwise([0, *accumulate(counts)]))


def expand(text: str) -> str:
    """Writes out a layout's repetitions and groups: ``xy(ab|cd)*2,e`` becomes ``xyab|cdab|cde``. Commas and spaces are ignored.

    Raises:
        ConfigError: a bracket or a number is misplaced.
    """
    plain = re.sub(r"[,\s]", "", text)
    repeated = re.compile(r"(?:\(([^()]*)\)|([^()*]))\*(\d+)|\(([^()]*)\)")
    while (match := repeated.search(plain)) is not None:
        inner, letter, times, once = match.groups()
        part = (inner if inner is not None else letter or "") * int(times) if times else once
        plain = plain[: match.start()] + part + plain[match.end() :]
    if (odd := re.search(r"[()*\d]", plain)) is not None:
        raise ConfigError(f"layout {text!r}: {odd[0]!r} is out of place; a repetition is x*3 or (xy|)*3")
    return plain


def parse(text: str, blocks: int, stages: int) -> Layout:
    """Stages from a layout: E is the embedding, t a block, L head and loss, | separates stages.

    The notation is Megatron-LM's (``pipeline_model_parallel_layout``).

    Raises:
        ConfigError: the layout is malformed, or does not fit the number of blocks or stages.
    """
    plain = expand(text)
    parts = plain.split("|")
    letters = plain.replace("|", "")
    if "m" in letters:
        raise ConfigError(f"layout {text!r}: m, multi-token prediction, is not supported in this version")
    if not re.fullmatch(r"Et*L", letters):
        raise ConfigError(f"layout {text!r} reads {plain!r}: it must have one E, then blocks (t), then one L, with | between stages")
    if not parts[0].startswith("E") or not parts[-1].endswith("L"):
        raise ConfigError(f"layout {text!r}: E belongs to the first stage and L to the last, but it reads {plain!r}")
    if len(parts) != stages:
        raise ConfigError(f"layout {text!r} has {len(parts)} stages, but there are {stages} (size x virtual_stages)")
    if letters.count("t") != blocks:
        raise ConfigError(f"layout {text!r} has {letters.count('t')} blocks, but the model has {blocks}")
    return tuple(range(a, b) for a, b in pairwise([0, *accumulate(part.count("t") for part in parts)]))
