"""The overlap modes, a folder each. A mode takes part by its line in ``MODES`` and its field in ``OverlapConfig``."""

from lightning_overlap.modes.context import CONTEXT
from lightning_overlap.modes.data import DATA
from lightning_overlap.modes.descriptor import ModeDescriptor, in_order
from lightning_overlap.modes.expert import EXPERT
from lightning_overlap.modes.pipeline import PIPELINE
from lightning_overlap.modes.tensor import TENSOR

# Each takes its share of what the ones before it have left of the model; descriptors say what they take.
MODES: tuple[ModeDescriptor, ...] = in_order(PIPELINE, TENSOR, CONTEXT, EXPERT, DATA)
