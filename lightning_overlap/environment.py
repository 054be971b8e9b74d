"""Environment variables that a plan wants on CUDA, set before it starts. No number depends on them. Standard library only.

What is set already stays, whoever has set it: the user, or a mode that comes before another in the order of modes.
"""

from __future__ import annotations

import subprocess
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig

BLACKWELL = 10
"""The first compute capability (major) whose kernels on several hardware queues start in the order of their launch."""


@dataclass(frozen=True)
class Setting:
    """What a mode wants a variable to be, and why."""

    variable: str
    value: str
    why: str


def wanted(config: OverlapConfig, capability: int | None) -> list[Setting]:
    """What the modes want, in their order.

    Args:
        config: what was asked for.
        capability: the device's, major; None if it is not known.
    """
    found = []
    if config.pipeline_parallel.size > 1 and config.overlap != "off":
        why = "pipeline_parallel: on a queue of its own, a receive that is posted ahead has nothing stand behind it"
        found.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "32", why))
    tensor = config.tensor_parallel.size > 1 and config.overlap != "off"
    if tensor and capability is not None and capability < BLACKWELL:
        why = "tensor_parallel: a transfer that is launched before a product also starts before it takes the device"
        found.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", why))
    if tensor and config.tensor_parallel.backend == "userbuffers":
        why = "tensor_parallel: norms of Transformer Engine's leave its transfers some of the device"
        found += [Setting(f"NVTE_{way}_LAYERNORM_SM_MARGIN", "16", why) for way in ("FWD", "BWD")]
    return found


def apply(settings: Sequence[Setting], environ: MutableMapping[str, str], *, started: bool) -> list[str]:
    """Sets what can be set.

    Args:
        settings: the first of a variable counts.
        environ: where to.
        started: whether CUDA has started, which then has read them.

    Returns:
        A sentence about each.
    """
    said = []
    for setting in settings:
        here, line = environ.get(setting.variable), f"{setting.variable}={setting.value} ({setting.why})"
        if here == setting.value:
            said.append(f"{line}: is set")
        elif here is not None:
            said.append(f"{line}: it is {here} already, which stays")
        elif started:
            said.append(f"{line}: too late, CUDA has started; set it in the shell")
        else:
            environ[setting.variable] = setting.value
            said.append(f"{line}: set")
    return said


def capability() -> int | None:
    """The first device's compute capability (major), asked of the driver's own tool, since torch would start CUDA."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(told.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
