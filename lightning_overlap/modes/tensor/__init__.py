"""Tensor parallelism: ranks hold pieces of the linear layers, and send activations beside the products that need them."""

from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.tensor.config import ADVICE, alternatives, decide, environment
from lightning_overlap.modes.tensor.mode import TensorMode, look

TENSOR = ModeDescriptor(
    name="tensor",
    section="tensor_parallel",
    decide=decide,
    mode_type=TensorMode,
    look=look,
    environment=environment,
    advice=ADVICE,
    alternatives=alternatives,
    unchecked={"verify_blocks": False},
)
