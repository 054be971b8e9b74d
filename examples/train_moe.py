"""The byte-level GPT of train_gpt.py, with a mixture of experts in place of each mlp: an ordinary LightningModule, too."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.train_gpt import GPT, Block, GPTModule
from lightning_overlap.nn import Experts, MoELayer, TopKRouter


class MoEBlock(Block):
    """A block that returns its balancing loss beside the hidden states."""

    def __init__(self, width: int, heads: int, experts: int, top_k: int) -> None:
        super().__init__(width, heads)
        self.mlp = MoELayer(TopKRouter(width, experts, top_k), Experts(experts, width, 4 * width, gated=False, activation=F.gelu))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm1(x))
        y, balancing_loss = self.mlp(self.norm2(x))
        return x + y, balancing_loss


class MoEGPT(GPT):
    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, *, n_experts: int, top_k: int
    ) -> None:
        super().__init__(vocab_size, block_size, n_layer, n_head, n_embd)
        self.blocks = nn.ModuleList(MoEBlock(n_embd, n_head, n_experts, top_k) for _ in range(n_layer))
        self.apply(self._init)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        losses = []
        for block in self.blocks:
            x, loss = block(x)
            losses.append(loss)
        return self.head(self.norm(x)), torch.stack(losses).sum()


class MoEGPTModule(GPTModule):
    # What tensor_parallel shards beside the experts.
    parallel_plan: ClassVar = {pattern: role for pattern, role in GPTModule.parallel_plan.items() if ".mlp." not in pattern}

    def __init__(
        self,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        block_size: int = 128,
        vocab_size: int = 256,
        n_experts: int = 8,
        top_k: int = 2,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(n_layer, n_head, n_embd, block_size, vocab_size, lr)
        self.save_hyperparameters()
        self.model = MoEGPT(vocab_size, block_size, n_layer, n_head, n_embd, n_experts=n_experts, top_k=top_k)

    def loss(self, batch: Tensor) -> Tensor:
        logits, balancing_loss = self.model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if not self.training:
            return loss
        self.log("balancing_loss", balancing_loss)
        return loss + balancing_loss
