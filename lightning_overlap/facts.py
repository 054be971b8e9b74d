"""Facts about the machine, torch, the backend, the run and the model: with the configuration, the input of the plan.

Standard library only: modes read facts, and know neither Lightning nor each other.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class StateSize(NamedTuple):
    """The state that an optimizer keeps for each element of a matrix.

    Attributes:
        numbers: how many of the parameter's dtype, such as 2 of Adam.
        nbytes: bytes of all other dtypes, such as 2.1 of an Adam of 8 bits.
    """

    numbers: float
    nbytes: float

    def of(self, itemsize: int) -> float:
        """Bytes for each element of a parameter whose elements take ``itemsize`` bytes."""
        return self.numbers * itemsize + self.nbytes


@dataclass(frozen=True)
class OptimizerFacts:
    """Properties of an optimizer that :func:`lightning_overlap.strategy.probe.examine` has found.

    Attributes:
        name: of its class.
        independent: the update of a parameter depends on no other parameter.
        elementwise: the update of an element depends on no other element.
        separable: a step may update some of its parameters at a time.
        reason: the finding, as a sentence.
        known: False if it failed on test matrices; ``reason`` then has its error.
        methods: its public methods, beside the step, that read its state.
        state: what it keeps for each element of a matrix; None if that is not known.
    """

    name: str
    independent: bool
    elementwise: bool
    separable: bool
    reason: str
    known: bool = True
    methods: tuple[str, ...] = ()
    state: StateSize | None = None


def installed(package: str) -> str | None:
    """Returns a package's version, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that decide numbers and formats."""
    return {"python": platform.python_version(), "torch": installed("torch"), "lightning": installed("lightning")}


@dataclass(frozen=True)
class Facts:
    """Facts about a run. The class has more than 15 attributes, because every mode reads other ones.

    Attributes:
        world_size: number of ranks.
        device: type of the device, ``"cpu"`` or ``"cuda"``.
        backend: of the process group, ``"gloo"`` or ``"nccl"``.
        versions: of Python and packages.
        precision: as in Lightning's Trainer.
        gradient_clip_val: as in Lightning's Trainer.
        automatic_optimization: as in the LightningModule.
        gradient_readers: hooks that may read or change gradients.
        clippers: the user's hooks that compute a norm of gradients and clip by it.
        unfreezers: callbacks that add parameters to the optimizer during training.
        averagers: callbacks that average weights.
        compiled: the module is compiled by ``torch.compile``.
        deferred: the model was made on the meta device.
        optimizers: None until the model is known.
        parameters: trainable elements of the unsharded model; None until it is known.
        transformer_engine: its version; None if it is not installed.
        deep_ep: whether the package of that name is installed.
        of_modes: for each mode, an object of its class with its facts about the model; empty until the model is known.
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
    deep_ep: bool = field(default_factory=lambda: find_spec("deep_ep") is not None)
    of_modes: tuple[object, ...] = ()

    def of(self, kind: type[T]) -> T | None:
        """Returns a mode's facts about the model, by their class; None if the model is not known, or the mode has nothing to do."""
        return next((facts for facts in self.of_modes if isinstance(facts, kind)), None)


@dataclass(frozen=True)
class Room:
    """What limits a choice of sizes, beside the model.

    Attributes:
        ranks_per_host: ranks that share a host.
        samples: samples in a rank's batch, as configured; None if that is not known.
    """

    ranks_per_host: int
    samples: int | None
