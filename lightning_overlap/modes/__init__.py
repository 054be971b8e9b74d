"""The overlap modes, a folder each. A mode takes part by its line in ``MODES`` and its field in ``OverlapConfig``."""

from lightning_overlap.modes.context import CONTEXT
from lightning_overlap.modes.data import DATA
from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.expert import EXPERT
from lightning_overlap.modes.pipeline import PIPELINE
from lightning_overlap.modes.tensor import TENSOR

MODES: tuple[ModeDescriptor, ...] = (PIPELINE, CONTEXT, TENSOR, EXPERT, DATA)
"""All modes, in the order in which the plan lists them. The order says nothing else: modes are applied by their ``nesting``."""
