"""Imported by the process that all workers are forked from: what is imported late or made once is there before."""

import gc

import lightning.pytorch
import torch
import torchmetrics  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import lightning_overlap.strategy.strategy  # noqa: F401

torch.set_num_threads(1)
lightning.pytorch.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
gc.collect()
gc.freeze()  # else each worker copies what its collector touches
