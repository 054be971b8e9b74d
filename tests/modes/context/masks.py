"""Masks of every kind that tests go through."""

import torch

from lightning_overlap.modes.context.mask import Mask

NAMES = (
    "causal",
    "full",
    "window",
    "window_both_ways",
    "documents",
    "packed",
    "padding",
    "bool_bias",
    "head_bias",
    "key_bias",
    "rule",
    "all",
)


def mask_of(name: str, tokens: int, heads: int = 4, dtype: torch.dtype = torch.float64) -> Mask:
    """A mask for two samples. Queries may see nothing (``padding``, ``bool_bias``)."""
    generator = torch.Generator().manual_seed(tokens)
    documents = torch.randint(0, 2, (2, tokens), generator=generator).cumsum(1)
    keys = torch.arange(tokens) < torch.tensor([[tokens - tokens // 3], [tokens]])
    keys = keys if name != "padding" else keys.flip(1)
    head_bias = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64).to(dtype)
    rest = {"keys": keys, "rule": lambda sample, head, query, key: (query - key) % 5 != 3}
    made: dict[str, Mask] = {
        "causal": Mask(tokens, causal=True),
        "full": Mask(tokens),
        "window": Mask(tokens, causal=True, window=max(tokens // 4, 1)),
        "window_both_ways": Mask(tokens, window=3),
        "documents": Mask(tokens, documents=documents),
        "packed": Mask(tokens, causal=True, documents=documents // 2),
        "padding": Mask(tokens, causal=True, keys=keys),
        "bool_bias": Mask(tokens, bias=torch.rand(2, 1, tokens, tokens, generator=generator) < 0.4),
        "head_bias": Mask(tokens, causal=True, bias=head_bias),
        "key_bias": Mask(tokens, bias=torch.randn(2, 1, 1, tokens, generator=generator, dtype=torch.float64).to(dtype)),
        "rule": Mask(tokens, causal=True, rule=lambda sample, head, query, key: (query + key + sample + head) % 3 > 0),
        "all": Mask(tokens, causal=True, window=max(tokens // 2, 1), documents=documents // 4, **rest),
    }
    return made[name]
