"""Context parallelism: its configuration. The mode itself is not in this version."""

from lightning_overlap.modes.context.config import decide
from lightning_overlap.modes.descriptor import ModeDescriptor

CONTEXT = ModeDescriptor(name="context", section="context_parallel", decide=decide)
