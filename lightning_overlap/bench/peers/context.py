"""Peers of context parallelism: DeepSpeed's Ulysses and torch's ring, each in the place of this package's attention.

They train the same module, with the same cut of the tokens and the same reduction of gradients: only the attention is theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F

from lightning_overlap.bench.peers import Peer
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes import MODES
from lightning_overlap.modes.base import Setup
from lightning_overlap.modes.context import CONTEXT
from lightning_overlap.modes.context.config import ContextChoices, ContextParallel
from lightning_overlap.modes.context.deferred import completed
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.mode import ContextMode
from lightning_overlap.modes.context.options import PLAIN, AttentionOptions
from lightning_overlap.strategy.strategy import OverlapStrategy


class PeerAttention(ABC):
    """Attention over the tokens of all ranks, by another library. It is called as this package's attention.

    Attributes:
        order: the tokens that a rank must have, as in :class:`~lightning_overlap.modes.context.config.ContextParallel`.
    """

    order: ClassVar[Literal["balanced", "contiguous"]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: TokenLayout, options: AttentionOptions = PLAIN) -> Tensor:
        """See :class:`~lightning_overlap.modes.context.attention.ContextAttention`."""
        q, k, v = map(completed, (q, k, v))
        lengths = {layout.count(rank) for rank in range(layout.size)}
        has_more = options.softcap is not None or options.sinks is not None
        if mask.has_tensors or mask.window is not None or has_more or len(lengths) > 1:
            raise ConfigError(
                "this peer is measured with causal and full masks, no soft caps or sinks, and sequences that the ranks divide"
            )
        grouped = q.shape[1] != k.shape[1]
        return self.compute(q, k, v, is_causal=mask.causal, scale=options.scale, dropout_p=options.dropout, enable_gqa=grouped)

    @abstractmethod
    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The output for this rank's tokens; ``options`` are those of torch's attention. Collective over the world."""


class Ulysses(PeerAttention):
    """DeepSpeed's attention by heads (S. A. Jacobs et al., 2023), with torch's attention of this rank's heads.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """

    order: ClassVar[Literal["balanced", "contiguous"]] = "contiguous"

    def __init__(self) -> None:
        try:
            comm, layer = import_module("deepspeed.comm"), import_module("deepspeed.sequence.layer")
        except ImportError as error:
            raise ConfigError(f"DeepSpeed cannot be imported ({error}): pip install deepspeed") from error
        comm.init_distributed(dist.get_backend(), verbose=False)
        self._attention = layer.DistributedAttention(_attention_of_heads, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        output: Tensor = self._attention(*(x.transpose(1, 2) for x in (q, k, v)), 0, **options)
        return output.transpose(1, 2)


def _attention_of_heads(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of whole sequences ``(B, S, heads, D)``."""
    output = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    return output.transpose(1, 2)


class Ring(PeerAttention):
    """torch's ``context_parallel``, which passes whole parts around. It was not run on CUDA yet; on CPU torch has no kernel for it.

    Raises:
        ConfigError: torch cannot compute it on this device.
    """

    order: ClassVar[Literal["balanced", "contiguous"]] = "balanced"

    def __init__(self, device: torch.device) -> None:
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Torch shards a tensor when the context is entered. Those of the model are sharded already.
        self._tensor = torch.empty(2 * self._mesh.size(), device=device)
        try:
            self.compute(*torch.zeros(3, 1, 1, 2, 8, device=device), is_causal=True)
        except NotImplementedError as error:
            raise ConfigError(f"torch's context_parallel has no causal attention on this device ({error})") from error

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        output: Tensor = _RingAttention.apply(q, k, v, self._inside, options)
        return output

    def _inside(self, function: Callable[[], Any]) -> Any:
        """Calls a function inside of torch's context."""
        with context_parallel(self._mesh, buffers=[self._tensor], buffer_seq_dims=[0]), torch.enable_grad():
            return function()


class _RingAttention(Function):
    """Runs forward and backward of torch's attention inside of a context."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, inside: Callable[[Callable[[], Any]], Any], options: dict[str, Any]
    ) -> Tensor:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        output: Tensor = inside(lambda: F.scaled_dot_product_attention(q, k, v, **options))
        ctx.inputs, ctx.output, ctx.inside = (q, k, v), output, inside
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *ctx.inside(lambda: torch.autograd.grad(ctx.output, ctx.inputs, grad)), None, None


class _PeerMode(ContextMode):
    """The context mode with another library's attention."""

    peer: ClassVar[PeerAttention]

    def __init__(self, config: ContextParallel, choices: ContextChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self._attention = self.peer  # type: ignore[assignment]


def _strategy(config: OverlapConfig, attention: PeerAttention, backend: str) -> OverlapStrategy:
    """Trains with the user's configuration, but for the attention."""
    mode_type = type("PeerMode", (_PeerMode,), {"peer": attention})
    modes = tuple(replace(mode, mode_type=mode_type) if mode is CONTEXT else mode for mode in MODES)
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values["context_parallel"] = replace(config.context_parallel, order=attention.order)
    made = OverlapStrategy(process_group_backend=backend)
    made.config = type("PeerConfig", (OverlapConfig,), {"modes": modes})(**values)
    return made


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`."""

    def strategy(make: Callable[[], PeerAttention]) -> Callable[[], OverlapStrategy]:
        return lambda: _strategy(config, make(), backend)

    def same(module: LightningModule) -> LightningModule:
        return module

    return {name: (strategy(make), same) for name, make in attentions(backend).items()}


def attentions(backend: str) -> dict[str, Callable[[], PeerAttention]]:
    """The peers by name. Each is made when the world has met, or raises a ConfigError."""

    def ring() -> Ring:
        return Ring(torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu"))

    return {"DeepSpeed Ulysses": Ulysses, "torch context_parallel": ring}
