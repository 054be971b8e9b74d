"""Checkpoints that a crash leaves whole: one file in Lightning's format, or a directory that any number of ranks can load.

A directory holds torch's distributed checkpoint with keys ``model`` and ``optimizer_0``, ... in the parameters' own shapes, as
Lightning's FSDP strategy names them, and ``meta.pt`` with all that is not a tensor. Nothing that is loaded can run code.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_overlap.decision import ConfigError
from lightning_overlap.piece import Piece

META = "meta.pt"
DIRECTORY = "lightning_overlap_directory"
"""Key of a loaded checkpoint whose tensors are still in its directory."""


def _beside(path: str | os.PathLike[str], suffix: str) -> Path:
    return Path(path).with_name(f".{Path(path).name}.{suffix}")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside and moves into place, and loads nothing that could run code unless told to."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # not a local file: its store decides
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        beside = _beside(path, "writing")
        super().save_checkpoint(checkpoint, beside, storage_options)
        os.replace(beside, path)

    def load_checkpoint(self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None) -> Any:
        """As the base class, but ``weights_only`` unless it is False.

        Raises:
            ConfigError: the file holds other objects than tensors and plain values.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f"{path} holds more than tensors and plain values, and loading it could run code: {str(error).splitlines()[0]} "
                "Pass weights_only=False to fit, validate, test or predict if you trust the file."
            ) from error


def is_directory(path: Any) -> bool:
    """Whether ``path`` is a directory rather than a file."""
    return os.path.isdir(path)


# -- saving ------------------------------------------------------------------------------------------------------------


def snapshot(tree: Any) -> Any:
    """A copy in host memory, which training that goes on does not change."""
    if isinstance(tree, Mapping):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, Piece):
        return Piece(tree.flat.detach().cpu().clone(), tree.shape, tree.start)
    return tree.detach().cpu().clone() if isinstance(tree, Tensor) else tree


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Piece) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The base class knows tensors only, and would make None of the rest.
        super().set_up_planner({}, metadata, is_coordinator)
        self.state_dict = state_dict

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Piece) else super().lookup_tensor(index)


class _Writer(FileSystemWriter):
    """Moves the directory into place once every rank has written its part."""

    def __init__(self, beside: Path, path: Path) -> None:
        super().__init__(beside)
        self._moves = beside, path

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        beside, path = self._moves
        old = _beside(path, "replaced")
        if path.exists():  # a directory cannot replace another in one step
            os.rename(path, old)
        os.rename(beside, path)
        shutil.rmtree(old, ignore_errors=True)


def save_directory(tensors: dict[str, Any], meta: dict[str, Any], path: Any, group: Any) -> None:
    """Writes a directory. Collective over ``group``; may run in a thread of its own.

    Args:
        tensors: a tree of tensors, :class:`Piece` and plain values, this rank's share. Tensors that several ranks give are
            written once.
        meta: what is no tensor; rank 0's counts.
        path: where to.
        group: a gloo process group of all ranks, or None if there is one rank.
    """
    path, beside = Path(path), _beside(path, "writing")
    plain: dict[str, Any] = {}
    tensors = _without_plain(tensors, (), plain)
    everyone: list[Any] = [plain]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, plain, group)
    if group is None or dist.get_rank(group) == 0:
        shutil.rmtree(beside, ignore_errors=True)  # what a crash has left
        beside.mkdir(parents=True)
        torch.save({**meta, "plain": {key: value for each in everyone for key, value in each.items()}}, beside / META)
    if group is not None:
        dist.barrier(group)
    save(tensors, storage_writer=_Writer(beside, path), planner=_SavePlanner(), process_group=group, no_dist=group is None)


def _without_plain(tree: Mapping[str, Any], path: tuple[str, ...], plain: dict[str, Any]) -> dict[str, Any]:
    """The tree without its plain values, which go to ``plain`` under their dotted path."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            kept[key] = _without_plain(value, (*path, key), plain)
        elif isinstance(value, Tensor | Piece):
            kept[key] = value
        else:
            plain[".".join((*path, key))] = value
    return kept


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor that a directory holds."""

    shape: torch.Size
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    """torch's description of a distributed checkpoint is a pickle: only what such a description is made of is let in."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ConfigError(f"the checkpoint's .metadata names {module}.{name}, which no checkpoint needs: it could run code")


_ALLOWED = {
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        code = [name for name, value in metadata.state_dict_metadata.items() if isinstance(value, BytesStorageMetadata)]
        if code:
            raise ConfigError(f"the checkpoint holds {code[0]} as a pickle, which could run code")
        return super().read_metadata(*args, **kwargs)


class Directory:
    """A checkpoint directory, to load from.

    Args:
        path: the directory.

    Raises:
        ConfigError: it is none, or was not written to its end.
    """

    def __init__(self, path: Any) -> None:
        self.path = Path(path)
        if not (self.path / ".metadata").exists() or not (self.path / META).exists():
            raise ConfigError(f"{path} is no complete checkpoint directory: .metadata or {META} is missing. Load an earlier one.")
        self.meta: dict[str, Any] = torch.load(self.path / META, weights_only=True, map_location="cpu")
        self.plain: dict[str, Any] = self.meta.pop("plain")
        self.stored = {
            name: Stored(value.size, value.properties.dtype)
            for name, value in _Reader(self.path).read_metadata().state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def below(self, prefix: str) -> dict[str, Stored | Any]:
        """Tensors and plain values under a key, by the rest of their names."""
        both = {**self.stored, **self.plain}
        return {name[len(prefix) + 1 :]: value for name, value in both.items() if name.startswith(f"{prefix}.")}

    def load(self, tensors: dict[str, Tensor | Piece]) -> None:
        """Fills the tensors in place, each by its full name. Collective over the world, if there is one.

        Raises:
            ConfigError: the directory has no such tensor, or one of another shape.
        """
        wrong = [
            f"{name} {tuple(value.shape)} ({'not there' if name not in self.stored else tuple(self.stored[name].shape)})"
            for name, value in tensors.items()
            if name not in self.stored or self.stored[name].shape != value.shape
        ]
        if wrong:
            raise ConfigError(f"{self.path} does not fit this module, with the checkpoint's shape in brackets: {'; '.join(wrong[:5])}")
        load(
            tensors,
            storage_reader=_Reader(self.path),
            planner=_LoadPlanner(flatten_state_dict=False),
            no_dist=not dist.is_initialized(),
        )
