"""Models with more than hidden states: auxiliary losses, buffers, norms of weights, random numbers, other layers around the blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.zoo.case import VOCABULARY, WIDTH
from tests.zoo.models.gpt import GPT, Block

WEIGHT = 0.1


class RoutedBlock(Block):
    """Has a gate, and a loss of its own that keeps it balanced, left on the block."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.gate = nn.Linear(WIDTH, 2)
        self.balance: Any = None

    def shares(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)

    def forward(self, x: Tensor) -> Any:
        shares = self.shares(x)
        self.balance = shares.square().mean()
        return super().forward(x) * shares[..., :1]


class AuxiliaryOnBlocks(GPT):
    block = RoutedBlock

    def loss(self, batch: Tensor) -> Tensor:
        loss = super().loss(batch)
        return loss + WEIGHT * sum(block.balance for block in self.blocks)


class ReturningBlock(RoutedBlock):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x, self.balance


class AuxiliaryReturned(GPT):
    block = ReturningBlock

    def loss(self, batch: Tensor) -> Tensor:
        x, balance = self.embed(batch[:, :-1]), torch.zeros(())
        for block in self.blocks:
            x, more = block(x)
            balance = balance + more
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        return loss + WEIGHT * balance


class AuxiliaryMaybeReturned(AuxiliaryReturned):
    """As before, in code that takes ``None`` for no loss."""

    def loss(self, batch: Tensor) -> Tensor:
        x, balance = self.embed(batch[:, :-1]), torch.zeros(())
        for block in self.blocks:
            x, more = block(x)
            if more is not None:
                balance = balance + more
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        return loss + WEIGHT * balance


class AuxiliaryHandedOn(GPT):
    """The sum of the losses so far goes from block to block beside the hidden states."""

    class block(RoutedBlock):
        def forward(self, x: Tensor, balance: Any = 0.0) -> Any:
            return super().forward(x), balance + self.balance

    def loss(self, batch: Tensor) -> Tensor:
        x, balance = self.embed(batch[:, :-1]), torch.zeros(())
        for block in self.blocks:
            x, balance = block(x, balance)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        return loss + WEIGHT * balance


class AuxiliaryByHooks(GPT):
    """Forward hooks on the gates collect what the loss sums."""

    block = RoutedBlock

    def __init__(self) -> None:
        super().__init__()
        self.collected: list[Tensor] = []
        for block in self.blocks:
            block.gate.register_forward_hook(lambda _, __, out: self.collected.append(out.softmax(-1).square().mean()))

    def loss(self, batch: Tensor) -> Tensor:
        self.collected.clear()
        loss = super().loss(batch)
        return loss + WEIGHT * torch.stack(self.collected).sum()


class L2(GPT):
    """Weight decay by hand."""

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + 1e-3 * sum(p.square().sum() for p in self.parameters())


class L2OfTrained(GPT):
    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + 1e-3 * sum(p.square().sum() for p in self.parameters() if p.requires_grad)


class L2OfHead(GPT):
    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + 1e-3 * self.head.weight.square().sum()


class CountingBlock(Block):
    """A buffer counts the forwards, and the block's output depends on it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(x) * (1 + 0.01 * self.count)


class Counting(GPT):
    block = CountingBlock


class RunningMeanBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return super().forward(x - self.mean)


class RunningMean(GPT):
    block = RunningMeanBlock


class MeanInTheLoss(GPT):
    """The loss reads running means of the blocks."""

    class block(RunningMeanBlock):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            return Block.forward(self, x)

    def loss(self, batch: Tensor) -> Tensor:
        loss = super().loss(batch)
        return loss * (1 + sum(block.mean.square().sum() for block in self.blocks))


class Carrying(GPT):
    """Keeps the last batch's hidden state on self, and begins with it."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None

    def run_blocks(self, x: Tensor) -> Tensor:
        if self.training and self.state is not None:
            x = x + self.state
        x = super().run_blocks(x)
        if self.training:
            self.state = x.detach().mean((0, 1))
        return x


class WeightNormOld(GPT):
    wrap = staticmethod(nn.utils.weight_norm)

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            for part in (block.mlp.up, block.mlp.down):
                self.wrap(part)


class WeightNorm(WeightNormOld):
    wrap = staticmethod(parametrizations.weight_norm)


class SpectralNormOld(WeightNormOld):
    wrap = staticmethod(nn.utils.spectral_norm)


class SpectralNorm(WeightNormOld):
    wrap = staticmethod(parametrizations.spectral_norm)


class Orthogonal(WeightNormOld):
    wrap = staticmethod(parametrizations.orthogonal)


class BatchNormStem(GPT):
    """Batch norm before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks, norm, head = self.blocks, self.norm, self.head
        del self.blocks, self.norm, self.head
        self.stem = nn.BatchNorm1d(WIDTH)
        self.blocks, self.norm, self.head = blocks, norm, head

    def embed(self, ids: Tensor) -> Tensor:
        return self.stem(super().embed(ids).transpose(1, 2)).transpose(1, 2)


class BatchNormBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm2 = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x.transpose(1, 2)).transpose(1, 2))


class BatchNormInside(GPT):
    block = BatchNormBlock


class ConvStem(GPT):
    def __init__(self) -> None:
        super().__init__()
        blocks, norm, head = self.blocks, self.norm, self.head
        del self.blocks, self.norm, self.head
        self.stem = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH), nn.GELU())
        self.blocks, self.norm, self.head = blocks, norm, head

    def embed(self, ids: Tensor) -> Tensor:
        return self.stem(super().embed(ids).transpose(1, 2)).transpose(1, 2)


class Recurrent(GPT):
    """An LSTM before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks, norm, head = self.blocks, self.norm, self.head
        del self.blocks, self.norm, self.head
        self.stem = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.blocks, self.norm, self.head = blocks, norm, head

    def embed(self, ids: Tensor) -> Tensor:
        return self.stem(super().embed(ids))[0]


class Pooled(GPT):
    """A classifier over the mean of the tokens, with a tower after the blocks."""

    parallel_plan: ClassVar[dict[str, str]] = {name: role for name, role in GPT.parallel_plan.items() if name != "head"}

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))  # type: ignore[assignment]

    def loss(self, batch: Tensor) -> Tensor:
        x = self.norm(self.run_blocks(self.embed(batch[:, :-1]))).mean(1)
        return F.cross_entropy(self.head(x), batch[:, -1] % 4)


class Temperature(GPT):
    """A learned temperature on the LightningModule, read by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1]) * self.temperature.exp()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class TwoHeads(GPT):
    """Two losses with learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, VOCABULARY)
        self.weights = nn.Parameter(torch.zeros(2))

    def loss(self, batch: Tensor) -> Tensor:
        x = self.norm(self.run_blocks(self.embed(batch[:, :-1])))
        each = [F.cross_entropy(head(x).flatten(0, 1), batch[:, 1:].flatten()) for head in (self.head, self.other)]
        return sum((-w).exp() * loss + w for w, loss in zip(self.weights, each, strict=True))  # type: ignore[return-value]


class NormBeforeBlocks(GPT):
    """The norm after the blocks is registered before them, as OPT's."""

    def __init__(self) -> None:
        super().__init__()
        blocks, norm, head = self.blocks, self.norm, self.head
        del self.blocks, self.norm, self.head
        self.norm, self.blocks, self.head = norm, blocks, head


class Masked(GPT):
    """Logits are changed in place before the loss."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., VOCABULARY // 2 :] -= 1.0
        return logits


class Capped(GPT):
    """Logits are capped, as Gemma 2's."""

    def forward(self, ids: Tensor) -> Tensor:
        return 5 * torch.tanh(super().forward(ids) / 5)


class ZLoss(GPT):
    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) + 1e-2 * logits.logsumexp(-1).square().mean()


class DropoutOff(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(super().embed(ids))


class Dropout(DropoutOff):
    class block(Block):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        self.dropout.p = 0.2


class DropPathBlock(Block):
    """Leaves out what it adds, for each sample by chance."""

    def forward(self, x: Tensor) -> Tensor:
        keep = 1.0 if not self.training else (torch.rand(len(x), 1, 1) < 0.7).float() / 0.7
        return x + keep * (super().forward(x) - x)


class DropPath(GPT):
    block = DropPathBlock


class LayerDropBlock(Block):
    """Leaves itself out by chance."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < 0.3 else super().forward(x)


class LayerDrop(GPT):
    block = LayerDropBlock


class LayerDropInTheLoop(GPT):
    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.3:
                x = block(x)
        return x


class Noise(GPT):
    """Noise is added to embeddings, from torch's generator."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + 0.1 * torch.randn_like(x) if self.training else x
