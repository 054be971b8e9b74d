"""Sets environment variables that modes need on CUDA, before CUDA starts. They change the speed, and no number.

A value that the user or an earlier mode has set stays.
"""

from __future__ import annotations

import subprocess
from collections.abc import MutableMapping, Sequence

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import Setting
from lightning_overlap.modes.descriptor import in_order


def settings_for(config: OverlapConfig, capability: int | None) -> list[Setting]:
    """Lists the settings of the modes, in the order in which modes are applied; none if overlap is off.

    Args:
        config: the request.
        capability: the device's compute capability (major); None if it is not known.
    """
    if config.overlap == "off":
        return []
    return [setting for mode, _ in in_order(config.modes) for setting in mode.environment(config.of(mode), capability)]


def apply(settings: Sequence[Setting], environ: MutableMapping[str, str], *, started: bool) -> list[str]:
    """Applies settings to the environment.

    Args:
        settings: of a variable the first one counts.
        environ: the variables; changed in place.
        started: whether CUDA has started, and so read its variables.

    Returns:
        A sentence about each setting.
    """
    report = []
    for setting in settings:
        value, line = environ.get(setting.variable), f"{setting.variable}={setting.value} ({setting.why})"
        if value == setting.value:
            report.append(f"{line}: already set")
        elif value is not None:
            report.append(f"{line}: not set, because it is {value} already")
        elif started:
            report.append(f"{line}: not set, because CUDA has started. Set it in the shell")
        else:
            environ[setting.variable] = setting.value
            report.append(f"{line}: set")
    return report


def capability() -> int | None:
    """Returns the first device's compute capability (major), or None. Asks ``nvidia-smi``, because torch would start CUDA."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(output.split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
