"""Expert parallelism: ranks hold some of the experts of each layer, and send each other the tokens that choose them."""

from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.expert.config import ADVICE, alternatives, decide
from lightning_overlap.modes.expert.mode import ExpertMode, look

EXPERT = ModeDescriptor(
    name="expert",
    section="expert_parallel",
    decide=decide,
    mode_type=ExpertMode,
    look=look,
    advice=ADVICE,
    alternatives=alternatives,
)
"""The expert mode: spreads the experts of each layer over ranks that the other modes have."""
