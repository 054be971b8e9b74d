"""Data parallelism: gradients reduced under backward, parameters gathered under the next forward."""

from lightning_overlap.modes.data.config import ADVICE, alternatives, decide
from lightning_overlap.modes.data.mode import DataMode
from lightning_overlap.modes.descriptor import ModeDescriptor

DATA = ModeDescriptor(
    name="data", section="data_parallel", decide=decide, mode_type=DataMode, advice=ADVICE, alternatives=alternatives
)
