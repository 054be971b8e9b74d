"""The number of ranks of each kind of parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_overlap.decision import ConfigError


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the kinds of parallelism.

    Attributes:
        pipeline: ranks that hold different stages.
        data: ranks that see different samples.
        context: ranks that see different tokens of a sequence.
        tensor: ranks that hold different parts of a layer.
        expert: ranks that hold different experts. It adds no ranks: experts are sharded over the ranks of one pipeline stage,
            whatever these ranks hold of the other layers.

    Raises:
        ConfigError: ``expert`` does not divide the ranks of a stage.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if self.stage % self.expert:
            raise ConfigError(
                f"expert_parallel.size={self.expert} does not divide the {self.stage} ranks of a pipeline stage (data {self.data} x "
                f"context {self.context} x tensor {self.tensor}), over which experts are sharded: use a divisor of {self.stage}"
            )

    @property
    def gradients(self) -> int:
        """Ranks over which the gradients of the same parameters are averaged: they see different samples or different tokens."""
        return self.data * self.context

    @property
    def expert_gradients(self) -> int:
        """Ranks over which the gradients of the same experts are summed, where experts are sharded; otherwise 1."""
        return self.stage // self.expert if self.expert > 1 else 1

    @property
    def experts_span_samples(self) -> bool:
        """Whether the experts of some layer are spread over ranks that see different samples: a batch's ranks are no whole groups."""
        return self.context * self.tensor % self.expert > 0

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.data * self.context * self.tensor

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pipeline * self.stage


def larger_sizes(size: int, free: int) -> list[int]:
    """Returns the next larger sizes of an axis: its size multiplied by each prime factor of the ranks that it may take.

    Args:
        size: ranks along the axis.
        free: ranks along the axis that gives them.
    """
    primes = [p for p in range(2, free + 1) if free % p == 0 and all(p % q for q in range(2, p))]
    return [size * prime for prime in primes]
