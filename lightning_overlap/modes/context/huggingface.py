"""Models of transformers: their attention calls the seam, and their masks are descriptions instead of matrices.

An attention and a mask function are registered with transformers under a name of ours, and the configs of the modules in the blocks
are switched to it. Import this module only where a model is one of transformers'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.patches import replace_method
from lightning_overlap.modes.context.mask import Mask, Rule
from lightning_overlap.modes.context.options import AttentionOptions
from lightning_overlap.modes.context.seam import attend_locally
from lightning_overlap.torch_seams import IndexedByTensors
from lightning_overlap.transformers_seams import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    attention_of,
    bidirectional_mask_function,
    calls_torch_attention,
    causal_mask_function,
    has_registered_attention,
    set_attention,
)

NAME = "lightning_overlap"
"""Of the attention and the mask function in transformers' registries."""
SAMPLED_ROWS = 64
"""Queries of which all keys are compared with transformers' mask function."""


class _SwitchedName(str):
    """The name of our functions in a config. A copy, or a pickle, of the config has the name from before: it is an ordinary one."""

    before: str | None

    def __new__(cls, before: str | None) -> _SwitchedName:
        name = super().__new__(cls, NAME)
        name.before = before
        return name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _same, (self.before,)


def _same(value: Any) -> Any:
    return value


# -- attention ---------------------------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: by way of the block's seam.

    Args:
        module: the attention.
        query: ``(B, H, s, D)``.
        key: ``(B, Hkv, s, D)``.
        value: like the keys.
        attention_mask: of :func:`mask`, or what the user passed, or made in the model, with 4 dims.
        scaling: of the logits.
        dropout: the probability.
        options: ``softcap`` of the logits; ``s_aux``: sinks, ``(H,)``; ``is_causal``: whether attention without a mask is causal, if
            the module does not say; ``output_attentions`` and ``position_bias`` (a learned one, of T5) are refused; the rest tells
            nothing that the mask does not.

    Returns:
        ``(B, s, H, D)``, and None where there would be weights.

    Raises:
        ConfigError: something of this cannot be sharded.
    """
    who = f"{type(module).__name__} of transformers"
    if options.get("output_attentions"):
        raise ConfigError(f"{who} is asked for output_attentions: {_NO_WEIGHTS}")
    if options.get("position_bias") is not None:
        raise ConfigError(
            f"{who} adds a learned position bias to its logits, whose gradient context parallelism does not compute: set "
            "context_parallel: 1"
        )
    documents = isinstance(attention_mask, Mask) and attention_mask.documents is not None
    if options.get("cu_seq_lens_q") is not None and not documents and _is_flash(getattr(module, "config", None)):
        raise ConfigError(
            f"{who} is given borders of documents (cu_seq_lens_q) without position_ids that restart at them, from which transformers' "
            "mask function takes them: pass both"
        )
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
    chosen = AttentionOptions(scale=scaling, dropout=dropout, softcap=options.get("softcap"), sinks=options.get("s_aux"))
    output = attend_locally(query, key, value, attention_mask, chosen, is_causal=causal)
    return output.transpose(1, 2).contiguous(), None


def _is_flash(config: Any) -> bool:
    """Whether the user asked for flash attention, which takes borders of documents from position ids also where there is a cache."""
    name = attention_of(config)
    return "flash" in str(name.before if isinstance(name, _SwitchedName) else name)


_NO_WEIGHTS = (
    "attention weights are a matrix of all pairs of tokens, which context parallelism never makes. Leave output_attentions out, or "
    "set context_parallel: 1"
)


# -- masks -------------------------------------------------------------------------------------------------------------------------


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Mask:
    """The mask of transformers' mask function, described: no matrix of all pairs is made. Cost and memory grow with the tokens.

    transformers calls this before the blocks, once a forward and kind of layer, and hands what it gives to the attentions.

    Args:
        batch_size: B.
        q_length: number of queries, S.
        kv_length: number of keys, S.
        q_offset: position of the first query; 0.
        kv_offset: position of the first key; 0.
        mask_function: tells of indices of sample, head, query and key whether the query sees the key.
        attention_mask: ``(B, S)``, bool: keys that count.
        options: ``local_size``: a window, or the size of chunks; ``use_vmap``: whether a part of the function is the user's, which
            takes numbers, not tensors of them, and may be anything; ``device`` of the mask.

    Raises:
        ConfigError: queries and keys are not the same tokens.
    """
    length = kv_length if attention_mask is None else max(kv_length, attention_mask.shape[-1])
    if int(q_offset) or kv_offset or length != q_length:
        raise ConfigError(
            f"a model of transformers is called with {q_length} tokens and a mask or a cache of {length}, from position "
            f"{int(q_offset)} on: under context parallelism a forward sees the whole sequence at once. Leave prefix tokens, and "
            "caches that you fill yourself, out, or set context_parallel: 1"
        )
    keys = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    if mask_function is causal_mask_function or mask_function is bidirectional_mask_function:
        return Mask(q_length, causal=mask_function is causal_mask_function, keys=keys)
    if options.get("use_vmap"):
        return Mask(q_length, keys=keys, rule=partial(_by_numbers, mask_function))
    device = options.get("device", "cpu")
    described = _describe(mask_function, batch_size, q_length, options.get("local_size") or None, device)
    rows = _sample(described, device)
    if not _agree(described, mask_function, rows, batch_size, device):
        warnings.warn(
            f"a mask of {q_length} tokens is neither causal, windowed nor of documents: each pair of tokens is computed when it is "
            "used, and all keys and values are exchanged, which is slower",
            stacklevel=2,
        )
        return Mask(q_length, keys=keys, rule=mask_function)
    return Mask(q_length, described.causal, described.window, described.documents, keys)


def _by_numbers(function: Callable[..., Tensor], *indices: Tensor) -> Tensor:
    """A function of single numbers for tensors of them, which broadcast."""
    together = torch.broadcast_tensors(*indices)
    with IndexedByTensors():
        seen: Tensor = torch.vmap(function)(*(x.reshape(-1) for x in together))
    return seen.view(together[0].shape)


def _describe(rule: Rule, batch: int, tokens: int, local_size: int | None, device: torch.device | str) -> Mask:
    """A description that fits the function where neighbours are concerned."""
    samples, head = torch.arange(batch, device=device).view(-1, 1), torch.zeros((), dtype=torch.long, device=device)
    left, right = (torch.arange(first, tokens - 1 + first, device=device).view(1, -1) for first in (0, 1))
    shape = (batch, max(tokens - 1, 0))
    sees_past = rule(samples, head, right, left).expand(shape)
    causal = not bool(rule(samples, head, left, right).expand(shape).any())
    documents = torch.nn.functional.pad((~sees_past).cumsum(1), (1, 0))
    # A window to both sides has its last key in it.
    window = local_size if local_size is None or causal else local_size + 1
    return Mask(tokens, causal, window, documents if bool(documents.any()) else None)


def _sample(described: Mask, device: torch.device | str) -> Tensor:
    """Queries that tell a wrong description: spread over the sequence, and at borders of documents."""
    spread = torch.linspace(0, described.tokens - 1, min(SAMPLED_ROWS, described.tokens), device=device).long()
    if described.documents is None:
        return spread
    borders = (described.documents.diff(dim=1) != 0).any(0).nonzero().view(-1)[: SAMPLED_ROWS // 4]
    return torch.cat([spread, borders, borders + 1]).unique()


def _agree(described: Mask, rule: Rule, queries: Tensor, batch: int, device: torch.device | str) -> bool:
    """Whether a description and a mask function say the same of some queries and all keys."""
    keys, samples = torch.arange(described.tokens, device=device), torch.arange(batch, device=device)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    expected = rule(samples.view(-1, 1, 1, 1), head, queries.view(-1, 1), keys)
    return bool((described.visible(queries, keys, batch) == expected).all())


def name_attention(module: nn.Module) -> None:
    """Has the attentions in a module call the seam, as long as it lives."""
    for config in _configs(module.modules()):
        set_attention(config, _SwitchedName(attention_of(config)))


def _configs(modules: Iterable[nn.Module]) -> Iterable[PreTrainedConfig]:
    """The configs of modules, each once."""
    return {id(c): c for module in modules if isinstance(c := getattr(module, "config", None), PreTrainedConfig)}.values()


# -- the model ---------------------------------------------------------------------------------------------------------------------


class Switch:
    """Has the attentions in the blocks of a model call the seam, until :meth:`undo`.

    ``generate``, and a forward that is given a cache, run as they are, with all tokens on every rank: :attr:`is_unsharded` tells.

    Args:
        model: the user's.
        blocks: the stack of blocks.

    Raises:
        ConfigError: the model asks for what cannot be sharded.

    Attributes:
        is_unsharded: whether such a forward runs.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        self.is_unsharded = False
        self._undo: list[Callable[[], None]] = []
        around = _models_around(model, blocks)
        parts = [*around[-1:], *(module for block in blocks for module in block.modules())]
        for part in around[-1:]:
            if not has_registered_attention(part) and not calls_torch_attention(part):
                raise ConfigError(
                    f"{type(part).__name__} of transformers computes its attention itself, where context parallelism cannot take it "
                    "over: set context_parallel: 1"
                )
        if not all(map(has_registered_attention, around[-1:])):
            parts = []  # what calls torch's attention is taken over where it does
        self._names = [(config, attention_of(config)) for config in _configs(parts)]
        for config, _ in self._names:
            if config.output_attentions:
                raise ConfigError(f"the config of {type(config).__name__} has output_attentions: {_NO_WEIGHTS}")
        self._name_ours()
        for part in around:
            generate: Any = getattr(part, "generate", None)
            if generate is not None:
                self._undo.append(replace_method(part, "generate", self._generate(generate)))
        for part in around[-1:]:
            self._undo.append(replace_method(part, "forward", self._forward(part, part.forward)))

    def undo(self) -> None:
        """The attentions are those from before."""
        for restore in reversed(self._undo):
            restore()
        self._name_theirs()

    def _name_ours(self) -> None:
        for config, name in self._names:
            set_attention(config, _SwitchedName(name))

    def _name_theirs(self) -> None:
        for config, name in self._names:
            set_attention(config, name)

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        outer, self.is_unsharded = self.is_unsharded, True
        self._name_theirs()
        try:
            yield
        finally:
            self.is_unsharded = outer
            if not outer:
                self._name_ours()

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._unsharded():
                return generate(*args, **kwargs)

        return run

    def _forward(self, around: PreTrainedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model around the blocks, where it is known whether a cache is given."""
        parameters = signature(forward)

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            cache = parameters.bind_partial(*args, **kwargs).arguments.get("past_key_values")
            if getattr(cache, _LOCAL, False):
                raise ConfigError(
                    "a model of transformers is given a cache that an earlier forward has made under context parallelism: it holds "
                    "the keys of this rank's tokens only. Call generate, or pass an empty cache (transformers.DynamicCache()) to the "
                    "first forward, which then runs with all tokens on every rank"
                )
            if cache is not None or self.is_unsharded:
                with self._unsharded():
                    return forward(*args, **kwargs)
            if _is_flash(around.config):
                kwargs["use_cache"] = False  # with a cache, transformers' mask function does not look at position ids
            output = forward(*args, **kwargs)
            for part in output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ():
                if isinstance(part, Cache):
                    setattr(part, _LOCAL, True)
            return output

        return run


_LOCAL = "_lightning_overlap_local"
"""Attribute of a cache that holds the keys of one rank's tokens."""


def _models_around(model: nn.Module, blocks: Sequence[nn.Module]) -> list[PreTrainedModel]:
    """The models of transformers that the blocks are a part of, from the outermost one on."""
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module is not blocks[0] and any(part is blocks[0] for part in module.modules())
    ]
