"""Expert parallelism: its configuration. The mode itself is not in this version."""

from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.expert.config import decide

EXPERT = ModeDescriptor(name="expert", section="expert_parallel", decide=decide)
