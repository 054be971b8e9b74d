"""Finds the stack of blocks: the list of alike layers that has most of the model's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from lightning_overlap.decision import ConfigError

Blocks = nn.ModuleList | nn.Sequential


def find_blocks(model: nn.Module, asked: str | None, stages: int) -> tuple[str, Blocks]:
    """Finds the list of blocks and its name.

    Args:
        model: the user's model.
        asked: the name that the user gave; None: the longest list of modules of one type.
        stages: the least length of such a list.

    Raises:
        ConfigError: no list has this name, no list is long enough, or two lists are equally long.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 0}
    if asked is not None:
        if asked not in lists:
            known = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
            raise ConfigError(f"the model has no list of blocks {asked!r}; its ModuleLists and Sequentials are: {known}")
        return asked, lists[asked]
    alike = {name: m for name, m in lists.items() if len(m) >= max(2, stages) and len({type(b) for b in m}) == 1}
    most = max((len(m) for m in alike.values()), default=0)
    longest = [name for name, m in alike.items() if len(m) == most]
    if len(longest) != 1:
        cause = (
            f"{' and '.join(longest)} are equally long"
            if longest
            else f"the model has no list of at least {max(2, stages)} modules of one type"
        )
        raise ConfigError(
            f"the stack of blocks was not found: {cause}. Name it, for example "
            "OverlapStrategy(parallel_plan={'model.layers': 'blocks'})"
        )
    return longest[0], alike[longest[0]]


def blocks_by_role(model: nn.Module, given: Mapping[str, str], stages: int) -> tuple[str, Blocks]:
    """Finds the list with the role ``blocks``, and its name; without such a role, as :func:`find_blocks` does.

    Args:
        model: the user's.
        given: the strategy's ``parallel_plan``. If it names no blocks, the module's attribute of that name may.
        stages: the least length of a list that has no role.

    Raises:
        ConfigError: no list has the role that was given, several have it, or none was found.
    """
    plans = [[pattern for pattern, role in plan.items() if role == "blocks"] for plan in (given, roles_of(model, {}))]
    patterns = next(filter(None, plans), [])
    names = list(dict.fromkeys(name for pattern in patterns for name in names_matching(model, pattern)))
    if len(names) > 1:
        raise ConfigError(
            f"{' and '.join(names)} have the role blocks in parallel_plan, and one list of blocks is sharded: give the role to one of "
            "them, by its full name"
        )
    return find_blocks(model, [*names, *patterns][0] if patterns else None, stages)


def names_matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of modules that end in a pattern of a ``parallel_plan``, in which ``*`` stands for one part of a name. A name that is the
    pattern itself is the only one."""
    return _matching([name for name, _ in model.named_modules()], pattern)


def parameters_matching(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Parameters by name, of those whose names end in a pattern of a ``parallel_plan``, as in :func:`names_matching`."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in _matching(list(parameters), pattern)}


def _matching(names: list[str], pattern: str) -> list[str]:
    if pattern in names:
        return [pattern]
    expression = re.compile(r"(?:.*\.)?" + re.escape(pattern).replace(r"\*", "[^.]+"))
    return [name for name in names if expression.fullmatch(name)]


def names_by_role(model: nn.Module, given: Mapping[str, str], role: str) -> list[str]:
    """Names of the modules that have a role, by the strategy's ``parallel_plan`` and the model's attribute of that name.

    Args:
        model: the user's.
        given: the strategy's.
        role: one of :data:`~lightning_overlap.model.roles.ROLES`.
    """
    return [name for pattern, each in roles_of(model, given).items() if each == role for name in names_matching(model, pattern)]


def roles_of(model: nn.Module, given: Mapping[str, str]) -> Mapping[str, str]:
    """Roles by pattern: the strategy's, and those of the model's attribute ``parallel_plan``. Where both name one, the strategy's."""
    plan = getattr(model, "parallel_plan", None)
    return {**plan, **given} if isinstance(plan, Mapping) else given


def is_from_transformers(block: nn.Module) -> bool:
    """Whether a block, or a module in it, is of the library transformers, or of code that it has loaded (transformers_modules)."""
    return any(type(module).__module__.startswith("transformers") for module in block.modules())
