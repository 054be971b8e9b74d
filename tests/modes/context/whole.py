"""Unsharded attention: what all methods are compared with."""

import torch
from torch import Tensor

from lightning_overlap.modes.context.mask import Mask


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, size: int = 8) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, of two samples."""
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = ((2, count, tokens, size) for count in (heads, kv_heads, kv_heads, heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """The output of all tokens, and the gradients of ``q``, ``k``, ``v`` (and ``sinks``), by autograd, in the inputs' dtype.

    ``kept`` is what dropout multiplies the weights by, ``(B, H, S, S)``.
    """
    variables = [x.detach().clone().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    q, k, v = variables[:3]
    times, positions = q.shape[1] // k.shape[1], torch.arange(mask.tokens)
    logits = q @ k.repeat_interleave(times, 1).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    visible = mask.visible(positions, positions, len(q), range(q.shape[1]))
    logits = logits.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else logits + visible
    logits = torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)
    if sinks is not None:
        logits = torch.cat([logits[..., :-1], variables[3].view(-1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)[..., :-1]
    weights = weights if kept is None else weights * kept
    output = weights @ v.repeat_interleave(times, 1)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in variables)]
