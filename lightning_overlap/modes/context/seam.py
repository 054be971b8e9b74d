"""Attention inside the blocks goes to a function of ours: the place where a rank's queries meet the keys of all ranks.

``F.scaled_dot_product_attention`` and torch's multi-head attention are taken over while a block, or a module in it, runs: also when an
activation checkpoint runs it again in backward. Attention outside the blocks (a vision tower) stays as it is. Dropout draws masks of
this rank there, since the ranks have different tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.patches import replace_method
from lightning_overlap.modes.context.deferred import DeferredValues, Deferring
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import AttentionOptions
from lightning_overlap.steps.dropout import DROPOUT_FUNCTIONS, drops, drops_samples, original, rank_numbers
from lightning_overlap.torch_seams import is_compiled, saved_tensor_hooks

TORCH_ATTENTION = F.scaled_dot_product_attention
"""Torch's function itself: the name may have another one for a time, which calls it (without dropout, say)."""


class Attend(Protocol):
    """Attention of this rank's queries to the keys of all ranks."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        """Gives ``(B, H, s, D)``.

        Args:
            q: queries of this rank's tokens, ``(B, H, s, D)``.
            k: keys of this rank's tokens, ``(B, Hkv, s, D)``; H is a multiple of Hkv.
            v: values, like the keys.
            mask: which keys of the whole sequence each query sees.
            options: of the attention.
        """


def attend_locally(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, options: AttentionOptions, *, is_causal: bool
) -> Tensor:
    """Attention of a model that calls us by name (Hugging Face's). A block's seam takes it, as it takes torch's own function.

    Args:
        q: as in :class:`Attend`; so are ``k`` and ``v``.
        mask: a tensor: broadcastable to ``(B, H, S, S)``.
        options: of the attention.
        is_causal: whether attention is causal if there is no mask.

    Raises:
        ConfigError: it is called outside the blocks.
    """
    if not has_torch_function((q, k, v)):
        raise ConfigError(
            "an attention outside the blocks has the same config as those inside (an encoder beside a decoder, say): context "
            "parallelism shards one stack of blocks. Give the other one a copy of the config, or set context_parallel: 1"
        )
    result: Tensor = handle_torch_function(attend_locally, (q, k, v), q, k, v, mask, options, is_causal=is_causal)
    return result


def install(
    blocks: Mapping[str, nn.Module],
    attend: Attend,
    local: Callable[[], LocalTokens | None],
    *,
    attentionless: frozenset[str] = frozenset(),
    deferred: Iterable[nn.Linear] = (),
) -> Callable[[], None]:
    """Takes over the attention inside blocks.

    Args:
        blocks: by name.
        attend: what is called in the place of an attention.
        local: this rank's tokens in the present forward, or in the one whose backward runs; None: all of them, and attention is what
            the user wrote.
        attentionless: names of blocks that need no attention (with the role ``token_wise``).
        deferred: layers whose output is computed when it is read, if it can be.

    Returns:
        A function that gives the blocks their attention back.
    """
    undo: list[Callable[[], None]] = []
    inside = _Inside(Deferring(deferred))
    for name, block in blocks.items():
        for path, module in [(name, block), *_parts(block, name)]:
            must_attend = module is block and name not in attentionless
            forward = _forward(module, path, attend, local, inside, must_attend=must_attend)
            undo.append(replace_method(module, "forward", forward))

    def remove() -> None:
        for restore in reversed(undo):
            restore()

    return remove


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module that an attention may be called in: not torch's single layers. Compiled ones would lose their code."""
    for key, part in module.named_children():
        if not is_compiled(part):
            if any(part.children()) or not type(part).__module__.startswith("torch.nn."):
                yield f"{name}.{key}", part
            yield from _parts(part, f"{name}.{key}")


def _forward(
    module: nn.Module,
    name: str,
    attend: Attend,
    local: Callable[[], LocalTokens | None],
    inside: _Inside,
    *,
    must_attend: bool,
) -> Callable[..., Any]:
    """The forward of a block, or of a module in one, with the seam around it."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        part = local()
        if part is None:
            return forward(*args, **kwargs)
        with inside.enter(name, attend, part) as seam:
            before = seam.calls
            output = forward(*args, **kwargs)
        if must_attend and seam.calls == before:
            raise ConfigError(
                f"{name} has run without a call of F.scaled_dot_product_attention (or of Hugging Face's attention functions): an "
                "attention that context parallelism cannot take over sees this rank's tokens only, and would train another model. "
                "Write the block's attention with F.scaled_dot_product_attention. If the block has none, give it the role token_wise "
                "in parallel_plan"
            )
        return output

    return run


class _Inside(threading.local):
    """The seam that is active in a thread, and what was active in autograd when the innermost module was entered.

    Args:
        deferring: says which layers are computed later.
    """

    seam: _Seam | None = None
    autograd: Any = None

    def __init__(self, deferring: Deferring) -> None:
        self.deferring = deferring

    @contextmanager
    def enter(self, name: str, attend: Attend, local: LocalTokens) -> Iterator[_Seam]:
        outer, autograd = self.seam, self.autograd
        self.autograd = _autograd()
        try:
            if outer is not None:  # a module in a block that runs: each function would go through both seams
                yield outer
                return
            self.seam = _Seam(name, attend, local, self)
            with self.seam:
                yield self.seam
        finally:
            self.seam, self.autograd = outer, autograd


def _autograd() -> Any:
    return torch.is_grad_enabled(), saved_tensor_hooks()


class _Seam(TorchFunctionMode):
    """Inside, calls of attention go to ours.

    Args:
        name: of the module, for errors.
        attend: what is called.
        local: this rank's tokens.
        inside: the state of this thread.

    Attributes:
        calls: the number of attentions so far.
    """

    def __init__(self, name: str, attend: Attend, local: LocalTokens, inside: _Inside) -> None:
        super().__init__()
        self.calls = 0
        self._name, self._attend, self._local, self._inside = name, attend, local, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is TORCH_ATTENTION:
            return self._product_attention(*args, **kwargs)
        if func is attend_locally:
            return self._named_attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func is F.linear and self._inside.deferring.takes(*args, **kwargs) and self._inside.autograd == _autograd():
            return DeferredValues.of(*args, **kwargs)
        if original(func) in DROPOUT_FUNCTIONS and self._local.rank is not None and drops(args, kwargs):
            x: Tensor = args[0] if args else kwargs["input"]
            if not drops_samples(x):
                with rank_numbers(self._local.rank, x.device):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    # -- the functions that are taken over -----------------------------------------------------------------------------------

    def _product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dim() == 3:
            bias = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
            q, k, v = (x.unsqueeze(1) for x in (query, key, value))
            return self._product_attention(q, k, v, bias, dropout_p, is_causal, scale).squeeze(1)
        mask = Mask(self._local.tokens, causal=is_causal) if attn_mask is None else self._mask_of(attn_mask)
        return self._call(query, key, value, mask, AttentionOptions(scale=scale, dropout=dropout_p))

    def _named_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions, *, is_causal: bool) -> Tensor:
        if mask is None:
            mask = Mask(self._local.tokens, causal=is_causal)
        return self._call(q, k, v, self._mask_of(mask) if isinstance(mask, Tensor) else mask, options)

    def _multi_head(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``nn.MultiheadAttention``'s function, which does not reach ours from inside: tokens are its first dim, ``(s, B, E)``."""
        given = _MULTI_HEAD.bind(query, key, value, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        plain = key is query and value is query and query.dim() == 3 and not options["use_separate_proj_weight"]
        if not plain or options["need_weights"] or options["bias_k"] is not None or options["add_zero_attn"]:
            raise ConfigError(
                f"{self._name} calls nn.MultiheadAttention with need_weights=True, other keys than queries, bias_k, add_zero_attn or "
                f"without a batch dim, {_NOT_SHARED}"
            )
        qkv = F.linear(query, options["in_proj_weight"], options["in_proj_bias"]).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (options["num_heads"], -1)).permute(1, 2, 0, 3) for x in qkv)
        # As torch has it, the flag says in a word what the mask says in a matrix.
        causal, bias, padding = options["is_causal"], options["attn_mask"], options["key_padding_mask"]
        mask = Mask(
            self._local.tokens,
            causal=causal,
            keys=None if padding is None else self._keys(padding),
            bias=None if causal or bias is None else self._checked(_allowed(bias, options["num_heads"])),
        )
        dropout = options["dropout_p"] if options["training"] else 0.0
        output = self._call(q, k, v, mask, AttentionOptions(dropout=dropout))
        return F.linear(output.permute(2, 0, 1, 3).flatten(-2), options["out_proj_weight"], options["out_proj_bias"]), None

    def _call(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: AttentionOptions) -> Tensor:
        self._check(q, k, v, mask)
        self.calls += 1
        return self._attend(q, k, v, mask, options)

    # -- checks --------------------------------------------------------------------------------------------------------------

    def _check(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
        local = self._local
        if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3] or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ConfigError(
                f"{self._name} calls attention with queries, keys and values of shapes {shapes}: context parallelism takes (batch, "
                "heads, tokens, features), with as many heads of queries as of keys, or a multiple"
            )
        # A checkpoint may run a block of an earlier call of the model again, whose mask tells of its own sequence.
        is_of_this_call = mask.tokens == local.tokens
        if is_of_this_call and (lengths := (q.shape[2], k.shape[2])) != (local.count, local.count):
            raise ConfigError(
                f"{self._name} calls attention with {lengths[0]} queries and {lengths[1]} keys, where this rank has {local.count} of "
                f"the {local.tokens} tokens: under context parallelism a block attends to the tokens that it is called with. Cross "
                "attention, caches, memory and prefix tokens inside the blocks are not possible; set context_parallel: 1"
            )
        if self._inside.autograd != _autograd():
            raise ConfigError(
                f"{self._name} calls attention inside a checkpoint of a function (or under no_grad) within its forward: when backward "
                "runs the function again, context parallelism would not see it. Put the checkpoint around a module "
                "(checkpoint(self.attention, x, use_reentrant=False))"
            )

    def _mask_of(self, bias: Tensor) -> Mask:
        return self._local.mask_of(self._checked(bias))

    def _checked(self, bias: Tensor) -> Tensor:
        tokens = self._local.tokens
        if bias.requires_grad:
            raise ConfigError(f"{self._name} calls attention with a mask that gradients flow through (a learned bias), {_NOT_SHARED}")
        if bias.dim() < 2 or any(length not in (1, tokens) for length in bias.shape[-2:]):
            raise ConfigError(
                f"{self._name} calls attention with a mask of shape {tuple(bias.shape)}, where the sequence has {tokens} tokens and "
                f"this rank {self._local.count} of them: a mask must be made for the whole sequence, (..., {tokens}, {tokens}). Pass "
                "it to the block as an argument, or pass is_causal=True"
            )
        return bias

    def _keys(self, padding: Tensor) -> Tensor:
        """Keys that count, ``(B, S)``, bool, of torch's ``key_padding_mask``: True, or minus infinity, where a key is padding."""
        tokens = self._local.tokens
        if padding.shape[-1] != tokens or (padding.is_floating_point() and not ((padding == 0) | padding.isneginf()).all()):
            raise ConfigError(
                f"{self._name} is called with a key_padding_mask of shape {tuple(padding.shape)}: give one of the whole sequence, "
                f"(batch, {tokens}), of dtype bool"
            )
        return padding == 0 if padding.is_floating_point() else ~padding


_MULTI_HEAD = signature(F.multi_head_attention_forward)
_NOT_SHARED = "which context parallelism cannot shard: write it with F.scaled_dot_product_attention, or set context_parallel: 1"


def _allowed(mask: Tensor, heads: int) -> Tensor:
    """A mask of ``nn.MultiheadAttention``, ``(S, S)`` or ``(B * H, S, S)``, where True hides a key, as one of torch's attention."""
    mask = ~mask if mask.dtype == torch.bool else mask
    return mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask
