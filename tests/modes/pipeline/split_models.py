"""Twin models whose backward is plain in one and split in the other."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap.modes.pipeline.weight_grad import WeightGradients

WIDTH, WIDER = 48, 33  # large enough for another order of operands to give other bits


class Block(nn.Module):
    """A transformer's."""

    def __init__(self, width=WIDTH, heads=4, checkpointed=None):
        super().__init__()
        self.heads, self.checkpointed = heads, checkpointed
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        # Not contiguous: the layer takes it as it comes.
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def compute(self, x):
        x = x + self.attend(self.before_attention(x))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))

    def forward(self, x):
        return self.compute(x) if self.checkpointed is None else checkpoint(self.compute, x, use_reentrant=self.checkpointed)


def twins(make, dtype=torch.float32):
    """A model and its copy."""
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, copy.deepcopy(model)


def split_backward(gradients, forward):
    """Forward and the first half; gives what is deferred."""
    with gradients.splitting():
        loss = forward()
    with gradients.recording() as deferred:
        loss.backward()
    return deferred


def both(plain, split, inputs, loss=lambda y: y.square().sum()):
    """Accumulates the gradients of several inputs in both, and says whether they are equal."""
    for x in inputs:
        loss(plain(x)).backward()
    gradients = WeightGradients([split])
    for deferred in [split_backward(gradients, lambda x=x: loss(split(x))) for x in inputs]:
        gradients.run(deferred)
    gradients.remove()
    assert_equal_gradients(plain, split)


def assert_equal_gradients(plain, split):
    for (name, a), b in zip(plain.named_parameters(), split.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert a.grad.dtype == b.grad.dtype
            assert a.grad.stride() == b.grad.stride()
            assert torch.equal(a.grad, b.grad), name
