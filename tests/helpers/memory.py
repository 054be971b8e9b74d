"""How much memory a training step takes."""

import itertools
from typing import Any

import torch
from lightning.pytorch import Callback


class Peak(Callback):
    """Bytes by which torch's memory grew at most in the third step: the first ones learn what is sent."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 2:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 2:
            self.profiler.stop()
            events = self.profiler.profiler.kineto_results.events()
            self.bytes = max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
