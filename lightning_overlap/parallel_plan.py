"""Roles of a model's parts: how they are cut over the tensor axis."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_overlap.decision import ConfigError


@dataclass(frozen=True)
class Cut:
    """A module whose weight is cut."""

    name: str
    module: nn.Module
    role: str
    parts: tuple[int, ...]
    dim: int


@dataclass(frozen=True)
class Region:
    """Column linears and the row linear that they lead to."""

    name: str
    module: nn.Module
    columns: tuple[Cut, ...]
    rows: tuple[Cut, ...]
    heads: dict[str, int]


@dataclass(frozen=True)
class TensorPlan:
    """What is cut."""

    cuts: tuple[Cut, ...]
    regions: tuple[Region, ...]
    source: str
    blocks: str
    loose: tuple[str, ...]


def find(model: nn.Module, given: Mapping[str, str], size: int) -> TensorPlan:
    plan = dict(given) or dict(getattr(model, "parallel_plan", {}))
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    blocks = max(lists, key=lambda n: len(lists[n]))
    cuts = []
    for pattern, role in plan.items():
        expression = re.compile("(.*\\.)?" + re.escape(pattern).replace("\\*", "[^.]+") + "$")
        names = [n for n, _ in model.named_modules() if expression.match(n)]
        if not names:
            raise ConfigError(f"parallel_plan: {pattern} matches nothing")
        for name in names:
            module = model.get_submodule(name)
            kind, _, rest = role.partition("[")
            dim = 1 if kind == "row" else 0
            if not isinstance(module, nn.Linear | nn.Embedding):
                dim = 1 - dim
            n = module.weight.shape[dim]
            count = int(rest.rstrip("]")) if rest else 1
            cuts.append(Cut(name, module, kind, (n // count,) * count, dim))
    regions: dict[str, list[Cut]] = {}
    for cut in cuts:
        if cut.role in ("column", "row"):
            regions.setdefault(cut.name.rpartition(".")[0], []).append(cut)
    found = tuple(
        Region(
            name,
            model.get_submodule(name),
            tuple(c for c in members if c.role == "column"),
            tuple(c for c in members if c.role == "row"),
            {},
        )
        for name, members in regions.items()
    )
    return TensorPlan(tuple(cuts), found, "parallel_plan", blocks, ())
