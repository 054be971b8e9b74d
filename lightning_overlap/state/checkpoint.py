"""Checkpoints on disk: written beside and moved into place, in the background if asked, compared with their checksums, and read
without running their code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy as shallow_copy
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_overlap.ranks.world import all_gather_objects


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read."""


# -- places ------------------------------------------------------------------------------------------------------------


def is_local(path: str | Path) -> bool:
    """Whether it is a path of this machine's file system, and no address."""
    return "://" not in str(path)


LONGEST_NAME = 143
"""Bytes of a name that common file systems take (most take 255; eCryptfs takes these)."""
_KEPT = 60
"""Bytes of a longer name that are kept in one that is made from it."""


def _fitting(begin: str, middle: str, end: str) -> str:
    """The three together; if that is longer than LONGEST_NAME, with a part of ``middle`` and a digest in its place."""
    name = begin + middle + end
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    kept = os.fsencode(middle)[:_KEPT].decode(errors="ignore")
    return f"{begin}{kept}.{hashlib.sha256(os.fsencode(middle)).hexdigest()[:16]}{end}"


def beside(path: Path) -> Path:
    """Where a checkpoint is while it is written. Hidden, since it is not complete."""
    return path.with_name(_fitting(".", path.name, ".writing"))


def aside(path: Path) -> Path:
    """Where a checkpoint is while another one takes its place.

    Its name begins and ends as that of ``path``: if a crash leaves it there, ``ckpt_path="last"`` finds it by that.
    """
    stem, suffix = (path.stem, path.suffix) if len(os.fsencode(path.suffix)) < _KEPT else (path.name, "")
    return path.with_name(_fitting("", stem, f".replaced{suffix}"))


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one; a link, and not what it points to."""
    if path.is_dir() and not path.is_symlink():
        # First out of the way: a crash in the middle must not leave half a folder under the name of a checkpoint.
        going = path.with_name(_fitting(".", path.name, ".removing"))
        shutil.rmtree(going, ignore_errors=True)  # what such a crash has left
        os.rename(path, going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def put_in_place(path: Path) -> None:
    """Moves what was written beside ``path`` there."""
    new, old = beside(path), aside(path)
    if path.exists() and (path.is_dir() or new.is_dir()):
        # No call that every file system has replaces a folder. A crash between these two leaves the old one aside.
        remove(old)
        os.rename(path, old)
    os.replace(new, path)
    remove(old)


def in_place(path: Path) -> Path:
    """Where the last good checkpoint of this name is."""
    return aside(path) if aside(path).exists() and not path.exists() else path


# -- checksums ---------------------------------------------------------------------------------------------------------


def what_is_broken(file: Path | IO[bytes]) -> str | None:
    """How a file that ``torch.save`` has written differs from its checksums; None if it does not, or has none.

    Such a file is a zip archive with a CRC-32 of each record. ``torch.load`` does not look at them, so a byte that a disk has
    changed would become a weight. Reads the file once, at about the speed of ``torch.load``.
    """
    try:
        if not zipfile.is_zipfile(file):  # of an earlier format of torch's, or cut off, which loading tells
            return None
        with zipfile.ZipFile(file) as archive:
            if not any(record.CRC for record in archive.infolist()):  # torch was told to compute none
                return None
            record = archive.testzip()
    except Exception as error:  # of whatever kind: what says where a record is may be changed too
        return f"its table of records is not what was written: {error}"
    return None if record is None else f"its record {record!r} is not what was written: the checksum differs"


def refuse_broken(path: Any, broken: str | None) -> None:
    """Raises:
    CheckpointError: something is broken.
    """
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: {broken}. Load another checkpoint, or copy this one again from where it is whole")


def refuse_damaged(path: Path, *, read_here: bool) -> None:
    """Compares a checkpoint that is one file with its checksums. Collective.

    Args:
        path: the file.
        read_here: this rank reads it; one of each machine does for all.

    Raises:
        CheckpointError: on every rank, if it is damaged on one machine.
    """
    broken = all_gather_objects(what_is_broken(path) if read_here else None)
    refuse_broken(path, next(filter(None, broken), None))


# -- one file ----------------------------------------------------------------------------------------------------------


LIGHTNING_SAVE = TorchCheckpointIO.save_checkpoint
"""As it was at import: a user, or a test, may put another function in its place."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own, but a local file is streamed beside and moved into place: a crash leaves the last good one."""

    @staticmethod
    def takes_options() -> bool:
        """Whether saving with ``storage_options`` is not an error. Lightning's own function refuses them; one in its place may not."""
        return TorchCheckpointIO.save_checkpoint is not LIGHTNING_SAVE

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not is_local(path) or TorchCheckpointIO.save_checkpoint is not LIGHTNING_SAVE:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(beside(path))  # a file that a killed process has left; or a link, which must not be followed
            with beside(path).open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(path)
        except BaseException:
            remove(beside(path))  # of a full disk, say, which it would keep full
            raise

    def remove_checkpoint(self, path: Any) -> None:
        if is_local(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


def compact(checkpoint: Any, *, copy: bool) -> Any:
    """The same with tensors of their own on the CPU, if ``copy``; without, only where a tensor is a view of a larger storage.

    torch.save writes a view's whole storage. What is tied stays tied.
    """
    made: dict[Any, Tensor] = {}

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            new = shallow_copy(value)  # a state_dict has attributes beside its items
            new.update({key: own(item) for key, item in value.items()})
            return new
        if type(value) in (list, tuple):
            return type(value)(own(item) for item in value)
        return own_tensor(value) if isinstance(value, Tensor) else value

    def own_tensor(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or not (copy or tensor.untyped_storage().nbytes() > tensor.nbytes):
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if key not in made:
            made[key] = tensor.detach().to("cpu", copy=True) if copy else tensor.detach().clone()
        return made[key]

    return own(checkpoint)


def load_trusting(weights_only: bool, path: Any, load: Callable[[], Any]) -> Any:
    """What ``load`` gives.

    Raises:
        CheckpointError: it holds objects whose loading may run code, and ``weights_only``; or it cannot be read.
    """
    try:
        return load()
    except CheckpointError:
        raise
    except (RuntimeError, EOFError) as error:
        words = str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it may have been cut off: {words}. Load another checkpoint") from error
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise CheckpointError(f"{path} cannot be read: {error}. Load another checkpoint") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found.group(1).rstrip(",") if found else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and plain values: {what}. Loading that may run code of whoever wrote the file. "
            "If you trust it, pass weights_only=False (trainer.fit(..., ckpt_path=..., weights_only=False))."
        ) from error


def load_file(checkpoint_io: CheckpointIO, path: Any, *, weights_only: bool) -> dict[str, Any]:
    """A checkpoint that is one file."""
    return load_trusting(weights_only, path, lambda: checkpoint_io.load_checkpoint(path, weights_only=weights_only))


def load_lazily(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """As :func:`load_file`, of a local one: what is not read of it takes no memory."""
    return load_trusting(weights_only, path, lambda: torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only))


# -- when --------------------------------------------------------------------------------------------------------------


class Saves:
    """Saves, and what follows on them, in order: at once, or on a thread. What fails on one rank is an error on all."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._path: Any = None

    def run(self, prepare: Callable[[], Callable[[], None]], path: Any, *, background: bool) -> None:
        """Collective, and waits for what runs before.

        Args:
            prepare: takes what is to be saved, and gives what writes it.
            path: for the error.
            background: write while training goes on.

        Raises:
            CheckpointError: on every rank, if preparing, an earlier save, or writing at once has failed on one.
        """
        self.wait()
        self._path = path
        writes: list[Callable[[], None]] = []
        self._agree(_outcome(lambda: writes.append(prepare())))
        if background:
            self._submit(writes[0])
        else:
            self._agree(_outcome(writes[0]))

    def then(self, do: Callable[[], None]) -> None:
        """After the save that is running, and only if it succeeds: what is removed may be the last good checkpoint."""
        if self._running:
            self._submit(do)
        else:
            do()

    def wait(self) -> None:
        """Until nothing runs. Collective.

        Raises:
            CheckpointError: on every rank, if what ran has failed on one.
        """
        if self._running:  # on all ranks or on none, whatever followed
            self._agree(self._finish())

    def close(self) -> None:
        """Waits without the other ranks, which may be gone; an error is told."""
        error = self._finish()
        if error is not None:
            rank_zero_warn(f"the checkpoint {self._path} was not written: {error!r}")

    def _submit(self, do: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        before = tuple(self._running)

        def in_order() -> None:
            if all(done.exception() is None for done in before):
                do()

        self._running.append(self._thread.submit(in_order))

    def _finish(self) -> BaseException | None:
        running, self._running = self._running, []
        errors = [future.exception() for future in running]
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return next((error for error in errors if error is not None), None)

    def _agree(self, error: BaseException | None) -> None:
        everyone = all_gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]
        if failed:
            raise CheckpointError(f"the checkpoint {self._path} was not written. {failed[0]}") from error


def _outcome(do: Callable[[], None]) -> BaseException | None:
    try:
        do()
    except Exception as error:
        return error
    return None
