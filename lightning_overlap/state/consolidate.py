"""Makes one file of a sharded checkpoint, in one process without ranks, with little memory.

Tensors are read into a temporary file that is mapped into memory: the system writes its pages out when memory is short.
"""

from __future__ import annotations

import mmap
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from stat import S_IMODE
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.state.checkpoint import AtomicCheckpointIO, CheckpointError, replacing
from lightning_overlap.state.dcp import FolderReader
from lightning_overlap.state.sharded import SavedOptimizer, ShardedCheckpoints, is_folder

ALIGNMENT = 64
"""Tensors begin at a multiple of this number of bytes."""


def consolidate(folder: Path, output: Path, *, prefix: str = "", weights_only: bool = True) -> None:
    """Writes a sharded checkpoint as one file, and says what it wrote. A crash leaves the file that was there before.

    Args:
        folder: written with ``state_dict_type="sharded"``.
        output: a file that ends with ``.safetensors`` gets the weights only; any other file gets Lightning's checkpoint, with the
            states of optimizers. A folder is made for a path without an ending: weights in files of up to 5 GB, as Hugging Face's
            ``save_pretrained`` names them. ``from_pretrained`` also needs the model's ``config.json``, which no checkpoint has.
        prefix: of the names of the weights to write; it is removed from the names. ``model.`` writes a Hugging Face model that is the
            attribute ``model`` of the module. For weights only.
        weights_only: refuse objects whose loading may run code.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, is damaged, or has no weights with this prefix; or the output is a
            folder that is not empty.
        ConfigError: a prefix is set for Lightning's checkpoint.
    """
    if not is_folder(folder):
        raise CheckpointError(f"{folder} is not a sharded checkpoint: {_what_else(folder)}")
    if output.is_dir() and any(output.iterdir()):
        raise CheckpointError(f"{output} is a folder that is not empty, and would be replaced. Choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    as_weights = output.suffix in ("", ".safetensors")
    if prefix and not as_weights:
        raise ConfigError(f"prefix={prefix!r} is for weights only: write {output.with_suffix('.safetensors')}, or leave prefix out")
    reader = FolderReader(folder)
    with _mapped(dict(reader.tensors("" if not as_weights else "model.")), output.parent) as tensors:
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        checkpoint = ShardedCheckpoints(timedelta(minutes=30)).load(folder, weights, weights_only=weights_only)
        if as_weights:
            count = _write_weights(checkpoint["state_dict"], output, prefix)
        else:
            checkpoint["optimizer_states"] = [_numbered(state, tensors) for state in checkpoint.get("optimizer_states", ())]
            AtomicCheckpointIO().save_checkpoint(checkpoint, output)
            count = len(tensors)
    nbytes = sum(file.stat().st_size for file in (output.iterdir() if output.is_dir() else (output,)))
    log_on_rank_zero(f"wrote {output}: {count} tensors, {nbytes / 1e6:.1f} MB, of step {checkpoint['global_step']}")
    if not output.suffix:
        module = f"module.{prefix}".rstrip(".")
        log_on_rank_zero(
            f"from_pretrained also needs {output}/config.json: {module}.config.save_pretrained({str(output)!r}) writes it"
        )


def _what_else(path: Path) -> str:
    """Says what a path is that is no folder."""
    if not path.exists():
        return "it does not exist"
    one_file = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
    return "it is one file already" if one_file else "it is no folder"


@contextmanager
def _mapped(entries: Mapping[str, Tensor], folder: Path) -> Iterator[dict[str, Tensor]]:
    """Gives each tensor on the meta device memory in a temporary file. The file is removed at the end."""
    offsets, size = {}, 0
    for name, entry in entries.items():
        offsets[name] = size
        size += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(max(size, 1))
        memory = mmap.mmap(file.fileno(), 0)
        # Each tensor has a storage of its own: torch.save writes complete storages.
        yield {
            name: torch.frombuffer(memory, dtype=entry.dtype, count=entry.numel(), offset=offsets[name]).view(entry.shape)
            if entry.numel()
            else torch.empty(entry.shape, dtype=entry.dtype)
            for name, entry in entries.items()
        }


def _numbered(saved: SavedOptimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state in the form of ``torch.optim.Optimizer.state_dict``, read into ``tensors``."""
    state, fqns = saved.entries()
    ShardedCheckpoints.read_into(saved.reader, {fqn: tensors[fqn] for fqn in fqns.values()})
    numbers = {name: n for n, name in enumerate(name for group in saved.param_groups for name in group["params"])}
    return {
        "state": {
            numbers[name]: {key: tensors[fqns[name, key]] if (name, key) in fqns else value for key, value in values.items()}
            for name, values in state.items()
        },
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved.param_groups],
    }


def _write_weights(state: Mapping[str, Any], output: Path, prefix: str) -> int:
    """Writes the weights whose names begin with a prefix, and returns their number."""
    from huggingface_hub import save_torch_state_dict  # both come with transformers
    from safetensors.torch import save_file

    weights = {name.removeprefix(prefix): x for name, x in state.items() if isinstance(x, Tensor) and name.startswith(prefix)}
    if not weights:
        beginnings = sorted({name.partition(".")[0] + "." for name in state})
        raise CheckpointError(f"no weight's name begins with {prefix!r}; names begin with {', '.join(beginnings)}")
    with replacing(output) as new:
        new.touch()
        mode = S_IMODE(new.stat().st_mode)  # by the umask; safetensors' files are for their owner only
        if output.suffix:
            save_file(weights, new, metadata={"format": "pt"})
        else:
            new.unlink()
            new.mkdir()
            save_torch_state_dict(weights, new)
        for file in new.iterdir() if new.is_dir() else (new,):
            file.chmod(mode)
    return len(weights)
