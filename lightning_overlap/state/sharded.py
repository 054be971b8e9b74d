"""Sharded checkpoints: each rank writes its part of the state into a common folder, and any number of ranks reads it.

The folder has the layout of Lightning's FSDP checkpoints. ``model.<name>`` and ``optimizer_<i>.state.<parameter>.<key>`` are tensors
in the format of torch.distributed.checkpoint, in the shapes of the unsharded model. The file ``meta.pt`` holds everything else;
optimizers refer to parameters by name there. No rank writes or holds more than its share.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import all_gather_objects, make_group, rank, world_size
from lightning_overlap.state.checkpoint import CheckpointError, is_local, load_trusting, refuse_broken, what_is_broken
from lightning_overlap.state.dcp import INDEX, META, FolderReader, FolderWriter, ShardLoadPlanner, ShardSavePlanner
from lightning_overlap.state.parts import Parts
from lightning_overlap.state.shards import Place, Run

T = TypeVar("T")
R = TypeVar("R")
State = dict[str, dict[str, Any]]
"""An optimizer's state, or a rank's part of it, by parameter and key."""


def is_folder(path: Path) -> bool:
    """Whether a path is a sharded checkpoint; False if it is a file or does not exist.

    Raises:
        CheckpointError: it is a folder without an index or without ``meta.pt``.
    """
    if not path.is_dir():
        return False
    missing = [name for name in (INDEX, META) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {' and no '.join(missing)}")
    return True


# -- states by parameter name ------------------------------------------------------------------------------------------


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Maps the ids of parameters to their names."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def local_state(optimizer: Optimizer, shards: State | None, names: Mapping[int, str], parts: Parts) -> dict[str, Any]:
    """Returns the state that this rank writes, and the parameter groups with names in the place of parameters.

    Args:
        optimizer: the user's optimizer.
        shards: this rank's part of the state, if a mode shards it. None: each rank has the state of all parameters that it holds, and
            the ranks divide the writing.
        names: of the parameters, by id.
        parts: which parameters each rank holds.
    """
    groups = [
        {**group, "params": _names(group["params"], names, group_number)} for group_number, group in enumerate(optimizer.param_groups)
    ]
    if shards is None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {name: (p, optimizer.state.get(p)) for name, p in zip(_all_names(groups), parameters, strict=True)}
        mine = parts.names_to_write({name: p for name, (p, _) in states.items()})
        shards = {name: dict(state) for name, (_, state) in states.items() if state and name in mine}
    else:
        shards = {name: state for name, state in shards.items() if parts.is_first(name)}
    placed = {name: {key: _placed(value, parts.place(name)) for key, value in state.items()} for name, state in shards.items()}
    return {"state": placed, "param_groups": groups}


def _placed(value: Any, place: Place | None) -> Any:
    """Adds to a sharded tensor where it lies in the unsharded one; other values are returned unchanged."""
    if place is not None and isinstance(value, Run):
        return value.at(place)
    if place is not None and isinstance(value, Tensor) and value.shape == place.piece:
        return Run(value.shape, 0, value.detach().view(-1), place)
    return value


def _local_shape(value: Any, place: Place | None) -> Any:
    """Returns this rank's part of a tensor on the meta device; other values are returned unchanged."""
    if place is None or not isinstance(value, Tensor) or value.shape != place.shape:
        return value
    return value.new_empty(place.piece)


def _names(parameters: Iterable[Tensor], names: Mapping[int, str], group: int) -> list[str]:
    # A parameter outside the module (one process may have such) is named by its position.
    return [names.get(id(p), f"group {group}, parameter {index}") for index, p in enumerate(parameters)]


def _all_names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]


# -- folders -----------------------------------------------------------------------------------------------------------


class ShardedCheckpoints:
    """Writes and reads sharded checkpoints.

    Args:
        timeout: how long a rank waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._connected: Group | None = None
        self._reader: FolderReader | None = None

    @property
    def _group(self) -> Group:
        """All ranks, over gloo; apart from training's groups, so that a background save cannot mix with them. Made collectively."""
        if self._connected is None:
            self._connected = make_group([range(world_size())], "checkpoint", self._timeout, "gloo", gathers=False, threads=False)
        return self._connected

    def close(self, *, complete: bool) -> None:
        """Closes the connections. No save may be running.

        Args:
            complete: False after a failure, when a transfer may be under way: the garbage collector then closes the connections.
        """
        if self._connected is not None and complete:
            self._connected.close()
        self._connected = None

    def save(self, checkpoint: dict[str, Any], path: Path, parts: Parts, *, copy: bool) -> Callable[[], None]:
        """Prepares a save. Collective.

        Args:
            checkpoint: Lightning's, with optimizer states from :func:`local_state`.
            path: the folder.
            parts: which weights each rank holds.
            copy: copy the tensors, so that training may go on while they are written.

        Returns:
            A function that writes the folder. Every rank must call it, on any thread if ``copy``.

        Raises:
            CheckpointError: the path is the address of a remote file system.
        """
        if not is_local(path):
            raise CheckpointError(f"cannot write a sharded checkpoint to {path}: it needs a file system that all ranks share")
        group = self._group  # before any operation that may fail on one rank only
        checkpoint = dict(checkpoint)
        model, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", None)
        mine = parts.names_to_write({name: value for name, value in model.items() if isinstance(value, Tensor)})
        shares: dict[str, Any] = {"model": {name: _placed(model[name], parts.place(name)) for name in mine}}
        checkpoint["state_dict"] = {name: value for name, value in model.items() if not isinstance(value, Tensor)}
        if optimizers is not None:
            checkpoint["optimizer_states"] = self._gather_values(optimizers)
            for number, optimizer in enumerate(optimizers):
                shares[f"optimizer_{number}"] = {
                    "state": {
                        name: {key: value for key, value in state.items() if isinstance(value, Tensor | Run)}
                        for name, state in optimizer["state"].items()
                    }
                }
        if copy:
            shares = _copied(shares)
        meta = io.BytesIO()
        if rank() == 0:
            torch.save(checkpoint, meta)
        writer = FolderWriter(path, meta.getvalue())
        return lambda: _write(shares, writer, group)

    @staticmethod
    def _gather_values(optimizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the parameter groups, and from all ranks the values in the states that are not tensors. Collective."""
        merged = [{"state": {}, "param_groups": optimizer["param_groups"]} for optimizer in optimizers]
        mine = [
            {
                name: values
                for name, state in optimizer["state"].items()
                if (values := {key: value for key, value in state.items() if not isinstance(value, Tensor | Run)})
            }
            for optimizer in optimizers
        ]
        for share in all_gather_objects(mine):
            for optimizer, state in zip(merged, share, strict=True):
                for name, values in state.items():
                    optimizer["state"].setdefault(name, {}).update(values)
        return merged

    def load(self, path: Path, module_state: Mapping[str, Any], *, weights_only: bool) -> dict[str, Any]:
        """Reads a checkpoint in Lightning's format. Collective.

        Weights are read into the module's tensors of the same shape. Weights that the module has on the meta device stay on disk, for
        :meth:`read`; optimizer states stay there too, as :class:`SavedOptimizer`.

        Args:
            path: the folder.
            module_state: the module's ``state_dict()``.
            weights_only: refuse objects whose loading may run code.

        Raises:
            CheckpointError: on every rank, if reading fails on one.
        """
        reader = FolderReader(path)
        refuse_broken(path / META, what_is_broken(path / META))
        checkpoint: dict[str, Any] = load_trusting(
            weights_only, path / META, lambda: torch.load(path / META, map_location="cpu", weights_only=weights_only)
        )
        model: dict[str, Tensor] = {}
        for fqn, entry in reader.tensors("model."):
            name = fqn.removeprefix("model.")
            target = module_state.get(name)
            fits = isinstance(target, Tensor) and target.shape == entry.shape
            model[name] = target.detach() if fits else torch.empty_like(entry, device="cpu")  # type: ignore[union-attr]
        self._reader = reader
        self.read({name: tensor for name, tensor in model.items() if not tensor.is_meta})
        checkpoint["state_dict"] = {**model, **checkpoint.get("state_dict", {})}
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [
                SavedOptimizer(reader, f"optimizer_{number}.state.", **values)
                for number, values in enumerate(checkpoint["optimizer_states"])
            ]
        return checkpoint

    def read(self, weights: Mapping[str, Tensor]) -> None:
        """Reads weights, in place, from the folder of the last :meth:`load`. Collective."""
        if self._reader is not None:
            self.read_into(self._reader, {f"model.{name}": tensor.detach() for name, tensor in weights.items()})

    def load_optimizer(
        self,
        saved: SavedOptimizer,
        optimizer: Optimizer,
        names: Mapping[int, str],
        parts: Parts,
        allocate: Callable[[State], State | None],
    ) -> None:
        """Loads a saved state into an optimizer. Collective.

        Args:
            saved: from :meth:`load`.
            optimizer: the user's optimizer.
            names: of the parameters, by id.
            parts: which parameters this rank holds.
            allocate: for a state on the meta device, allocates this rank's shards and returns them; None if no mode shards the state.

        Raises:
            CheckpointError: the optimizer has other parameters than the saved one; or, on every rank, reading fails on one.
        """
        groups = [_names(group["params"], names, number) for number, group in enumerate(optimizer.param_groups)]
        _refuse_other_parameters([group["params"] for group in saved.param_groups], groups, saved.reader.path)
        unsharded, fqns = saved.entries()
        state = {
            name: {key: _local_shape(value, parts.place(name)) for key, value in values.items()}
            for name, values in unsharded.items()
            if parts.holds(name)
        }
        shards = allocate(state)
        loaded = _allocated(state) if shards is None else shards
        targets = {
            fqns[name, key]: _placed(target, parts.place(name))
            for name, values in loaded.items()
            for key, target in values.items()
            if (name, key) in fqns
        }
        self.read_into(saved.reader, targets)
        if shards is None:
            # load_state_dict moves each value to the device and dtype that torch's kernels need.
            numbers = {name: number for number, name in enumerate(_all_names({"params": group} for group in groups))}
            by_number = {numbers[name]: values for name, values in loaded.items()}
            numbered_groups = [
                {**group, "params": [numbers[n] for n in params]} for group, params in zip(saved.param_groups, groups, strict=True)
            ]
            optimizer.load_state_dict({"state": by_number, "param_groups": numbered_groups})
        else:
            for group, values in zip(optimizer.param_groups, saved.param_groups, strict=True):
                group.update({key: value for key, value in values.items() if key not in ("params", "param_names")})

    @staticmethod
    def read_into(reader: FolderReader, targets: dict[str, Any]) -> None:
        """Reads this rank's tensors. Collective.

        Raises:
            CheckpointError: on every rank, if one rank failed.
        """
        error = None
        try:
            with warnings.catch_warnings():
                # It is about `no_dist`, which is right here: each rank reads what it needs, and none waits for another.
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
                load(targets, storage_reader=reader, planner=ShardLoadPlanner(), no_dist=True)
        except CheckpointException as exception:  # a BaseException of torch's
            ((error, _),) = exception.failures.values()
        failure = _first_failure(all_gather_objects(None if error is None else _in_words(error)))
        if failure is not None:
            raise CheckpointError(f"cannot read {reader.path}: {failure}") from error


@dataclass
class SavedOptimizer:
    """An optimizer's state on disk.

    Attributes:
        reader: of the folder.
        prefix: of the names of its tensors in the folder.
        state: values that are not tensors, by parameter and key.
        param_groups: with names in the place of parameters.
    """

    reader: FolderReader
    prefix: str
    state: State
    param_groups: list[dict[str, Any]]

    def entries(self) -> tuple[State, dict[tuple[str, str], str]]:
        """Returns the state with tensors on the meta device, and each tensor's name in the folder by parameter and key."""
        state = {name: dict(values) for name, values in self.state.items()}
        fqns = {}
        for fqn, entry in self.reader.tensors(self.prefix):
            name, key = self.reader.index.planner_data[fqn][-2:]
            state.setdefault(name, {})[key] = entry
            fqns[name, key] = fqn
        return state, fqns


def _allocated(state: State) -> State:
    """Returns a state with memory on the CPU, without values, for each tensor on the meta device."""
    return {
        name: {key: torch.empty_like(v, device="cpu") if isinstance(v, Tensor) else v for key, v in values.items()}
        for name, values in state.items()
    }


def _refuse_other_parameters(saved: list[list[str]], current: list[list[str]], path: Any) -> None:
    saved_groups = {name: number for number, group in enumerate(saved) for name in group}
    current_groups = {name: number for number, group in enumerate(current) for name in group}
    if saved_groups == current_groups and len(saved) == len(current):
        return
    differ = sorted(name for name in {**saved_groups, **current_groups} if saved_groups.get(name) != current_groups.get(name))
    raise CheckpointError(
        f"the optimizer in {path} has {len(saved)} parameter groups of {[len(g) for g in saved]} parameters, this one has "
        f"{len(current)} of {[len(g) for g in current]}. Absent or in another group are: {', '.join(differ[:8]) or 'none'}"
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.copy() if isinstance(value, Run) else value.detach().to("cpu", copy=True)


# -- writing together --------------------------------------------------------------------------------------------------


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _first_failure(errors: Iterable[str | None]) -> str | None:
    """Returns the first error with its rank, from a list by rank; None if there is none."""
    return next((f"rank {number}: {message}" for number, message in enumerate(errors) if message is not None), None)


def _attempt(call: Callable[[], T]) -> tuple[str | None, T | None]:
    """Returns the message of the call's error, and its result; one of the two is None."""
    try:
        return None, call()
    except Exception as error:
        return _in_words(error), None


def _each_then_first(group: Group, each: Callable[[], T], first: Callable[[list[Any]], R]) -> R:
    """Calls ``each`` on every rank, then ``first`` with all results on the first rank, and broadcasts its result. Collective.

    Raises:
        CheckpointError: on every rank, if one call failed.
    """
    outcomes = group.gather_objects(_attempt(each))
    failure = _first_failure(error for error, _ in outcomes)
    outcome = (failure, None) if failure is not None or group.rank else _attempt(lambda: first([result for _, result in outcomes]))
    error, result = group.share_object(outcome)
    if error is not None:
        raise CheckpointError(error)
    return result  # type: ignore[return-value]


def _write(shares: dict[str, Any], writer: FolderWriter, group: Group) -> None:
    """Writes a folder as torch's ``save`` does, but over a group in which every rank learns of another's error. Collective."""
    planner, index = ShardSavePlanner(flatten_sharded_tensors=False), []

    def plan() -> SavePlan:
        planner.set_up_planner(shares, writer.storage_meta(), is_coordinator=group.rank == 0)
        writer.set_up_storage_writer(group.rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_together(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = planner.create_global_plan(plans)
        index.append(metadata)
        return writer.prepare_global_plan(plans)

    plans = _each_then_first(group, plan, plan_together)
    mine = planner.finish_plan(plans[group.rank])
    _each_then_first(group, lambda: writer.write_data(mine, planner).wait(), lambda results: writer.finish(index[0], results))
