"""The overlap modes, one a folder. A mode takes part by its place in this tuple and its field in the config."""

from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.modes.pipeline.mode import PipelineMode
from lightning_overlap.modes.tensor.mode import TensorMode

# Order of application: each takes its share of the model, data parallelism flattens what is left.
MODES: tuple[type[OverlapMode], ...] = (PipelineMode, TensorMode, DataMode)
