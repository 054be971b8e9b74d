"""Sharded checkpoints: a folder in the format of torch.distributed.checkpoint (DCP), laid out as Lightning's FSDP does.

``model.*`` and ``optimizer_<i>.state.<parameter>.<key>`` are DCP's, tensors only, in the shapes of the model whatever the number
of ranks. All else is in ``meta.pt``, and optimizers name their parameters there. No rank writes or holds more than its share.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.futures import Future
from torch.optim import Optimizer

from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.world import all_gather_objects, make_group, rank, world_size
from lightning_overlap.state.checkpoint import (
    CheckpointError,
    beside,
    is_local,
    load_trusting,
    put_in_place,
    refuse_broken,
    remove,
    what_is_broken,
)
from lightning_overlap.state.parts import Parts
from lightning_overlap.state.shards import Place, Run
from lightning_overlap.torch_seams import MemoryFormatEncoding

INDEX, META = ".metadata", "meta.pt"
T = TypeVar("T")
R = TypeVar("R")
State = dict[str, dict[str, Any]]
"""An optimizer's state, or a rank's part of it, by parameter and key."""


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a sharded checkpoint, or would be one.

    Raises:
        CheckpointError: it is a folder without an index.
    """
    if not path.is_dir():
        return False
    missing = [name for name in (INDEX, META) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {' and no '.join(missing)}")
    return True


# -- what is saved -----------------------------------------------------------------------------------------------------


def names_of(module: nn.Module) -> dict[int, str]:
    """Names of the parameters, by id."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def describe(optimizer: Optimizer, shards: State | None, names: Mapping[int, str], parts: Parts) -> dict[str, Any]:
    """This rank's part of the state, and the groups with the names of their parameters.

    Args:
        optimizer: the user's.
        shards: the part, if a mode shards the state; else every rank has that of all it holds, and gets a part dealt out.
        names: of the parameters.
        parts: which of the parameters each rank holds.
    """
    groups = [
        {**group, "params": _names(group["params"], names, group_number)} for group_number, group in enumerate(optimizer.param_groups)
    ]
    if shards is None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        everything = {name: (p, optimizer.state.get(p)) for name, p in zip(_all_names(groups), parameters, strict=True)}
        mine = parts.deal({name: p for name, (p, _) in everything.items()})
        shards = {name: dict(state) for name, (_, state) in everything.items() if state and name in mine}
    else:
        shards = {name: state for name, state in shards.items() if parts.is_first(name)}
    placed = {name: {key: _put(value, parts.place(name)) for key, value in state.items()} for name, state in shards.items()}
    return {"state": placed, "param_groups": groups}


def _put(value: Any, place: Place | None) -> Any:
    """A part of a state as it lies in the whole one, which has the shape of the parameter."""
    if place is not None and isinstance(value, Run):
        return value.put(place)
    if place is not None and isinstance(value, Tensor) and value.shape == place.piece:
        return Run(value.shape, 0, value.detach().view(-1), place)
    return value


def _cut(value: Any, place: Place | None) -> Any:
    """This rank's part of a state on the meta device."""
    cut = place is not None and isinstance(value, Tensor) and value.shape == place.shape
    return value.new_empty(place.piece) if cut and place is not None else value


def _names(parameters: Iterable[Tensor], names: Mapping[int, str], group: int) -> list[str]:
    # One that is not the module's (one process may have such) goes by its place.
    return [names.get(id(p), f"group {group}, parameter {place}") for place, p in enumerate(parameters)]


def _all_names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]


# -- folders -----------------------------------------------------------------------------------------------------------


class Folders:
    """Writes and reads the folders.

    Args:
        timeout: how long a rank waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._made: Group | None = None
        self._reader: _Reader | None = None

    @property
    def _group(self) -> Group:
        """All ranks, on the CPU; made collectively. Not a mode's group, since a save in the background runs beside training."""
        if self._made is None:
            self._made = make_group([range(world_size())], "checkpoint", self._timeout, "gloo", gathers=False, threads=False)
        return self._made

    def close(self, *, complete: bool) -> None:
        """Ends the connections. No save may be running.

        Args:
            complete: False after a failure, when a transfer may be in the middle: connections then end with the garbage.
        """
        if self._made is not None and complete:
            self._made.close()
        self._made = None

    def save(self, checkpoint: dict[str, Any], path: Path, parts: Parts, *, copy: bool) -> Callable[[], None]:
        """What writes the folder, on every rank; on a thread as well, if ``copy``. Collective.

        Args:
            checkpoint: Lightning's, with optimizers as :func:`describe` gives them.
            path: the folder.
            parts: which of the weights each rank holds.
            copy: tensors are copied, so that training may go on.
        """
        if not is_local(path):
            raise CheckpointError(f"{path}: sharded checkpoints need a file system that all ranks share")
        group = self._group  # before anything that may fail on one rank only
        checkpoint = dict(checkpoint)
        model, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", None)
        mine = parts.deal({name: value for name, value in model.items() if isinstance(value, Tensor)})
        shares: dict[str, Any] = {"model": {name: _put(model[name], parts.place(name)) for name in mine}}
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
        writer = _Writer(path, meta.getvalue())
        return lambda: _write(shares, writer, group)

    @staticmethod
    def _gather_values(optimizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups, and of the states what is no tensor, from all ranks."""
        found = [{"state": {}, "param_groups": optimizer["param_groups"]} for optimizer in optimizers]
        mine = [
            {
                name: values
                for name, state in optimizer["state"].items()
                if (values := {key: value for key, value in state.items() if not isinstance(value, Tensor | Run)})
            }
            for optimizer in optimizers
        ]
        for share in all_gather_objects(mine):
            for optimizer, state in zip(found, share, strict=True):
                for name, values in state.items():
                    optimizer["state"].setdefault(name, {}).update(values)
        return found

    def load(self, path: Path, own: Mapping[str, Any], *, weights_only: bool) -> dict[str, Any]:
        """Lightning's checkpoint. Collective.

        Weights that the module has in the same shape are read into it; those that it has on the meta device are left on disk, for
        :meth:`read`. Optimizers are left there, as :class:`SavedOptimizer`.

        Args:
            path: the folder.
            own: the module's ``state_dict()``.
            weights_only: refuse objects whose loading may run code.
        """
        reader = _Reader(path)
        refuse_broken(path / META, what_is_broken(path / META))
        checkpoint: dict[str, Any] = load_trusting(
            weights_only, path / META, lambda: torch.load(path / META, map_location="cpu", weights_only=weights_only)
        )
        model: dict[str, Tensor] = {}
        for fqn, entry in reader.under("model."):
            name = fqn.removeprefix("model.")
            there = own.get(name)
            fits = isinstance(there, Tensor) and there.shape == entry.shape
            model[name] = there.detach() if fits else torch.empty_like(entry, device="cpu")  # type: ignore[union-attr]
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
        """Reads weights, in place, from the folder that :meth:`load` was last called with. Collective."""
        if self._reader is not None:
            self._read(self._reader, {f"model.{name}": tensor.detach() for name, tensor in weights.items()})

    def load_optimizer(
        self,
        saved: SavedOptimizer,
        optimizer: Optimizer,
        names: Mapping[int, str],
        parts: Parts,
        room: Callable[[State], State | None],
    ) -> None:
        """Loads into an optimizer. Collective.

        Args:
            saved: from :meth:`load`.
            optimizer: the user's.
            names: of the parameters.
            parts: which of them this rank holds.
            room: makes room for such a state and gives this rank's part of it, to be read into; None if no mode shards it.
        """
        groups = [_names(group["params"], names, number) for number, group in enumerate(optimizer.param_groups)]
        _same_parameters([group["params"] for group in saved.param_groups], groups, saved.reader.path)
        whole_state, places = saved.entries()
        state = {
            name: {key: _cut(value, parts.place(name)) for key, value in values.items()}
            for name, values in whole_state.items()
            if parts.holds(name)
        }
        shards = room(state)
        whole: State = {}
        if shards is None:
            whole = {
                name: {key: torch.empty_like(v, device="cpu") if isinstance(v, Tensor) else v for key, v in values.items()}
                for name, values in state.items()
            }
        targets = {
            places[name, key]: _put(target, parts.place(name))
            for name, values in (whole if shards is None else shards).items()
            for key, target in values.items()
            if (name, key) in places
        }
        self._read(saved.reader, targets)
        if shards is None:
            # torch's own way puts each value where its kernels want it.
            numbers = {name: number for number, name in enumerate(_all_names({"params": group} for group in groups))}
            by_number = {numbers[name]: values for name, values in whole.items()}
            saved_groups = [
                {**group, "params": [numbers[name] for name in own]} for group, own in zip(saved.param_groups, groups, strict=True)
            ]
            optimizer.load_state_dict({"state": by_number, "param_groups": saved_groups})
        else:
            for group, values in zip(optimizer.param_groups, saved.param_groups, strict=True):
                group.update({key: value for key, value in values.items() if key not in ("params", "param_names")})

    @staticmethod
    def _read(reader: _Reader, targets: dict[str, Any]) -> None:
        """Each rank reads for itself what it needs; an error of one is an error on all."""
        try:
            load(targets, storage_reader=reader, planner=_LoadPlanner(), no_dist=True)
            mine = None
        except CheckpointException as error:  # which is no Exception
            ((cause, _),) = error.failures.values()
            mine = cause
        failed = _first_failure(all_gather_objects(None if mine is None else _in_words(mine)))
        if failed is not None:
            raise CheckpointError(f"reading {reader.path} failed on {failed}") from mine


def _same_parameters(saved: list[list[str]], own: list[list[str]], path: Any) -> None:
    there = {name: number for number, group in enumerate(saved) for name in group}
    here = {name: number for number, group in enumerate(own) for name in group}
    if there == here and len(saved) == len(own):
        return
    differ = sorted(name for name in {**there, **here} if there.get(name) != here.get(name))
    raise CheckpointError(
        f"the optimizer in {path} has {len(saved)} parameter groups of {[len(g) for g in saved]} parameters, this one has "
        f"{len(own)} of {[len(g) for g in own]}. Absent or in another group are: {', '.join(differ[:8]) or 'none'}"
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.copy() if isinstance(value, Run) else value.detach().to("cpu", copy=True)


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _first_failure(errors: Iterable[str | None]) -> str | None:
    """The rank and the words of the first of the errors, which come by rank."""
    return next((f"rank {number}: {words}" for number, words in enumerate(errors) if words is not None), None)


def _attempt(do: Callable[[], T]) -> tuple[str | None, T | None]:
    """What went wrong, or what ``do`` gives."""
    try:
        return None, do()
    except Exception as error:
        return _in_words(error), None


def _each_then_first(group: Group, each: Callable[[], T], first: Callable[[list[Any]], R]) -> R:
    """Calls ``each`` on every rank, and ``first`` on the first one with what all have given. Gives every rank what that gives.

    Raises:
        CheckpointError: on every rank, if one has failed.
    """
    everyone = group.gather_objects(_attempt(each))
    failed = _first_failure(error for error, _ in everyone)
    answer = (failed, None) if failed is not None or group.rank else _attempt(lambda: first([given for _, given in everyone]))
    error, given = group.share_object(answer)
    if error is not None:
        raise CheckpointError(error)
    return given  # type: ignore[return-value]


def _write(shares: dict[str, Any], writer: _Writer, group: Group) -> None:
    """What torch's ``save`` does, by this package's group: its members hear of an error that another rank has announced, and of a
    rank that is gone. Collective."""
    planner, index = _SavePlanner(flatten_sharded_tensors=False), []

    def plan() -> SavePlan:
        planner.set_up_planner(shares, writer.storage_meta(), is_coordinator=group.rank == 0)
        writer.set_up_storage_writer(group.rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_together(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = planner.create_global_plan(plans)
        index.append(metadata)
        return writer.prepare_global_plan(plans)

    plans = _each_then_first(group, plan, plan_together)
    own = planner.finish_plan(plans[group.rank])
    _each_then_first(group, lambda: writer.write_data(own, planner).wait(), lambda results: writer.finish(index[0], results))


# -- DCP's parts -------------------------------------------------------------------------------------------------------


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return find_tensor_shard(self.state_dict[index.fqn], index)  # torch's own asks for tensors, which a Run is not


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # torch's own drops what is no tensor, and flattens what is flat here.
        self.flatten_state_dict = False
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return find_tensor_shard(self.state_dict[index.fqn], index)


class _Writer(FileSystemWriter):
    """Writes beside; the coordinator moves the folder into place once all ranks have written."""

    def __init__(self, path: Path, meta: bytes) -> None:
        super().__init__(beside(path))
        self._place = path
        self._meta = meta

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before any rank writes."""
        remove(Path(self.path))
        Path(self.path).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self._place), save_id=self.save_id)

    def finish(self, metadata: Metadata, results: Any) -> None:
        with (Path(self.path) / META).open("wb") as file:
            file.write(self._meta)
            file.flush()
            os.fsync(file.fileno())
        super().finish(metadata, results)
        _append_checksum(Path(self.path) / INDEX)
        put_in_place(self._place)


_CHECKSUM = b"crc32:"
"""What comes after the index, which is a pickle: readers stop at its end."""


def _append_checksum(index: Path) -> None:
    with index.open("r+b") as file:
        checksum = zlib.crc32(file.read())
        file.write(_CHECKSUM + b"%08x" % checksum)
        file.flush()
        os.fsync(file.fileno())


def _what_is_broken_in_index(content: bytes) -> str | None:
    """None as well if it has no checksum: another one's, or of an earlier version."""
    pickled, checksum = content[:-8], content[-8:]
    if not pickled.endswith(_CHECKSUM):
        return None
    written = b"%08x" % zlib.crc32(pickled.removesuffix(_CHECKSUM))
    return None if checksum == written else "the checksum differs"


_DCP = "torch.distributed.checkpoint"
_HARMLESS = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((f"{_DCP}.metadata", f"{name}StorageMetadata") for name in ("Tensor", "Chunk", "Bytes")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    """DCP's index is a pickle: nothing but its own classes is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # how some versions of Python (3.11.2) write the member of an enum
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: Any, name: Any) -> Any:
    """What ``getattr`` may do in an index: name a member of the one enum in it."""
    if kind is not MemoryFormatEncoding or name not in MemoryFormatEncoding.__members__:
        raise pickle.UnpicklingError(f"it names {kind!r}.{name}")
    return MemoryFormatEncoding[name]


class _Reader(FileSystemReader):
    """Reads the index once, and trusts it with nothing.

    Raises:
        CheckpointError: the index is no index or is damaged, has more than tensors, or names files outside of the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        content = (path / INDEX).read_bytes()
        refuse_broken(path / INDEX, _what_is_broken_in_index(content))
        try:
            self.index: Metadata = _IndexUnpickler(io.BytesIO(content)).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / INDEX} is no index of a checkpoint, and may be code of whoever wrote it: {error}"
            ) from error
        if not isinstance(self.index, Metadata):
            raise CheckpointError(f"{path / INDEX} is no index of a checkpoint: it holds a {type(self.index).__name__}")
        for fqn, entry in self.index.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                raise CheckpointError(f"{path} holds a pickled object, {fqn}, which torch would load with the code in it")
        for name in {place.relative_path for place in (self.index.storage_data or {}).values()}:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or os.sep in name:
                raise CheckpointError(f"{path / INDEX} names {name!r}, which is no file of this folder")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Compares what is to be read with its checksums, and reads it."""
        places = [self.storage_data[item.storage_index] for item in plan.items]
        for name, offset, length in sorted({(place.relative_path, place.offset, place.length) for place in places}):
            with (Path(self.path) / name).open("rb") as file:
                file.seek(offset)
                refuse_broken(file.name, what_is_broken(io.BytesIO(file.read(length))))
        return super().read_data(plan, planner)

    def read_metadata(self) -> Metadata:  # with kwargs torch would look for an index of each rank
        return self.index

    def under(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names that begin so, and tensors of their shapes on the meta device."""
        for fqn, entry in self.index.state_dict_metadata.items():
            if fqn.startswith(prefix):
                yield fqn, torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]


@dataclass
class SavedOptimizer:
    """An optimizer's state on disk. ``state`` has what is no tensor."""

    reader: _Reader
    prefix: str
    state: State
    param_groups: list[dict[str, Any]]

    def entries(self) -> tuple[State, dict[tuple[str, str], str]]:
        """The state with tensors on the meta device, and each tensor's name in the folder."""
        state = {name: dict(values) for name, values in self.state.items()}
        places = {}
        for fqn, entry in self.reader.under(self.prefix):
            name, key = self.reader.index.planner_data[fqn][-2:]
            state.setdefault(name, {})[key] = entry
            places[name, key] = fqn
        return state, places
