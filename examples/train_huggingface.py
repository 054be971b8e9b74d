"""Fine-tunes a Hugging Face model, unchanged, on padded or packed batches, and saves it as Hugging Face does.

The model is made from its configuration, so that nothing is downloaded; ``AutoModelForCausalLM.from_pretrained`` takes its place in a
real run. Tokens are the bytes of functions of Python's standard library, with a mask as tokenizers make it.
"""

import re
import sysconfig
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

IGNORED, PADDING = -100, 0
"""The label that no loss counts, and the token that fills short documents."""


class HuggingFaceModule(LightningModule):
    """A causal language model of Hugging Face.

    Args:
        model_type: an architecture with a ``base_model_tp_plan``, such as ``llama``, ``qwen3`` or ``mixtral``.
        layers: number of blocks.
        width: hidden size.
        heads: attention heads; half as many key and value heads.
        lr: learning rate of AdamW.
        save_to: a folder for ``save_pretrained`` at the end of the fit; None: nothing is saved.
    """

    def __init__(
        self,
        model_type: str = "llama",
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        lr: float = 1e-3,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = AutoConfig.for_model(
            model_type,
            vocab_size=256,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=2048,
            pad_token_id=PADDING,
        )
        self.model = AutoModelForCausalLM.from_config(config)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch, use_cache=False).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    def on_fit_end(self) -> None:
        # The trainer's strategy has put the model together again: every rank has all weights here.
        if self.hparams["save_to"] is not None and self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["save_to"])


class Functions(LightningDataModule):
    """Functions of the standard library as documents of different lengths.

    Args:
        batching: ``padded``: a document a row, with an ``attention_mask``; ``packed``: rows of ``length`` tokens of several documents
            each, whose ``position_ids`` begin again at each document.
        length: the most tokens of a row.
        batch_size: rows of a batch.
        documents: how many are used, nine of ten for training.
    """

    def __init__(
        self, batching: Literal["padded", "packed"] = "padded", length: int = 256, batch_size: int = 8, documents: int = 2000
    ) -> None:
        super().__init__()
        self.batching, self.length, self.batch_size, self.documents = batching, length, batch_size, documents

    def setup(self, stage: str) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = (text for file in files for text in re.split(rb"\n(?=def |class )", file.read_bytes()))
        rows = [torch.tensor(list(text[: self.length])) for text, _ in zip(texts, range(self.documents), strict=False) if text]
        cut = len(rows) * 9 // 10
        self.train, self.val = (rows if self.batching == "padded" else pack(rows, self.length) for rows in (rows[:cut], rows[cut:]))

    def _loader(self, rows: Any, *, shuffle: bool) -> DataLoader[Any]:
        collate = pad if self.batching == "padded" else None
        return DataLoader(rows, batch_size=self.batch_size, shuffle=shuffle, collate_fn=collate, drop_last=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val, shuffle=False)


def pad(documents: list[Tensor]) -> dict[str, Tensor]:
    """Makes a batch of documents of different lengths, as a tokenizer with ``padding=True`` does."""
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=PADDING)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def pack(documents: list[Tensor], length: int) -> list[dict[str, Tensor]]:
    """Makes rows of ``length`` tokens of several documents. No loss counts a document's first token, which nothing predicts."""
    ids = torch.cat(documents)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    labels = ids.masked_fill(positions == 0, IGNORED)
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    starts = range(0, len(ids) - length + 1, length)
    return [{name: column[start : start + length] for name, column in columns.items()} for start in starts]
