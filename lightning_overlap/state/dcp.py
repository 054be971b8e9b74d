"""The files of a sharded checkpoint, in the format of torch.distributed.checkpoint (DCP): planners, a writer and a reader.

The writer publishes a folder only when it is complete. The reader runs no code of a checkpoint: it unpickles DCP's own classes only,
and compares data with its checksums.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.futures import Future

from lightning_overlap.state.checkpoint import CheckpointError, beside, put_in_place, refuse_broken, remove, what_is_broken
from lightning_overlap.torch_seams import MemoryFormatEncoding

INDEX, META = ".metadata", "meta.pt"
"""DCP's index of tensors, and the file of all other content."""


class ShardSavePlanner(DefaultSavePlanner):
    """Plans a save of tensors and of :class:`~lightning_overlap.state.shards.Run`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return find_tensor_shard(self.state_dict[index.fqn], index)  # torch's own asks for tensors, and a Run is none


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans a load into tensors and into :class:`~lightning_overlap.state.shards.Run`."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # torch's own drops values that are not tensors, and flattens a dictionary that is flat here.
        self.flatten_state_dict = False
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return find_tensor_shard(self.state_dict[index.fqn], index)


class FolderWriter(FileSystemWriter):
    """Writes a folder under a temporary name. The coordinator renames it once all ranks have written.

    Args:
        path: the checkpoint's folder.
        meta: content of the file :data:`META`.
    """

    def __init__(self, path: Path, meta: bytes) -> None:
        super().__init__(beside(path))
        self._final_path = path
        self._meta = meta

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the temporary folder. Called on the coordinator, before any rank writes."""
        remove(Path(self.path))
        Path(self.path).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self._final_path), save_id=self.save_id)

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Writes the index and :data:`META`, and renames the folder. Called on the coordinator, after all ranks have written."""
        with (Path(self.path) / META).open("wb") as file:
            file.write(self._meta)
            file.flush()
            os.fsync(file.fileno())
        super().finish(metadata, results)
        _append_checksum(Path(self.path) / INDEX)
        put_in_place(self._final_path)


class FolderReader(FileSystemReader):
    """Reads a folder. Its index is read once, and is not trusted.

    Args:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: the index is damaged or is no index, lists objects that are not tensors, or names files outside the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        content = (path / INDEX).read_bytes()
        refuse_broken(path / INDEX, _damage_of_index(content))
        try:
            self.index: Metadata = IndexUnpickler(io.BytesIO(content)).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / INDEX} is not the index of a checkpoint, and may contain code: {error}") from error
        if not isinstance(self.index, Metadata):
            raise CheckpointError(f"{path / INDEX} is not the index of a checkpoint: it holds a {type(self.index).__name__}")
        for fqn, entry in self.index.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                raise CheckpointError(f"{path} holds a pickled object, {fqn}. torch would run its code to load it")
        for name in {entry.relative_path for entry in (self.index.storage_data or {}).values()}:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or os.sep in name:
                raise CheckpointError(f"{path / INDEX} names {name!r}, which is not a file of this folder")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Compares the planned data with its checksums, and reads it."""
        entries = [self.storage_data[item.storage_index] for item in plan.items]
        for name, offset, length in sorted({(entry.relative_path, entry.offset, entry.length) for entry in entries}):
            with (Path(self.path) / name).open("rb") as file:
                file.seek(offset)
                refuse_broken(file.name, what_is_broken(io.BytesIO(file.read(length))))
        return super().read_data(plan, planner)

    def read_metadata(self) -> Metadata:  # with kwargs torch would look for an index of each rank
        return self.index

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yields the full names that begin with a prefix, each with a tensor of its shape and dtype on the meta device."""
        for fqn, entry in self.index.state_dict_metadata.items():
            if fqn.startswith(prefix):
                yield fqn, torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]


# -- the index -----------------------------------------------------------------------------------------------------------


_CHECKSUM = b"crc32:"
"""Begins the checksum, which follows the index: readers of the pickle stop before it."""


def _append_checksum(index: Path) -> None:
    with index.open("r+b") as file:
        checksum = zlib.crc32(file.read())
        file.write(_CHECKSUM + b"%08x" % checksum)
        file.flush()
        os.fsync(file.fileno())


def _damage_of_index(content: bytes) -> str | None:
    """Describes the damage of an index; None if there is none, or no checksum (written by another program or an earlier version)."""
    pickled, checksum = content[:-8], content[-8:]
    if not pickled.endswith(_CHECKSUM):
        return None
    expected = b"%08x" % zlib.crc32(pickled.removesuffix(_CHECKSUM))
    return None if checksum == expected else "the checksum differs"


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


class IndexUnpickler(pickle.Unpickler):
    """Unpickles DCP's index. It refuses every class but DCP's own, so that no code of the file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # some versions of Python (3.11.2) write the member of an enum so
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: Any, name: Any) -> Any:
    """Replaces ``getattr`` in an index: returns a member of the only enum in it, and refuses everything else."""
    if kind is not MemoryFormatEncoding or name not in MemoryFormatEncoding.__members__:
        raise pickle.UnpicklingError(f"it names {kind!r}.{name}")
    return MemoryFormatEncoding[name]
