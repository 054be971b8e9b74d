"""Attention by the method that its mask calls for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.config import BY_MASK, METHODS, Method, sent_by_a2a, sent_by_p2p
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import PLAIN, AttentionOptions
from lightning_overlap.ranks.group import Group


class AttentionByMask:
    """Attention whose method depends on its mask.

    Args:
        group: the ranks that have different tokens of the same sequences.
        methods: by kind of attention (:data:`~lightning_overlap.modes.context.config.KINDS`), a method; ``by mask``: p2p or a2a,
            whichever sends fewer bytes.
        hierarchical_sizes: of ``a2a+p2p``.
        settings: as of :class:`ContextAttention`.
    """

    def __init__(
        self,
        group: Group,
        methods: Mapping[str, Method | Literal["by mask"]],
        *,
        hierarchical_sizes: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        self._group, self._methods = group, methods
        used = {*methods.values(), *(("p2p", "a2a") if BY_MASK in methods.values() else ())}
        self._attentions = {
            method: ContextAttention(group, method, hierarchical_sizes=hierarchical_sizes if method == "a2a+p2p" else None, **settings)
            for method in METHODS
            if method in used
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: TokenLayout, options: AttentionOptions = PLAIN) -> Tensor:
        """As :class:`ContextAttention`."""
        method = self._methods["full_attention" if mask.window is None else "sliding_attention"]
        if method == BY_MASK:
            method = self._fewest_bytes(q.shape[1], k.shape[1], mask, layout)
        return self._attentions[method](q, k, v, mask, layout, options)

    def _fewest_bytes(self, heads: int, kv_heads: int, mask: Mask, layout: TokenLayout) -> Method:
        """The same on all ranks, which make the same plans."""
        ranks = self._group.size
        if heads % ranks:
            return "p2p"
        p2p = self._attentions["p2p"].most_received(mask, layout) * sent_by_p2p(kv_heads)
        a2a = layout.tokens / ranks * sent_by_a2a(heads, kv_heads, ranks)
        return "p2p" if p2p <= a2a else "a2a"
