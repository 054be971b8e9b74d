"""Divides a model's parameters and buffers among the stages. A parameter of another stage keeps its name and shape, but no memory.

Modules that are registered before the blocks (embeddings) belong to the first stage, modules after them (last norm, head) to the last
one. Parameters of a module that contains the blocks belong to both, because its code before and after the blocks may read them; its
buffers belong to the last one, because code after the blocks may write them. A parameter that several stages use belongs to all of
them: a tied embedding, a block that occurs twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import Blocks
from lightning_overlap.modes.pipeline.weight_grad import is_plain
from lightning_overlap.state.absent import is_absent, make_absent, make_present
from lightning_overlap.torch_seams import buffers_of, children_of, parameters_of


def heads(model: nn.Module, name: str, blocks: Blocks) -> list[nn.Linear]:
    """The trained linear layers after the blocks (the head), whose weights' gradients can be deferred."""
    modules = list(model.named_modules())
    after = modules[[module for _, module in modules].index(blocks) + 1 :]
    return [module for path, module in after if not path.startswith(f"{name}." if name else "") and is_plain(module)]


def work(module: nn.Module) -> int:
    """The number of elements of a module's matrices: the estimated cost of a token."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


class _UserSearch:
    """Finds the stages that use each parameter and buffer, by the place where it is registered.

    Args:
        name: of the list of blocks.
        blocks: the list.
        stages: by stage, the numbers of its blocks.
        held_by_all: names of modules and parameters that all stages hold.

    Attributes:
        users: by id of a tensor, the stages that use it.
        names: by id of a tensor, the first name that it is registered under.
        outside: by id of a tensor that is registered outside of the blocks, the stages that use it there.
        unknown: the names of ``held_by_all`` that the model does not have.
    """

    def __init__(self, name: str, blocks: Blocks, stages: Sequence[range], held_by_all: Sequence[str]) -> None:
        self.users: dict[int, set[int]] = {}
        self.names: dict[int, str] = {}
        self.outside: dict[int, set[int]] = {}
        self.unknown = set(held_by_all)
        self._name, self._blocks, self._held_by_all = name, blocks, held_by_all
        self._stage_of_block = {number: stage for stage, numbers in enumerate(stages) for number in numbers}
        self._last = len(stages) - 1
        self._is_after = False
        """Whether the blocks have been visited."""

    def run(self, model: nn.Module) -> None:
        """Visits all modules of a model, in the order of their registration."""
        for path, module in model.named_modules(remove_duplicate=False):
            self._is_after = self._is_after or module is self._blocks
            for key, tensor in [*parameters_of(module).items(), *buffers_of(module).items()]:
                if tensor is not None:
                    self._visit(path, key, tensor, is_parameter=key in parameters_of(module))

    def _visit(self, path: str, key: str, tensor: torch.Tensor, *, is_parameter: bool) -> None:
        name = f"{path}.{key}".lstrip(".")
        requests = {request for request in self._held_by_all if f"{name}.".startswith(f"{request}.")}
        self.unknown -= requests
        path_in_blocks = self._path_in_blocks(path)
        contains_blocks = not path_in_blocks and f"{self._name}.".startswith(f"{path}." if path else "")
        if requests:
            users = set(range(self._last + 1))
        elif path_in_blocks:
            users = {self._stage_of_block[list(children_of(self._blocks)).index(path_in_blocks.split(".")[0])]}
        elif contains_blocks and is_parameter:
            users = {0, self._last}
        else:
            users = {self._last if self._is_after or contains_blocks else 0}
        self.users.setdefault(id(tensor), set()).update(users)
        self.names.setdefault(id(tensor), name)
        if not path_in_blocks:
            self.outside.setdefault(id(tensor), set()).update(users)

    def _path_in_blocks(self, path: str) -> str:
        """A module's path inside the list of blocks; empty outside of it. The list may be the model itself, whose name is empty."""
        if not self._name:
            return path
        return path.removeprefix(f"{self._name}.") if path.startswith(f"{self._name}.") else ""


class Partition:
    """Which ranks of a pipeline hold which parameters and buffers of a model, and this rank's absent ones.

    Args:
        model: the user's, unsharded.
        name: of its list of blocks.
        blocks: the list.
        stages: by stage, the numbers of its blocks.
        placement: by stage, its rank.
        held_by_all: names of modules and parameters that all stages hold.

    Attributes:
        stages: by stage, the numbers of its blocks.
        placement: by stage, its rank.
        users: by parameter and buffer, the stages that use it.
        after_blocks: parameters and buffers outside of the blocks that the code after the blocks may read on the last rank.
        absent: by parameter that this rank does not hold, whether it is trained.
        is_complete: whether this rank had memory for the complete model at first.

    Raises:
        ConfigError: a name of ``held_by_all`` does not exist.
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
        self.stages, self.placement = stages, placement
        self._name = name
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        search = _UserSearch(name, blocks, stages, held_by_all)
        search.run(model)
        if search.unknown:
            unknown = ", ".join(sorted(search.unknown))
            raise ConfigError(f"pipeline_parallel.held_by_all names {unknown}, but the module has no module or parameter of that name")
        last = len(stages) - 1
        # If the last rank has the first stage too, code after the blocks may read that stage's modules without an error.
        after_blocks = [number for number, users in search.outside.items() if last in users or placement[0] == placement[-1]]
        self.users = {search.names[number]: tuple(sorted(users)) for number, users in search.users.items()}
        self.after_blocks = [search.names[number] for number in after_blocks]
        self.absent: dict[str, bool] = {}
        self.is_complete = not any(map(is_absent, self._parameters.values()))
        self._holders = {name: tuple(sorted({placement[stage] for stage in users})) for name, users in self.users.items()}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._first_names = {name: search.names[id(tensor)] for name, tensor in tensors}
        """By each name of a parameter or buffer, its first name."""

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that hold a parameter or buffer, by any of its names."""
        return self._holders[self.first_name(name)]

    def first_name(self, name: str) -> str:
        """The name that this class uses for a parameter or buffer that may have several; ``name`` itself if it is neither."""
        return self._first_names.get(name, name)

    def modules_before(self, model: nn.Module) -> list[nn.Module]:
        """The modules before the blocks that have buffers."""
        first = {name for name, stages in self.users.items() if stages == (0,) and self.is_buffer(name)}
        outside = [name for name in first if self._name and not name.startswith(f"{self._name}.")]
        return [model.get_submodule(path) for path in sorted({name.rpartition(".")[0] for name in outside})]

    def drop(self, rank: int, names: Iterable[str] | None = None) -> None:
        """Makes the parameters absent that this rank does not hold. See :mod:`lightning_overlap.state.absent`.

        Args:
            rank: this rank.
            names: of the parameters that may be dropped; None: all.
        """
        for name in self._parameters if names is None else names:
            parameter = self._parameters[name]
            if rank not in self._holders[name]:
                self.absent[name] = parameter.requires_grad
                parameter.requires_grad_(False)
                parameter.grad = None
                make_absent(parameter)

    def restore(self, names: Iterable[str] | None = None, *, allocate: bool = True) -> list[str]:
        """Makes absent parameters present. Their values are NaN until the caller fills them.

        Args:
            names: of parameters; None: all.
            allocate: give them memory.

        Returns:
            The names of the parameters that were absent.
        """
        restored = list(self.absent) if names is None else [name for name in names if name in self.absent]
        for name in restored:
            make_present(self._parameters[name], allocate=allocate)
            self._parameters[name].requires_grad_(self.absent.pop(name))
        return restored

    def absent_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank does not hold, by name."""
        return {name: self._parameters[name] for name in self.absent}

    def sent_by(self, rank: int) -> list[str]:
        """The parameters and buffers that a rank sends to the others: those that no lower rank holds."""
        return [name for name, holders in self._holders.items() if holders[0] == rank]

    def tied(self) -> dict[tuple[int, ...], list[str]]:
        """By a set of several ranks, the parameters that exactly these ranks hold."""
        tied: dict[tuple[int, ...], list[str]] = {}
        for name, holders in self._holders.items():
            if len(holders) > 1 and name in self._parameters:
                tied.setdefault(holders, []).append(name)
        return tied

    def used_by_several(self, stages: Sequence[int]) -> list[str]:
        """The parameters that more than one of these stages uses."""
        return [name for name in self._parameters if len(set(stages).intersection(self.users[name])) > 1]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, absent ones too."""
        return list(self._parameters.values())

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a name."""
        return self._parameters[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer of a name."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    def is_buffer(self, name: str) -> bool:
        """Whether a name is a buffer's."""
        return name not in self._parameters
