"""What this machine, torch, the backend and the run offer: the input of the plan, besides the configuration."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata

import lightning
import torch


@dataclass(frozen=True)
class OptimizerFacts:
    """What an optimizer does, as :func:`lightning_overlap.strategy.probe.examine` found it."""

    name: str
    independent: bool
    elementwise: bool
    separable: bool
    reason: str
    known: bool = True
    """False: it refuses to be tried, and ``reason`` has its own words."""
    methods: tuple[str, ...] = ()
    """Its own public methods, beside the step, that read its state."""


def versions() -> dict[str, str]:
    """The versions that decide numbers and formats."""
    return {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}


def installed(package: str) -> str | None:
    """A package's version, without importing it; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class TensorFacts:
    """What can be cut over a tensor axis: in words, the modules in the blocks that may mix tokens, the vocabulary's entries, layers
    whose weight is ``(in, out)``, and the parameters that the blocks share with the rest of the model."""

    said: str
    loose: tuple[str, ...]
    entries: int
    transposed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineFacts:
    """What the stages of a pipeline hold."""

    name: str
    """Of the list of blocks."""
    blocks: tuple[int, ...]
    """By stage, how many."""
    work: tuple[int, ...]
    """By stage, elements of the matrices that a token is multiplied by."""
    head_work: int
    """Of these, those of the last stage's linear layers after the blocks, whose weights' gradients can come later."""
    split: float = 0.0
    """The part of the blocks' trained elements whose gradients a split backward leaves for later."""
    unsplit: tuple[str, ...] = ()
    """Classes of the modules with matrices whose gradients it cannot leave."""


@dataclass(frozen=True)
class Facts:
    """Facts about a run. ``optimizers`` and ``parameters`` are None until the model is known."""

    world_size: int
    device: str = "cpu"
    backend: str = "gloo"
    versions: dict[str, str] = field(default_factory=versions)
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    automatic_optimization: bool = True
    gradient_readers: tuple[str, ...] = ()
    clippers: tuple[str, ...] = ()
    """Hooks of the user's that clip gradients by a norm of their own."""
    unfreezers: tuple[str, ...] = ()
    averagers: tuple[str, ...] = ()
    compiled: bool = False
    deferred: bool = False
    """The model was made on the meta device."""
    optimizers: tuple[OptimizerFacts, ...] | None = None
    parameters: int | None = None
    pipeline: PipelineFacts | None = None
    """None: the model is not known, or there is no pipeline."""
    tensor: TensorFacts | None = None
    """None: the model is not known, or not to be cut over a tensor axis."""
    transformer_engine: str | None = field(default_factory=lambda: installed("transformer-engine"))
    """Its version; None if it is not installed."""
