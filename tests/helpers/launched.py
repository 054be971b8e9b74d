"""``python -m tests.helpers.launched START_METHOD FILE``: trains on two processes, started as users start them."""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_overlap import DataParallel, OverlapStrategy
from tests.helpers.training import Net


class Tells(Net):
    """Writes its losses where the parent can read them, since processes that are spawned do not come back."""

    path = ""

    def on_train_end(self) -> None:
        Path(f"{self.path}.{self.global_rank}").write_text(json.dumps(self.losses))


def main(start_method: str, path: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(5, verbose=False)
    module = Tells()
    module.path = path
    strategy = OverlapStrategy(DataParallel(bucket_size=500), start_method=start_method)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=6, limit_val_batches=2, **quiet).fit(module)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
