"""Checkpoint files: written under a temporary name and renamed, in the background if asked; compared with their checksums and read
without running code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


# -- paths ---------------------------------------------------------------------------------------------------------------


def is_local(path: str | Path) -> bool:
    """Whether a path is in the file system, and not the address of a remote one (``s3://...``)."""
    return "://" not in str(path)


LONGEST_NAME = 143
"""Bytes of a file name that common file systems accept (most accept 255; eCryptfs accepts 143)."""
_KEPT = 60
"""How many bytes of a longer name its replacement keeps."""


def _short_name(begin: str, middle: str, end: str) -> str:
    """Concatenates the three; if they are longer than LONGEST_NAME, a part of ``middle`` and its digest replace ``middle``."""
    name = begin + middle + end
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    kept = os.fsencode(middle)[:_KEPT].decode(errors="ignore")
    return f"{begin}{kept}.{hashlib.sha256(os.fsencode(middle)).hexdigest()[:16]}{end}"


def beside(path: Path) -> Path:
    """Returns the path of a checkpoint while it is written: a hidden name in the same folder."""
    return path.with_name(_short_name(".", path.name, ".writing"))


def aside(path: Path) -> Path:
    """Returns the path of an old checkpoint while a new one replaces it.

    The name begins and ends like ``path``, so that ``ckpt_path="last"`` finds the old checkpoint after a crash.
    """
    stem, suffix = (path.stem, path.suffix) if len(os.fsencode(path.suffix)) < _KEPT else (path.name, "")
    return path.with_name(_short_name("", stem, f".replaced{suffix}"))


def remove(path: Path) -> None:
    """Removes a file or folder, if it exists. Of a link only the link is removed."""
    if path.is_dir() and not path.is_symlink():
        # Renamed first: a crash while it is removed must not leave half a folder under the name of a checkpoint.
        going = path.with_name(_short_name(".", path.name, ".removing"))
        shutil.rmtree(going, ignore_errors=True)  # left by such a crash
        os.rename(path, going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def put_in_place(path: Path) -> None:
    """Renames a checkpoint from :func:`beside` to its path."""
    new, old = beside(path), aside(path)
    if path.exists() and (path.is_dir() or new.is_dir()):
        # No call of every file system replaces a folder. A crash between the two renames leaves the old one at `aside`.
        remove(old)
        os.rename(path, old)
    os.replace(new, path)
    remove(old)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path at which a new file or folder is written. It takes the place of ``path`` when it is complete, or is removed."""
    new = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        remove(new)  # a file of a killed process, or a link, which must not be followed
        yield new
        for file in new.iterdir() if new.is_dir() else (new,):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        put_in_place(path)
    except BaseException:
        remove(new)  # it may fill the disk
        raise


def in_place(path: Path) -> Path:
    """Returns the path of the last complete checkpoint of this name."""
    return aside(path) if aside(path).exists() and not path.exists() else path


# -- checksums ---------------------------------------------------------------------------------------------------------


def what_is_broken(file: Path | IO[bytes]) -> str | None:
    """Describes the damage of a file that ``torch.save`` has written; None if its checksums match, or if it has none.

    The file is a zip archive with a CRC-32 of each record. ``torch.load`` ignores them, so a byte that changed on disk would become a
    wrong weight. Reads the file once, at about the speed of ``torch.load``.
    """
    try:
        if not zipfile.is_zipfile(file):  # an earlier format of torch, or truncated: loading reports that
            return None
        with zipfile.ZipFile(file) as archive:
            if not any(record.CRC for record in archive.infolist()):  # torch was configured to compute none
                return None
            record = archive.testzip()
    except Exception as error:  # of any type, because the table of records may be damaged too
        return f"its table of records changed on disk: {error}"
    return None if record is None else f"its record {record!r} changed on disk: the checksum differs"


def refuse_broken(path: Any, broken: str | None) -> None:
    """Refuses a damaged file.

    Args:
        path: of the file, for the error.
        broken: from :func:`what_is_broken`.

    Raises:
        CheckpointError: there is damage.
    """
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: {broken}. Load another checkpoint, or copy this one again from an intact source")


def refuse_damaged(path: Path, *, read_here: bool) -> None:
    """Compares a checkpoint file with its checksums. Collective.

    Args:
        path: the file.
        read_here: whether this rank reads it; one rank of each machine must.

    Raises:
        CheckpointError: on every rank, if the file is damaged on one machine.
    """
    broken = all_gather_objects(what_is_broken(path) if read_here else None)
    refuse_broken(path, next(filter(None, broken), None))


# -- one file ----------------------------------------------------------------------------------------------------------


LIGHTNING_SAVE = TorchCheckpointIO.save_checkpoint
"""As it was at import: a user, or a test, may put another function in its place."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's ``TorchCheckpointIO``, except that a crash while a local file is written leaves the previous checkpoint."""

    @staticmethod
    def takes_options() -> bool:
        """Whether saving with ``storage_options`` is not an error. Lightning's own function refuses them; one in its place may not."""
        return TorchCheckpointIO.save_checkpoint is not LIGHTNING_SAVE

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not is_local(path) or TorchCheckpointIO.save_checkpoint is not LIGHTNING_SAVE:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        with replacing(Path(path)) as new, new.open("xb") as file:
            torch.save(checkpoint, file)

    def remove_checkpoint(self, path: Any) -> None:
        if is_local(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


def compact(checkpoint: Any, *, copy: bool) -> Any:
    """Copies the tensors that are views of a larger storage, because torch.save would write all of it. Tied tensors stay tied.

    Args:
        checkpoint: nested dictionaries, lists and tuples.
        copy: copy every tensor, to the CPU.
    """
    copies: dict[Any, Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            new = shallow_copy(value)  # a state_dict has attributes beside its items
            new.update({key: convert(item) for key, item in value.items()})
            return new
        if type(value) in (list, tuple):
            return type(value)(convert(item) for item in value)
        return convert_tensor(value) if isinstance(value, Tensor) else value

    def convert_tensor(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or not (copy or tensor.untyped_storage().nbytes() > tensor.nbytes):
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True) if copy else tensor.detach().clone()
        return copies[key]

    return convert(checkpoint)


def load_trusting(weights_only: bool, path: Any, load: Callable[[], Any]) -> Any:
    """Calls ``load`` and returns its result.

    Args:
        weights_only: whether ``load`` refuses objects whose loading may run code.
        path: of the checkpoint, for the error.
        load: reads the checkpoint.

    Raises:
        CheckpointError: the checkpoint holds such objects and ``weights_only`` is set; or it cannot be read.
    """
    try:
        return load()
    except CheckpointError:
        raise
    except (RuntimeError, EOFError) as error:
        message = str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it may be truncated: {message}. Load another checkpoint") from error
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise CheckpointError(f"{path} cannot be read: {error}. Load another checkpoint") from error
        match = re.search(r"GLOBAL (\S+)", str(error))
        name = match.group(1).rstrip(",") if match else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and plain values: {name}. Loading it may run code in the file. If you trust the file, "
            "pass weights_only=False (trainer.fit(..., ckpt_path=..., weights_only=False))"
        ) from error


def load_file(checkpoint_io: CheckpointIO, path: Any, *, weights_only: bool) -> dict[str, Any]:
    """Reads a checkpoint file.

    Raises:
        CheckpointError: as in :func:`load_trusting`.
    """
    return load_trusting(weights_only, path, lambda: checkpoint_io.load_checkpoint(path, weights_only=weights_only))


def load_lazily(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """As :func:`load_file`, for a local file. Tensors are mapped, and take memory only when they are read."""
    return load_trusting(weights_only, path, lambda: torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only))


# -- background saves -------------------------------------------------------------------------------------------------------


class Saves:
    """Runs saves, and actions that depend on them, in order: at once or on a thread. A failure of one rank is an error on all."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._path: Any = None

    def run(self, prepare: Callable[[], Callable[[], None]], path: Any, *, background: bool) -> None:
        """Waits for earlier saves, and starts one. Collective.

        Args:
            prepare: collects the state, and returns a function that writes it.
            path: of the checkpoint, for the error.
            background: write on a thread, while training continues.

        Raises:
            CheckpointError: on every rank, if an earlier save, ``prepare``, or a write that is not in the background failed on one.
        """
        self.wait()
        self._path = path
        writes: list[Callable[[], None]] = []
        self._agree(_outcome(lambda: writes.append(prepare())))
        if background:
            self._submit(writes[0])
        else:
            self._agree(_outcome(writes[0]))

    def then(self, action: Callable[[], None]) -> None:
        """Runs an action after the save under way, if it succeeds: the action may remove the last complete checkpoint."""
        if self._running:
            self._submit(action)
        else:
            action()

    def wait(self) -> None:
        """Waits until all saves and actions are done. Collective.

        Raises:
            CheckpointError: on every rank, if one of them failed on one.
        """
        if self._running:  # on all ranks or on none
            self._agree(self._finish())

    def close(self) -> None:
        """Waits without the other ranks, which may have ended; warns of an error."""
        error = self._finish()
        if error is not None:
            rank_zero_warn(f"the checkpoint {self._path} was not written: {error!r}")

    def _submit(self, action: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        earlier = tuple(self._running)

        def run_unless_failed() -> None:
            if all(future.exception() is None for future in earlier):
                action()

        self._running.append(self._thread.submit(run_unless_failed))

    def _finish(self) -> BaseException | None:
        running, self._running = self._running, []
        errors = [future.exception() for future in running]
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return next((error for error in errors if error is not None), None)

    def _agree(self, error: BaseException | None) -> None:
        messages = all_gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        failures = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failures:
            raise CheckpointError(f"the checkpoint {self._path} was not written. {failures[0]}") from error


def _outcome(action: Callable[[], None]) -> BaseException | None:
    """Runs an action; returns its error, or None."""
    try:
        action()
    except Exception as error:
        return error
    return None
