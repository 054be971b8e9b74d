"""Pipeline parallelism: ranks hold consecutive blocks, and send hidden states and their gradients beside compute."""

from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.modes.pipeline.config import ADVICE, alternatives, decide, environment, schedule_of
from lightning_overlap.modes.pipeline.division import look
from lightning_overlap.modes.pipeline.mode import PipelineMode

PIPELINE = ModeDescriptor(
    name="pipeline",
    section="pipeline_parallel",
    decide=decide,
    mode_type=PipelineMode,
    look=look,
    environment=environment,
    advice=ADVICE,
    alternatives=alternatives,
    schedule=schedule_of,
)
