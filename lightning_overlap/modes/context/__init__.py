"""Context parallelism: ranks hold different tokens of a sequence, and exchange keys and values under the attention."""

from lightning_overlap.modes.context.config import ADVICE, alternatives, decide
from lightning_overlap.modes.context.mode import ContextMode, look
from lightning_overlap.modes.descriptor import ModeDescriptor

CONTEXT = ModeDescriptor(
    name="context",
    section="context_parallel",
    decide=decide,
    mode_type=ContextMode,
    look=look,
    advice=ADVICE,
    alternatives=alternatives,
    unchecked={"verify_blocks": False},
)
