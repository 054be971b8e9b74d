"""Losses that are no mean over samples, and batches of other forms than one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.zoo.case import BATCH, TOKENS, VOCABULARY, WIDTH, next_tokens
from tests.zoo.models.gpt import GPT


class PerToken(GPT):
    """What the losses below are made of."""

    def each(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).transpose(1, 2), batch[:, 1:], reduction="none")


class Sum(PerToken):
    lr = 0.001

    def loss(self, batch: Tensor) -> Tensor:
        return self.each(batch).sum()


class Median(PerToken):
    def loss(self, batch: Tensor) -> Tensor:
        return self.each(batch).flatten().median()


class Max(PerToken):
    lr = 0.01

    def loss(self, batch: Tensor) -> Tensor:
        return self.each(batch).max()


class RootMeanSquare(PerToken):
    def loss(self, batch: Tensor) -> Tensor:
        return self.each(batch).square().mean().sqrt()


class MaskedMean(PerToken):
    """A mean over the tokens that count, which are more in some samples than in others."""

    def loss(self, batch: Tensor) -> Tensor:
        return self.each(batch)[batch[:, 1:] > batch[:, :1]].mean()


class IgnoredTokens(GPT):
    """The same by ``ignore_index``."""

    def loss(self, batch: Tensor) -> Tensor:
        labels = batch[:, 1:].masked_fill(batch[:, 1:] <= batch[:, :1], -100)
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), labels.flatten())


class BalancedMask(PerToken):
    """A mean over the tokens that count, of which every sample has as many."""

    def loss(self, batch: Tensor) -> Tensor:
        mask = torch.zeros_like(batch[:, 1:], dtype=torch.bool)
        mask[:, 2:5] = True
        return self.each(batch)[mask].mean()


class Contrastive(GPT):
    """Each sample's halves are to be nearer to each other than to other samples'."""

    def loss(self, batch: Tensor) -> Tensor:
        states = self.norm(self.run_blocks(self.embed(batch[:, :-1])))
        left, right = F.normalize(states[:, : TOKENS // 2].mean(1), dim=-1), F.normalize(states[:, TOKENS // 2 :].mean(1), dim=-1)
        likeness = left @ right.T / 0.1 + self.head.weight.mean()
        return F.cross_entropy(likeness, torch.arange(len(batch)))


class MeanSquare(GPT):
    """No logits: hidden states are to be the next tokens' embeddings."""

    def loss(self, batch: Tensor) -> Tensor:
        target = torch.sin(batch[:, 1:, None].float() * torch.arange(1, VOCABULARY + 1))
        return F.mse_loss(self(batch[:, :-1]), target)


class InDict(GPT):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(torch.cat([batch["ids"], batch["last"][:, None]], 1))


def dict_samples() -> list[dict[str, Tensor]]:
    return [{"ids": ids[:-1], "last": ids[-1]} for ids in next_tokens()]


class InList(GPT):
    def loss(self, batch: Any) -> Tensor:
        ids, targets = batch
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def pair_samples() -> list[tuple[Tensor, Tensor]]:
    return [(ids[:-1], ids[1:]) for ids in next_tokens()]


@dataclass
class Pair:
    ids: Tensor
    targets: Tensor


class InDataclass(GPT):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch.ids).flatten(0, 1), batch.targets.flatten())


def pair(samples: list[Tensor]) -> Pair:
    stacked = torch.stack(samples)
    return Pair(stacked[:, :-1], stacked[:, 1:])


class WithStray(GPT):
    """A tensor that is no sample's comes first in the batch: the number of an epoch."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch["ids"]) * batch["epoch"].float().mean()


def with_stray(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"epoch": torch.tensor([3]), "ids": torch.stack(samples)}


class WithTable(GPT):
    """A table that is no sample's comes with each batch, and is as long as one."""

    def loss(self, batch: Any) -> Tensor:
        logits = self(batch["ids"][:, :-1])
        return F.cross_entropy((logits @ batch["table"].T).flatten(0, 1), (batch["ids"][:, 1:] % len(batch["table"])).flatten())


def with_table(samples: list[Tensor]) -> dict[str, Tensor]:
    table = torch.linspace(-1, 1, BATCH * VOCABULARY).sin().view(BATCH, VOCABULARY)
    return {"ids": torch.stack(samples), "table": table}


class WithTexts(GPT):
    """With a list of strings and numbers beside the tensor."""

    def loss(self, batch: Any) -> Tensor:
        assert len(batch["names"]) == len(batch["ids"])
        return super().loss(batch["ids"]) * batch["scale"]


def with_texts(samples: list[Tensor]) -> dict[str, Any]:
    return {"names": [str(int(ids[0])) for ids in samples], "ids": torch.stack(samples), "scale": 0.5}


class ListOfSamples(GPT):
    """The batch is a list with a tensor for each sample."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(torch.stack(list(batch["ids"])))


def list_of_samples(samples: list[Tensor]) -> dict[str, Any]:
    return {"ids": list(samples)}


class TimeFirst(GPT):
    """Tokens are the first dim of the batch, samples the second one."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch.T)


def time_first(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples, 1)


class Images(GPT):
    """Patches of an image in place of tokens."""

    def __init__(self) -> None:
        super().__init__()
        blocks, norm, head = self.blocks, self.norm, self.head
        del self.embedding, self.positions, self.blocks, self.norm, self.head
        self.patches = torch.nn.Conv2d(3, WIDTH, 4, stride=4)
        self.positions = torch.nn.Parameter(torch.zeros(4, WIDTH))
        self.blocks, self.norm, self.head = blocks, norm, head
        self.__dict__["parallel_plan"] = {name: role for name, role in GPT.parallel_plan.items() if name != "embedding"}

    def embed(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2) + self.positions

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["image"]).mean(1), batch["label"])


def image_samples() -> list[dict[str, Any]]:
    return [{"image": torch.sin(ids.float().repeat(22)[:192]).view(3, 8, 8) * math.sqrt(2), "label": ids[0]} for ids in next_tokens()]
