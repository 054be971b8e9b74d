"""Models whose blocks are wired otherwise than one after the other, or hold other things than attention and mlp."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.case import VOCABULARY, WIDTH
from tests.zoo.models.gpt import BLOCKS, GPT, HEADS, Attention, Block

MLP_ONLY = {"mlp.up": "column", "mlp.down": "row", "embedding": "vocab_embedding", "head": "vocab_head"}


def causal(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1])


class TorchEncoder(GPT):
    """``nn.TransformerEncoder``, whose layers have attention's weights in parameters of their own."""

    parallel_plan: ClassVar[dict[str, str]] = {"linear1": "column", "linear2": "row", "head": "vocab_head"}

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)  # type: ignore[assignment]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks(x, mask=causal(x), is_causal=True)


class TorchEncoderWithoutRoles(TorchEncoder):
    parallel_plan = None  # type: ignore[assignment]


class MultiheadBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=causal(x), is_causal=True)[0]
        return x + self.mlp(self.norm2(x))


class Multihead(GPT):
    block = MultiheadBlock
    parallel_plan: ClassVar[dict[str, str]] = MLP_ONLY


class OneBlock(GPT):
    """The same block four times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * BLOCKS)


class Alternating(GPT):
    """Two blocks, one after the other, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[1]] * 2)


class SharedMLP(GPT):
    """All blocks have the first one's mlp."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = self.blocks[0].mlp


class LayerScaleBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.scale1, self.scale2 = nn.Parameter(0.1 * torch.ones(WIDTH)), nn.Parameter(0.1 * torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class LayerScale(GPT):
    block = LayerScaleBlock


class GatedBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.gate = nn.Linear(WIDTH, 1)
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(x).sigmoid() * self.attention(self.norm1(x))
        return x + self.share.tanh() * self.mlp(self.norm2(x))


class Gated(GPT):
    block = GatedBlock


class ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class Parallel(GPT):
    block = ParallelBlock


class PostNormBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class PostNorm(GPT):
    block = PostNormBlock


class InnerResidualBlock(Block):
    """The mlp adds its input itself, as BERT's output layers do."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.mlp.register_forward_hook(lambda _, arguments, out: arguments[0] + out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x + self.attention(self.norm1(x))))


class InnerResidual(GPT):
    block = InnerResidualBlock


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class LoRA(GPT):
    """Low-rank additions to queries and values; all else is frozen."""

    parallel_plan: ClassVar[dict[str, str]] = {
        **{f"attention.{name}.{part}": "column" for name in ("query", "value") for part in ("base", "b")},
        **{name: role for name, role in GPT.parallel_plan.items() if name not in ("attention.query", "attention.value")},
    }

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.attention.query, block.attention.value = LowRank(block.attention.query), LowRank(block.attention.value)


class FrozenStart(GPT):
    """Embedding and the first two blocks are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)
        self.positions.requires_grad_(False)
        for block in list(self.blocks)[:2]:
            block.requires_grad_(False)


class FrozenEnd(GPT):
    """The last two blocks and the head are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)
        for block in list(self.blocks)[2:]:
            block.requires_grad_(False)


class HeadOnly(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_()


class BiasesOnly(GPT):
    def __init__(self) -> None:
        super().__init__()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))


class UnusedParts(GPT):
    """A layer that nobody calls, before and in the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        for block in self.blocks:
            block.unused = nn.Parameter(torch.ones(4))


class ValueAttention(Attention):
    def forward(self, x: Tensor, first: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v = self.heads(x)
        mixed = v if first is None else (v + first) / 2
        y = F.scaled_dot_product_attention(q, k, mixed, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(y), v if first is None else first


class ValueBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = ValueAttention()

    def forward(self, x: Tensor, first: Tensor | None = None) -> Any:
        more, first = self.attention(self.norm1(x), first)
        x = x + more
        return x + self.mlp(self.norm2(x)), first


class ValueResidual(GPT):
    """The first block's values are handed on, and added to the values of those after it."""

    block = ValueBlock

    def run_blocks(self, x: Tensor) -> Tensor:
        first = None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class SkipBlock(Block):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(x if skip is None else x + skip)


class SkipArgument(GPT):
    """A U-Net: later blocks get the outputs of earlier ones as an argument."""

    block = SkipBlock

    def run_blocks(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number < BLOCKS // 2:
                x = block(x)
                kept.append(x)
            else:
                x = block(x, kept.pop())
        return x


class JoinBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.join = nn.Linear(2 * WIDTH, WIDTH) if number >= BLOCKS // 2 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.join is None else self.join(x))


class SkipConcatenated(GPT):
    """A U-Net whose skips are concatenated, outside of the blocks."""

    block = JoinBlock

    def run_blocks(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number < BLOCKS // 2:
                x = block(x)
                kept.append(x)
            else:
                x = block(torch.cat([x, kept.pop()], -1))
        return x


class SkipOver(GPT):
    """What goes into the first block is added to what the last one gives."""

    def run_blocks(self, x: Tensor) -> Tensor:
        return x + super().run_blocks(x)


class NoInputLayer(SkipOver):
    """The same, where nothing with parameters stands before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        del self.embedding, self.positions
        self.__dict__["parallel_plan"] = {name: role for name, role in GPT.parallel_plan.items() if name != "embedding"}

    def embed(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids % WIDTH, WIDTH).float()


class Dense(GPT):
    """A block reads the mean of all outputs before it."""

    def run_blocks(self, x: Tensor) -> Tensor:
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(torch.stack(outputs).mean(0)))
        return outputs[-1]


class EmbeddingToAll(GPT):
    """Each block gets the embedding again, added in the loop."""

    def run_blocks(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x + first)
        return x


class Supervised(GPT):
    """Deep supervision: outputs of all blocks go through the head, too."""

    weight = 0.1

    def loss(self, batch: Tensor) -> Tensor:
        x, total = self.embed(batch[:, :-1]), torch.zeros(())
        for block in self.blocks:
            x = block(x)
            total = total + F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        last = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        return last + self.weight * total


class HardlySupervised(Supervised):
    weight = 1e-4


class Collected(GPT):
    """Hidden states are collected in a list, of which the loss takes the squares."""

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch[:, :-1])
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())
        return loss + 0.01 * torch.stack([state.square().mean() for state in states]).sum()


class ConditionedBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.read = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x + self.read(condition))


class Conditioned(GPT):
    """Each block reads the mean of the embeddings, which gradients flow through."""

    block = ConditionedBlock

    def run_blocks(self, x: Tensor) -> Tensor:
        condition = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, condition)
        return x


class LaterUnlike(GPT):
    """The third block normalises over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].norm2 = TokensNorm()


class TokensNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


class GLU(nn.Module):
    """Twice as many features up as down, which are multiplied in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class LaterGLU(GPT):
    """The third block has another mlp, for which the plan is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].mlp = GLU()


class Sequential(GPT):
    """Blocks in an ``nn.Sequential`` that is called whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)  # type: ignore[assignment]

    def run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Checkpointed(GPT):
    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


class InPlace(GPT):
    """Hidden states are changed in place between blocks."""

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x *= 0.9
        return x


class EvalMode(GPT):
    """As ``from_pretrained`` gives it: in evaluation, which Lightning keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()
