"""Low-rank adapters (LoRA) by hand on the GPT of train_gpt.py, whose own weights are frozen: an ordinary LightningModule.

Adapters of peft need no roles: they are sharded with the layers of a Hugging Face model's plan.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from examples.train_gpt import GPTModule


class LowRank(nn.Module):
    """A frozen linear layer and the product of two small matrices, which is added to it.

    Args:
        base: the layer.
        rank: rows of the first matrix, columns of the second one.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)  # at first the model computes what it did

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class LoRAModule(GPTModule):
    """Trains adapters of q, k and v in all blocks.

    Args:
        rank: of the adapters.
        pretrained: a checkpoint of GPTModule; None: random weights.
        options: of :class:`GPTModule`.
    """

    # The second matrix makes the features of q, k and v, which are sharded; the first one is small, and is not.
    parallel_plan: ClassVar = {
        **{pattern: role for pattern, role in GPTModule.parallel_plan.items() if not pattern.endswith("qkv")},
        "attention.qkv.base": "column[3]",
        "attention.qkv.b": "column[3]",
    }

    def __init__(self, rank: int = 4, pretrained: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters()
        if pretrained is not None:
            self.load_state_dict(torch.load(pretrained, weights_only=True, mmap=True)["state_dict"])
        self.requires_grad_(False)
        for block in self.model.blocks:
            block.attention.qkv = LowRank(block.attention.qkv, rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"])
