"""Megatron-grade parallel training in PyTorch Lightning, with its communication hidden behind compute."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_overlap.bench.verify import verify
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.config import ContextParallel
from lightning_overlap.modes.data.config import DataParallel
from lightning_overlap.modes.expert.config import ExpertParallel
from lightning_overlap.modes.pipeline.config import PipelineParallel
from lightning_overlap.modes.tensor.config import TensorParallel
from lightning_overlap.profiling.callback import OverlapProfiler
from lightning_overlap.state.checkpoint import CheckpointError
from lightning_overlap.strategy.strategy import OverlapStrategy

__version__ = "0.2.0"
__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextParallel",
    "DataParallel",
    "ExpertParallel",
    "OverlapConfig",
    "OverlapProfiler",
    "OverlapStrategy",
    "PipelineParallel",
    "TensorParallel",
    "verify",
]

if "overlap" not in StrategyRegistry:
    StrategyRegistry.register("overlap", OverlapStrategy, description="Overlapped parallel training")
    StrategyRegistry.register("overlap_notebook", OverlapStrategy, description="The same in a notebook", start_method="fork")
