"""What this machine, torch, the backend, the run and the model offer: the input of the plan, besides the configuration.

Standard library only: modes read facts, and know neither Lightning nor each other.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerFacts:
    """What an optimizer does, as :func:`lightning_overlap.strategy.probe.examine` found it.

    Attributes:
        name: of its class.
        independent: it updates each parameter without a look at the others.
        elementwise: it updates each element without a look at the others.
        separable: it may step a part of its parameters at a time.
        reason: why, as a sentence.
        known: False if it refuses to be tried; ``reason`` then has its error.
        methods: its public methods, beside the step, that read its state.
    """

    name: str
    independent: bool
    elementwise: bool
    separable: bool
    reason: str
    known: bool = True
    methods: tuple[str, ...] = ()


def installed(package: str) -> str | None:
    """A package's version, without importing it; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions that decide numbers and formats."""
    return {"python": platform.python_version(), "torch": installed("torch"), "lightning": installed("lightning")}


@dataclass(frozen=True)
class Facts:
    """Facts about a run.

    Attributes:
        world_size: ranks in all.
        device: type of the device, ``"cpu"`` or ``"cuda"``.
        backend: of the process group, ``"gloo"`` or ``"nccl"``.
        versions: of Python and packages.
        precision: as in Lightning's Trainer.
        gradient_clip_val: as in Lightning's Trainer.
        automatic_optimization: as in the LightningModule.
        gradient_readers: hooks that may read or change gradients.
        clippers: hooks of the user's that clip gradients by a norm that they compute.
        unfreezers: callbacks that give the optimizer parameters while training.
        averagers: callbacks that average weights.
        compiled: the module is compiled by ``torch.compile``.
        deferred: the model was made on the meta device.
        optimizers: None until the model is known.
        parameters: trained elements of the whole model; None until it is known.
        transformer_engine: its version; None if it is not installed.
        of_modes: what each mode looked for in the model, an object of the mode's class; empty until the model is known.
    """

    world_size: int
    device: str = "cpu"
    backend: str = "gloo"
    versions: dict[str, str | None] = field(default_factory=versions)
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    automatic_optimization: bool = True
    gradient_readers: tuple[str, ...] = ()
    clippers: tuple[str, ...] = ()
    unfreezers: tuple[str, ...] = ()
    averagers: tuple[str, ...] = ()
    compiled: bool = False
    deferred: bool = False
    optimizers: tuple[OptimizerFacts, ...] | None = None
    parameters: int | None = None
    transformer_engine: str | None = field(default_factory=lambda: installed("transformer-engine"))
    of_modes: tuple[object, ...] = ()

    def of(self, kind: type[T]) -> T | None:
        """A mode's facts about the model, by their class; None if the model is not known, or the mode has nothing to do."""
        return next((facts for facts in self.of_modes if isinstance(facts, kind)), None)
