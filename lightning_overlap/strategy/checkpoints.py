"""Checkpoints of a model that ranks hold parts of: the state is put together from the modes' parts, or written part by part."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.materialize import is_deferred, move_absent_to_meta
from lightning_overlap.modes.base import Holder, OptimizerHolder, OverlapMode
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.shared_state import share
from lightning_overlap.ranks.world import rank
from lightning_overlap.state.checkpoint import (
    AtomicCheckpointIO,
    Saves,
    compact,
    in_place,
    is_local,
    load_file,
    load_lazily,
    refuse_damaged,
)
from lightning_overlap.state.parts import Parts
from lightning_overlap.state.sharded import Folders, SavedOptimizer, describe, is_folder, names_of
from lightning_overlap.strategy.whole_state import WholeStateOnly


class Checkpoints:
    """Saves and loads the state of the model and the optimizers. The strategy's checkpoint hooks end here.

    Args:
        layout: ``"full"``: one file, in Lightning's format; ``"sharded"``: a folder in which each rank writes its part.
        in_background: write while training goes on.
        timeout: how long a rank waits for the others while a folder is written.

    Attributes:
        training: whether training goes on.
        whole_state: while the model is cut: refuses the user's calls of ``state_dict()``.
    """

    def __init__(self, layout: Literal["full", "sharded"], in_background: bool, timeout: timedelta) -> None:
        if layout not in ("full", "sharded"):
            raise ConfigError(f"state_dict_type={layout!r}: it is 'full' or 'sharded'")
        self._modes: Sequence[OverlapMode] = ()
        self._holders: Sequence[Holder] = ()
        self._optimizer_holders: Sequence[OptimizerHolder] = ()
        self.whole_state: WholeStateOnly | None = None
        self.layout = layout
        self.in_background = in_background
        self.training = False
        self._is_sharded = layout == "sharded"
        self._known_parts: Parts | None = None
        self._saves = Saves()
        self._folders = Folders(timeout)
        self._waiting: dict[str, Any] | None = None
        """A model's part of a checkpoint, until there is memory for it."""

    def use(self, modes: Sequence[OverlapMode], mesh: ParallelMesh) -> None:
        """Takes the modes that hold the state from now on, in the order of cutting; to be called before anything is saved."""
        self._modes = modes
        self._holders = [mode for mode in modes if isinstance(mode, Holder)]
        self._optimizer_holders = [mode for mode in modes if isinstance(mode, OptimizerHolder)]
        self._known_parts = Parts(self._holders, mesh)

    @property
    def _parts(self) -> Parts:
        assert self._known_parts is not None, "the strategy's setup calls use()"
        return self._known_parts

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete. Collective."""
        self._saves.wait()

    def close(self, *, complete: bool) -> None:
        """Ends the connections and forgets what was loaded.

        Args:
            complete: False after a failure, when a transfer may be in the middle.
        """
        self._waiting = None
        self.training = False
        self._saves.close()
        self._folders.close(complete=complete)

    def _sync_parameters(self) -> None:
        for mode in self._modes:
            mode.sync_parameters()

    def _state_of(self, module: nn.Module) -> dict[str, Any]:
        """The module's ``state_dict()``, of which this rank may have a part."""
        with self.whole_state.allowed() if self.whole_state is not None else contextlib.nullcontext():
            return module.state_dict()

    # -- what is saved -----------------------------------------------------------------------------------------------

    def model_state(self, module: nn.Module, samples: Group | None) -> dict[str, Any]:
        """The module's ``state_dict()``: whole on rank 0, or this rank's part of it where checkpoints are sharded. Collective.

        Args:
            module: the user's.
            samples: ranks that hold the same of the model and see different data; None: this rank is the only one.
        """
        self._sync_parameters()
        if self._is_sharded:
            share(module.buffers(), samples)  # every rank writes a part of them
        state = self._state_of(module)
        for mode in () if self._is_sharded else reversed(self._holders):  # put together in the reverse of the order of cutting
            state = mode.whole_model(state)
        return state

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, unsharded: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An optimizer's state: whole on rank 0, or this rank's part of it where checkpoints are sharded. Collective.

        Args:
            module: the user's.
            optimizer: the user's.
            unsharded: gives the state of an optimizer that no mode shards.
        """
        if self._is_sharded:
            return describe(optimizer, self._optimizer_shards(optimizer), names_of(module), self._parts)
        states = (state for mode in self._optimizer_holders if (state := mode.optimizer_state(optimizer)) is not None)
        whole = next(states, None) or unsharded()
        for mode in reversed(self._holders):
            whole = mode.whole_optimizer(optimizer, whole)
        return whole

    def _optimizer_shards(self, optimizer: Optimizer, saved: Any = None) -> dict[str, dict[str, Any]] | None:
        shards = (shards for mode in self._optimizer_holders if (shards := mode.optimizer_shards(optimizer, saved)) is not None)
        return next(shards, None)

    def save(self, checkpoint: dict[str, Any], path: Any, io: CheckpointIO, options: Any | None) -> None:
        """Writes Lightning's checkpoint. Collective.

        Args:
            checkpoint: with the states that :meth:`model_state` and :meth:`optimizer_state` have given.
            path: of the file or the folder, the same on all ranks.
            io: writes a file.
            options: for a ``CheckpointIO`` of the user's.

        Raises:
            CheckpointError: on every rank, if one has failed; of a save in the background, at the next save.
            TypeError: there are options, and no ``CheckpointIO`` that takes them.
        """
        if options is not None and (self._is_sharded or type(io) is AtomicCheckpointIO):
            raise TypeError("storage_options are for a CheckpointIO of your own, and `storage_options` arg is not supported here")

        background = self.in_background and self.training

        def prepare() -> Callable[[], None]:
            if is_local(path):
                # Not with the rest on a thread: ModelCheckpoint may put a link beside the checkpoint at once.
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            if self._is_sharded:
                return self._folders.save(checkpoint, Path(path), self._parts, copy=background)
            if rank() != 0:
                return lambda: None
            return partial(io.save_checkpoint, compact(checkpoint, copy=background), path, storage_options=options)

        self._saves.run(prepare, path, background=background)

    def remove(self, remove: Callable[[], None]) -> None:
        """Removes an old checkpoint: ModelCheckpoint asks for that as soon as the next one is being saved."""
        self._saves.then(remove)

    # -- what is loaded ----------------------------------------------------------------------------------------------
    # Checkpoints are loaded before setup, Lightning's default: after it, Lightning would forget the user's weights_only.

    def load(
        self, path: Any, module: nn.Module, io: CheckpointIO, *, weights_only: bool, in_fit: bool, first_on_machine: bool
    ) -> dict[str, Any]:
        """Reads a checkpoint, from one file or from a folder, by whichever number of ranks it was written. Collective.

        Args:
            path: the same on all ranks.
            module: the user's.
            io: reads a file.
            weights_only: refuse objects whose loading may run code.
            in_fit: whether the model is cut.
            first_on_machine: this rank compares checksums for all of its machine.

        Raises:
            CheckpointError: it is not complete, or holds objects whose loading may run code, and ``weights_only``.
        """
        self._saves.wait()
        if not in_fit:
            move_absent_to_meta(module)
        if is_local(path):
            path = in_place(Path(path))
            if is_folder(path):
                self._sync_parameters()
                return self._folders.load(path, self._state_of(module), weights_only=weights_only)
            refuse_damaged(path, read_here=first_on_machine)
            if is_deferred(module) and type(io) is AtomicCheckpointIO:
                return load_lazily(path, weights_only=weights_only)
        return load_file(io, path, weights_only=weights_only)

    def load_model(self, state: dict[str, Any], module: nn.Module, *, strict: bool, in_fit: bool) -> None:
        """Loads a model's state that :meth:`load` has given.

        Args:
            state: by name.
            module: the user's.
            strict: as in ``load_state_dict``.
            in_fit: whether the model is cut.

        Raises:
            ConfigError: this rank has its part of the model only.
        """
        self._sync_parameters()
        present = self._state_of(module) if in_fit else {}
        is_cut = any(name in present and present[name].shape != value.shape for name, value in state.items())
        if in_fit and (is_cut or is_deferred(module)):
            raise ConfigError(
                "weights are loaded in the middle of a fit (a Tuner does, after lr_find or scale_batch_size), when this rank has its "
                "part of them only: find these values in a run of one process, or load by trainer.fit(..., ckpt_path=...)"
            )
        with warnings.catch_warnings():
            if is_deferred(module):  # names are checked here, values loaded once there is memory for them
                warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
                self._waiting = state
            module.load_state_dict(state, strict=strict)
        for mode in self._modes:
            mode.adopt_parameters()

    def load_waiting(self, module: nn.Module, holds: Callable[[str], bool]) -> None:
        """Loads what this rank holds of a checkpoint whose model had no memory when it was loaded. Collective."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        held = {name: value for name, value in waiting.items() if holds(name)}
        targets = module.state_dict()
        on_disk = {name for name, value in held.items() if isinstance(value, Tensor) and value.is_meta}
        self._folders.read({name: targets[name] for name in on_disk})
        module.load_state_dict({name: value for name, value in held.items() if name not in on_disk}, strict=False)

    def load_optimizers(self, states: Sequence[Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Loads the states of optimizers that :meth:`load` has given. Collective."""
        if len(states) < len(optimizers):
            rank_zero_warn(
                f"the checkpoint has the state of {len(states)} optimizers, and the module has {len(optimizers)}: those without "
                "go on as new ones, without the moments that they had"
            )
        for optimizer, state in zip(optimizers, states, strict=False):
            if isinstance(state, SavedOptimizer):
                room = partial(self._optimizer_shards, optimizer)
                self._folders.load_optimizer(state, optimizer, names_of(module), self._parts, room)
                continue
            for holder in self._holders:
                state = holder.local_optimizer(optimizer, state)
            if not any(mode.load_optimizer_state(optimizer, state) for mode in self._optimizer_holders):
                optimizer.load_state_dict(state)
        for mode in self._modes:
            mode.adopt_parameters()
