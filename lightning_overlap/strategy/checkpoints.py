"""Saves and loads a sharded model: modes assemble the unsharded state on rank 0, or each rank writes its part."""

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
from lightning_overlap.state.sharded import SavedOptimizer, ShardedCheckpoints, is_folder, local_state, parameter_names
from lightning_overlap.strategy.state_guard import StateGuard


class Checkpoints:
    """Saves and loads the state of the model and the optimizers. The strategy's checkpoint hooks call it.

    Args:
        layout: ``"full"``: one file in Lightning's format; ``"sharded"``: a folder in which each rank writes its part.
        in_background: write while training continues.
        timeout: how long a rank waits for the others while a folder is written.

    Attributes:
        training: whether training is under way.
        state_guard: while the model is sharded: refuses the user's calls of ``state_dict()``.
    """

    def __init__(self, layout: Literal["full", "sharded"], in_background: bool, timeout: timedelta) -> None:
        if layout not in ("full", "sharded"):
            raise ConfigError(f"state_dict_type must be full or sharded, got {layout!r}")
        self._modes: Sequence[OverlapMode] = ()
        self._holders: Sequence[Holder] = ()
        self._optimizer_holders: Sequence[OptimizerHolder] = ()
        self.state_guard: StateGuard | None = None
        self.layout = layout
        self.in_background = in_background
        self.training = False
        self._is_sharded = layout == "sharded"
        self._known_parts: Parts | None = None
        self._saves = Saves()
        self._sharded = ShardedCheckpoints(timeout)
        self._deferred_state: dict[str, Any] | None = None
        """The loaded ``state_dict`` of a model without memory, until it gets memory."""

    def use(self, modes: Sequence[OverlapMode], mesh: ParallelMesh) -> None:
        """Sets the modes that hold the state, in the order in which they were applied. Call it before a save."""
        self._modes = modes
        self._holders = [mode for mode in modes if isinstance(mode, Holder)]
        self._optimizer_holders = [mode for mode in modes if isinstance(mode, OptimizerHolder)]
        self._known_parts = Parts(self._holders, mesh)

    @property
    def _parts(self) -> Parts:
        assert self._known_parts is not None, "the strategy's setup calls use()"
        return self._known_parts

    def wait(self) -> None:
        """Waits until the save under way is complete. Collective."""
        self._saves.wait()

    def close(self, *, complete: bool) -> None:
        """Closes the connections and drops loaded state.

        Args:
            complete: False after a failure, when a transfer may be under way.
        """
        self._deferred_state = None
        self.training = False
        self._saves.close()
        self._sharded.close(complete=complete)

    def _sync_parameters(self) -> None:
        for mode in self._modes:
            mode.sync_parameters()

    def _state_of(self, module: nn.Module) -> dict[str, Any]:
        """Returns the module's ``state_dict()``, in which this rank may have a part only."""
        with self.state_guard.allowed() if self.state_guard is not None else contextlib.nullcontext():
            return module.state_dict()

    # -- save -----------------------------------------------------------------------------------------------

    def model_state(self, module: nn.Module, samples: Group | None) -> dict[str, Any]:
        """Returns the module's ``state_dict()``: unsharded on rank 0; this rank's part, if checkpoints are sharded. Collective.

        Args:
            module: the user's module.
            samples: ranks that hold the same parameters and see different data; None if there is one rank.
        """
        self._sync_parameters()
        if self._is_sharded:
            share(module.buffers(), samples)  # every rank writes some of them
        state = self._state_of(module)
        for mode in () if self._is_sharded else reversed(self._holders):  # the last mode sharded the smallest parts
            state = mode.gather_model_state(state)
        return state

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, unsharded: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns an optimizer's state: unsharded on rank 0; this rank's part, if checkpoints are sharded. Collective.

        Args:
            module: the user's module.
            optimizer: the user's optimizer.
            unsharded: returns the state of an optimizer that no mode shards.
        """
        if self._is_sharded:
            return local_state(optimizer, self._optimizer_shards(optimizer), parameter_names(module), self._parts)
        states = (state for mode in self._optimizer_holders if (state := mode.optimizer_state(optimizer)) is not None)
        state = next(states, None) or unsharded()
        for mode in reversed(self._holders):
            state = mode.gather_optimizer_state(optimizer, state)
        return state

    def _optimizer_shards(self, optimizer: Optimizer, saved: Any = None) -> dict[str, dict[str, Any]] | None:
        shards = (shards for mode in self._optimizer_holders if (shards := mode.optimizer_shards(optimizer, saved)) is not None)
        return next(shards, None)

    def save(self, checkpoint: dict[str, Any], path: Any, io: CheckpointIO, options: Any | None) -> None:
        """Writes Lightning's checkpoint. Collective.

        Args:
            checkpoint: with the states from :meth:`model_state` and :meth:`optimizer_state`.
            path: of the file or folder, the same on all ranks.
            io: writes a file.
            options: for the user's own ``CheckpointIO``.

        Raises:
            CheckpointError: on every rank, if one failed; a background save raises it at the next save.
            TypeError: options are set, and no ``CheckpointIO`` takes them.
        """
        if options is not None and (self._is_sharded or (type(io) is AtomicCheckpointIO and not io.takes_options())):
            raise TypeError("`storage_options` arg is not supported here: it needs a CheckpointIO of your own")

        background = self.in_background and self.training

        def prepare() -> Callable[[], None]:
            if is_local(path):
                # Before the thread starts, because ModelCheckpoint may make a link in this folder at once.
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            if self._is_sharded:
                return self._sharded.save(checkpoint, Path(path), self._parts, copy=background)
            if rank() != 0:
                return lambda: None
            return partial(io.save_checkpoint, compact(checkpoint, copy=background), path, storage_options=options)

        self._saves.run(prepare, path, background=background)

    def remove(self, remove: Callable[[], None]) -> None:
        """Removes an old checkpoint after the save under way, because ModelCheckpoint asks for it before the new one is complete."""
        self._saves.then(remove)

    # -- load --------------------------------------------------------------------------------------------------------
    # Before setup, which is Lightning's default: after setup it would ignore the user's weights_only.

    def load(
        self, path: Any, module: nn.Module, io: CheckpointIO, *, weights_only: bool, in_fit: bool, first_on_machine: bool
    ) -> dict[str, Any]:
        """Reads a checkpoint, a file or a folder, written by any number of ranks. Collective.

        Args:
            path: the same on all ranks.
            module: the user's module.
            io: reads a file.
            weights_only: refuse objects whose loading may run code.
            in_fit: whether the model is sharded now.
            first_on_machine: whether this rank compares checksums for the ranks of its machine.

        Raises:
            CheckpointError: it is incomplete or damaged; or it holds objects whose loading may run code, and ``weights_only`` is set.
        """
        self._saves.wait()
        if not in_fit:
            move_absent_to_meta(module)
        if is_local(path):
            path = in_place(Path(path))
            if is_folder(path):
                self._sync_parameters()
                return self._sharded.load(path, self._state_of(module), weights_only=weights_only)
            refuse_damaged(path, read_here=first_on_machine)
            if is_deferred(module) and type(io) is AtomicCheckpointIO:
                return load_lazily(path, weights_only=weights_only)
        return load_file(io, path, weights_only=weights_only)

    def load_model(self, state: dict[str, Any], module: nn.Module, *, strict: bool, in_fit: bool) -> None:
        """Loads a model's state from :meth:`load`.

        Args:
            state: by name.
            module: the user's module.
            strict: as in ``load_state_dict``.
            in_fit: whether the model is sharded now.

        Raises:
            ConfigError: this rank has only its part of the model.
        """
        self._sync_parameters()
        present = self._state_of(module) if in_fit else {}
        is_sharded = any(name in present and present[name].shape != value.shape for name, value in state.items())
        if in_fit and (is_sharded or is_deferred(module)):
            raise ConfigError(
                "cannot load weights during a fit (a Tuner does, after lr_find or scale_batch_size), because this rank has only its "
                "part of the model. Run the Tuner in one process, or load by trainer.fit(..., ckpt_path=...)"
            )
        with warnings.catch_warnings():
            if is_deferred(module):  # checks the names; the values are loaded when there is memory
                warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
                self._deferred_state = state
            module.load_state_dict(state, strict=strict)
        for mode in self._modes:
            mode.adopt_parameters()

    def load_deferred(self, module: nn.Module, holds: Callable[[str], bool]) -> None:
        """Loads this rank's part of a checkpoint whose model had no memory in :meth:`load_model`. Collective."""
        state, self._deferred_state = self._deferred_state, None
        if state is None:
            return
        held = {name: value for name, value in state.items() if holds(name)}
        targets = module.state_dict()
        on_disk = {name for name, value in held.items() if isinstance(value, Tensor) and value.is_meta}
        self._sharded.read({name: targets[name] for name in on_disk})
        module.load_state_dict({name: value for name, value in held.items() if name not in on_disk}, strict=False)

    def load_optimizers(self, states: Sequence[Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Loads the states of optimizers from :meth:`load`. Collective."""
        if len(states) < len(optimizers):
            rank_zero_warn(
                f"the checkpoint has the state of {len(states)} optimizers, and the module has {len(optimizers)}. The others start "
                "without state, such as moments"
            )
        for optimizer, state in zip(optimizers, states, strict=False):
            if isinstance(state, SavedOptimizer):
                allocate = partial(self._optimizer_shards, optimizer)
                self._sharded.load_optimizer(state, optimizer, parameter_names(module), self._parts, allocate)
                continue
            for holder in self._holders:
                state = holder.local_optimizer_state(optimizer, state)
            if not any(mode.load_optimizer_state(optimizer, state) for mode in self._optimizer_holders):
                optimizer.load_state_dict(state)
        for mode in self._modes:
            mode.adopt_parameters()
