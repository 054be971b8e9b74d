"""Which parts of the model each stage holds. What another rank holds takes no memory here, and keeps its place and name.

What is registered before the blocks (embeddings) belongs to the first stage, what is registered after them (last norm, head) to
the last one. Parameters of a module that has the blocks in it belong to both, since its code before and after them may use these,
and its buffers to the last one: code after the blocks may write these. A parameter that several stages use belongs to all of them: a
tied embedding, a block that occurs twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import Blocks
from lightning_overlap.modes.pipeline.weight_grad import is_plain
from lightning_overlap.state.absent import is_absent, make_absent, make_present
from lightning_overlap.torch_seams import buffers_of, children_of, parameters_of


def heads(model: nn.Module, name: str, blocks: Blocks) -> list[nn.Linear]:
    """The linear layers that are registered after the blocks, with weights whose gradients can come later: the head."""
    modules = list(model.named_modules())
    behind = modules[[module for _, module in modules].index(blocks) + 1 :]
    return [module for path, module in behind if not path.startswith(f"{name}." if name else "") and is_plain(module)]


def work(module: nn.Module) -> int:
    """Elements of its matrices, which is about what it costs a token."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


@dataclass(frozen=True)
class Held:
    """A parameter that was given up: what it was."""

    parameter: nn.Parameter
    trained: bool


class Partition:
    """The parts of a model by rank of the pipeline.

    Args:
        model: the user's; whole.
        name: of its list of blocks.
        blocks: the list.
        stages: by stage, the numbers of its blocks.
        placement: by stage, its rank.
        held_by_all: modules and parameters that belong to all stages.

    Raises:
        ConfigError: there is nothing of such a name.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        blocks: Blocks,
        stages: Sequence[range],
        placement: Sequence[int],
        held_by_all: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        stage_of_block = {number: stage for stage, numbers in enumerate(stages) for number in numbers}
        users: dict[int, set[int]] = {}
        names: dict[int, str] = {}
        after: dict[int, None] = {}
        behind = False
        last = len(stages) - 1
        unknown = set(held_by_all)
        for path, module in model.named_modules(remove_duplicate=False):
            inside = path.removeprefix(name + ".") if name and path.startswith(name + ".") else path if not name and path else ""
            behind = behind or module is blocks
            is_around = not inside and f"{name}.".startswith(f"{path}." if path else "")
            for key, tensor in [*parameters_of(module).items(), *buffers_of(module).items()]:
                if tensor is None:
                    continue
                full = f"{path}.{key}".lstrip(".")
                asked = {asked for asked in held_by_all if f"{full}.".startswith(f"{asked}.")}
                unknown -= asked
                if asked:
                    numbers = set(range(len(stages)))
                elif inside:
                    numbers = {stage_of_block[list(children_of(blocks)).index(inside.split(".")[0])]}
                elif is_around and key in parameters_of(module):
                    numbers = {0, last}
                else:
                    numbers = {last if behind or is_around else 0}
                users.setdefault(id(tensor), set()).update(numbers)
                names.setdefault(id(tensor), full)
                # A rank that has the first stage too uses what is there after the blocks unseen.
                if not inside and (last in numbers or placement[0] == placement[-1]):
                    after.setdefault(id(tensor))
        if unknown:
            said = ", ".join(sorted(unknown))
            raise ConfigError(f"pipeline_parallel.held_by_all names {said}, and the module has nothing of that name")
        self.users = {names[tensor]: tuple(sorted(numbers)) for tensor, numbers in users.items()}
        """By parameter and buffer, the stages that use it."""
        self.owners = {name: tuple(sorted({placement[stage] for stage in numbers})) for name, numbers in self.users.items()}
        """By parameter and buffer, the ranks of these."""
        self.tail = [names[tensor] for tensor in after]
        """Parameters and buffers of what comes after the blocks, as far as they are not a block's."""
        self.foreign: dict[str, Held] = {}
        self.is_whole = not any(map(is_absent, self._parameters.values()))
        """Whether this rank had all of the model at first."""
        everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.first_names = {name: names[id(tensor)] for name, tensor in everything}
        """Of every name of a parameter or buffer, the one it goes by here: it may have several."""

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks of a parameter or buffer, by any of its names."""
        return self.owners[self.first_names[name]]

    def before(self, model: nn.Module) -> list[nn.Module]:
        """Modules with buffers before the blocks."""
        first = {name for name, stages in self.users.items() if stages == (0,) and self.is_buffer(name)}
        outside = [name for name in first if self._name and not name.startswith(f"{self._name}.")]
        return [model.get_submodule(path) for path in sorted({name.rpartition(".")[0] for name in outside})]

    def keep(self, rank: int, names: Iterable[str] | None = None) -> None:
        """Gives up the parameters that are not this rank's, or those of them that are named.

        They become not-a-number, at the expense of one element each: embeddings can still be called for their shape, and a
        number that should not have been used shows.
        """
        for name in self._parameters if names is None else names:
            parameter = self._parameters[name]
            if rank not in self.owners[name]:
                self.foreign[name] = Held(parameter, parameter.requires_grad)
                parameter.requires_grad_(False)
                parameter.grad = None
                make_absent(parameter)

    def owned(self, rank: int) -> list[str]:
        """What a rank gives the others: its parameters and buffers, but those that a lower rank has too."""
        return [name for name, ranks in self.owners.items() if ranks[0] == rank]

    def shared(self) -> dict[tuple[int, ...], list[str]]:
        """Parameters that several ranks use, by the ranks."""
        found: dict[tuple[int, ...], list[str]] = {}
        for name, ranks in self.owners.items():
            if len(ranks) > 1 and name in self._parameters:
                found.setdefault(ranks, []).append(name)
        return found

    def repeated(self, stages: Sequence[int]) -> list[str]:
        """Parameters that several of these stages use."""
        return [name for name in self._parameters if len(set(stages).intersection(self.users[name])) > 1]

    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    def is_buffer(self, name: str) -> bool:
        return name not in self._parameters

    def take_back(self, names: Iterable[str] | None = None, *, room: bool = True) -> list[str]:
        """Takes back what was given up, all of it by default. Until it is filled in, it is not a number.

        Args:
            names: of parameters.
            room: gives it memory.
        """
        taken = list(self.foreign) if names is None else [name for name in names if name in self.foreign]
        for name in taken:
            held = self.foreign.pop(name)
            make_present(held.parameter, allocate=room)
            held.parameter.requires_grad_(held.trained)
        return taken
