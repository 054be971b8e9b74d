"""Which keys each query sees, described by conditions: no matrix of all pairs is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap.model.trees import Leaf

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of indices of the sample, the head, the query and the key, int64, which broadcast: whether the query sees the key."""


class Relation(Enum):
    """What a range of queries sees of a range of keys."""

    NONE = "none"
    """No query sees any of the keys."""
    FULL = "full"
    """Every query sees every key."""
    DIAGONAL = "diagonal"
    """Both ranges are the same, and each query sees the keys up to its own position."""
    PARTIAL = "partial"
    """Anything else: ask for the pairs."""


@dataclass(frozen=True, eq=False)
class Mask(Leaf):
    """Which keys each query sees: those for which all conditions hold.

    Args:
        tokens: length S of the sequence. Positions count from 0.
        causal: keys up to the query's position.
        window: keys after ``query - window``, and, unless ``causal``, before ``query + window``.
        documents: ``(B, S)`` or ``(1, S)``, integers: keys with the query's number.
        keys: ``(B, S)`` or ``(1, S)``, bool: keys that are True; padding is False.
        rule: keys for which it gives True. A mask function of Hugging Face's is one.
        bias: broadcastable to ``(B, H, S, S)``: of dtype bool, keys that are True; otherwise it is added to the logits.

    Raises:
        ValueError: of a window less than 1, or of tensors of another length.
    """

    tokens: int
    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    keys: Tensor | None = None
    rule: Rule | None = None
    bias: Tensor | None = None
    _extents: dict[range, list[tuple[int, int]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a query sees its own position at least, so give 1 or more")
        for name, x in (("documents", self.documents), ("keys", self.keys)):
            if x is not None and (x.ndim != 2 or x.shape[1] != self.tokens):
                raise ValueError(f"{name} of shape {tuple(x.shape)}: give one entry a token, (batch, {self.tokens})")
        if self.bias is not None and not all(n in (1, self.tokens) for n in self.bias.shape[-2:]):
            raise ValueError(f"bias of shape {tuple(self.bias.shape)}: it must broadcast to (B, H, {self.tokens}, {self.tokens})")

    @cached_property
    def borders(self) -> tuple[int, ...] | None:
        """Positions of the first tokens of documents, but for position 0, where one sample alone has documents; else None."""
        if self.documents is None or len(self.documents) > 1:
            return None
        return tuple((self._documents_on_host[0].diff().nonzero().flatten() + 1).tolist())

    def document_at(self, position: int) -> int:
        """Returns the number of a token's document, of a mask with documents of one sample."""
        return int(self._documents_on_host[0, position])

    @property
    def has_tensors(self) -> bool:
        """Whether a condition needs more than numbers: which pairs are visible depends on more than their distance."""
        return (self.documents, self.keys, self.rule, self.bias) != (None,) * 4

    def relation(self, queries: range, keys: range) -> Relation:
        """What a range of positions sees of another one, in all samples and heads.

        PARTIAL is always right, and is the answer where nothing better is known at the cost of reading each token once: of a rule
        nothing is known, of documents only that those of the queries are all before, or all after, those of the keys.
        """
        if not (queries and keys):
            return Relation.NONE
        joint = Relation.FULL if self.rule is None else Relation.PARTIAL
        for condition in (self._by_position, self._by_documents, self._by_keys, self._by_bias):
            relation = condition(queries, keys)
            if relation is Relation.NONE:
                return relation
            if relation is not Relation.FULL:
                joint = relation if joint is Relation.FULL else Relation.PARTIAL
        return joint

    def visible(self, queries: Tensor, keys: Tensor, batch: int = 1, heads: range = range(1)) -> Tensor:
        """What queries see of keys, for one pair of pieces.

        Args:
            queries: positions, ``(q,)``, int64.
            keys: positions, ``(k,)``, int64, on the same device.
            batch: number B of samples.
            heads: numbers of the heads of the queries, among all heads of the layer.

        Returns:
            Of 2 or 4 dims, broadcastable to ``(B, len(heads), q, k)``: bool; where the bias is added to the logits, what to add.
        """
        distance = queries.unsqueeze(-1) - keys
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= distance < self.window
            if not self.causal:
                seen &= distance > -self.window
        if self.documents is not None:
            documents = self.documents.to(queries.device)
            seen = seen & (documents[:, None, queries, None] == documents[:, None, None, keys])
        if self.keys is not None:
            seen = seen & self.keys.to(queries.device)[:, None, None, keys].bool()
        if self.rule is not None:
            samples, numbers = (torch.tensor(list(indices), device=queries.device) for indices in (range(batch), heads))
            seen = seen & self.rule(samples.view(-1, 1, 1, 1), numbers.view(-1, 1, 1), queries.view(-1, 1), keys)
        if self.bias is None:
            return seen
        bias = self.bias.to(queries.device)[(None,) * (4 - self.bias.ndim)]
        bias = bias if bias.shape[-2] == 1 else bias[..., queries, :]
        bias = bias if bias.shape[-1] == 1 else bias[..., keys]
        bias = bias if bias.shape[1] == 1 else bias[:, heads.start : heads.stop]
        return seen & bias if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)

    def visible_counts(self) -> Tensor:
        """How many keys each query sees, summed over the samples, ``(S,)``, int64, on the CPU.

        Of documents only runs of equal numbers count; ``keys``, ``rule`` and ``bias`` do not count: it is an estimate of work.
        """
        positions = torch.arange(self.tokens)
        first, last = torch.zeros(1, self.tokens, dtype=torch.long), torch.full((1, self.tokens), self.tokens - 1)
        if self.documents is not None:
            borders = self._documents_on_host.diff(dim=1) != 0
            first = F.pad(torch.where(borders, positions[1:], 0), (1, 0)).cummax(1).values
            ends = F.pad(torch.where(borders, positions[:-1], self.tokens), (0, 1), value=self.tokens - 1)
            last = ends.flip(1).cummin(1).values.flip(1)
        if self.causal:
            last = last.clamp(max=positions)
        if self.window is not None:
            first = first.maximum(positions - self.window + 1)
            last = last.minimum(positions + self.window - 1)
        return (last - first + 1).sum(0)

    # -- conditions, each for a range of queries and a range of keys -------------------------------------------------------

    def _by_position(self, queries: range, keys: range) -> Relation:
        # The smallest and the largest distance of a query to a key.
        low, high = queries.start - (keys.stop - 1), queries.stop - 1 - keys.start
        least = 0 if self.causal else -self.tokens if self.window is None else 1 - self.window
        most = self.tokens if self.window is None else self.window - 1
        if high < least or low > most:
            return Relation.NONE
        if low >= least and high <= most:
            return Relation.FULL
        return Relation.DIAGONAL if self.causal and queries == keys and high <= most else Relation.PARTIAL

    def _by_documents(self, queries: range, keys: range) -> Relation:
        if self.documents is None:
            return Relation.FULL
        both = list(zip(self._extent(queries), self._extent(keys), strict=True))
        if all(last < first_key or last_key < first for (first, last), (first_key, last_key) in both):
            return Relation.NONE
        return Relation.FULL if all(mine == of_keys and mine[0] == mine[1] for mine, of_keys in both) else Relation.PARTIAL

    def _extent(self, part: range) -> list[tuple[int, int]]:
        """The smallest and the largest number of its documents, by sample."""
        if part not in self._extents:
            first, last = self._documents_on_host[:, part.start : part.stop].aminmax(dim=1)
            self._extents[part] = list(zip(first.tolist(), last.tolist(), strict=True))
        return self._extents[part]

    # Copied once: each number that is read on a device would wait for all work that is queued there.

    @cached_property
    def _documents_on_host(self) -> Tensor:
        assert self.documents is not None
        return self.documents.cpu()

    @cached_property
    def _keys_on_host(self) -> Tensor:
        assert self.keys is not None
        return self.keys.bool().cpu()

    def _by_keys(self, queries: range, keys: range) -> Relation:
        return Relation.FULL if self.keys is None else _of_pairs(self._keys_on_host[:, keys.start : keys.stop])

    def _by_bias(self, queries: range, keys: range) -> Relation:
        if self.bias is None:
            return Relation.FULL
        bias = self.bias if self.bias.shape[-2] == 1 else self.bias[..., queries.start : queries.stop, :]
        bias = bias if bias.shape[-1] == 1 else bias[..., keys.start : keys.stop]
        if bias.dtype == torch.bool:
            return _of_pairs(bias)
        return Relation.PARTIAL if bool((bias > -torch.inf).any()) else Relation.NONE


def _of_pairs(seen: Tensor) -> Relation:
    return Relation.FULL if bool(seen.all()) else Relation.PARTIAL if bool(seen.any()) else Relation.NONE
