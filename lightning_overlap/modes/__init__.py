"""The overlap modes, one a folder. A mode takes part by its entry in ``MODES`` and its field in the config."""

from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.modes.pipeline.mode import PipelineMode
from lightning_overlap.modes.tensor.mode import TensorMode

MODES: tuple[type[OverlapMode], ...] = (DataMode, PipelineMode, TensorMode)
"""All modes. The order says nothing: modes are applied by their ``nesting``."""
