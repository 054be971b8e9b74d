"""Environment variables that the modes want on CUDA, set before it starts. No number depends on them.

A value that is set already stays, whoever has set it: the user, or a mode that is applied before.
"""

from __future__ import annotations

import subprocess
from collections.abc import MutableMapping, Sequence

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import Setting
from lightning_overlap.modes.descriptor import in_order


def wanted(config: OverlapConfig, capability: int | None) -> list[Setting]:
    """Lists what the modes want, in the order in which they are applied; nothing if overlap is off.

    Args:
        config: what was asked for.
        capability: the device's compute capability (major); None if it is not known.
    """
    if config.overlap == "off":
        return []
    return [setting for mode, _ in in_order(config.modes) for setting in mode.environment(config.of(mode), capability)]


def apply(settings: Sequence[Setting], environ: MutableMapping[str, str], *, started: bool) -> list[str]:
    """Sets what can be set.

    Args:
        settings: the first of a variable counts.
        environ: the variables, which are changed.
        started: whether CUDA has started: it has read its variables then.

    Returns:
        A sentence about each.
    """
    report = []
    for setting in settings:
        value, line = environ.get(setting.variable), f"{setting.variable}={setting.value} ({setting.why})"
        if value == setting.value:
            report.append(f"{line}: is set")
        elif value is not None:
            report.append(f"{line}: it is {value} already, which stays")
        elif started:
            report.append(f"{line}: too late, CUDA has started; set it in the shell")
        else:
            environ[setting.variable] = setting.value
            report.append(f"{line}: set")
    return report


def capability() -> int | None:
    """The first device's compute capability (major), asked of the driver's own tool, since torch would start CUDA."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(output.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
