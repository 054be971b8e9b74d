"""Finds the stack of blocks: the list of alike layers that has most of the model's weights."""

from __future__ import annotations

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
