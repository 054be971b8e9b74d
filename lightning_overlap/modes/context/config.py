"""Configuration and gates of context parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_overlap.decision import Choice, Choices, ConfigError, check_count, check_flags, check_switch, check_word, refuse, settle
from lightning_overlap.facts import Facts, Room
from lightning_overlap.ranks.degrees import Degrees, larger_sizes

ADVICE = {
    "bytes": "method: a2a, whose traffic does not grow with the number of ranks; or fewer ranks on this axis",
    "": "more pieces, longer sequences, or another method",
}
"""By kind of transfer, what may help where it is exposed."""
Method = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
METHODS: tuple[Method, ...] = ("p2p", "all_gather", "a2a", "a2a+p2p")
KINDS = ("full_attention", "sliding_attention")
"""Kinds of attention, as models of transformers name their layers: ``sliding_attention`` has a window."""
BY_MASK: Literal["by mask"] = "by mask"
"""The method of an attention is chosen when its mask is known."""
ORDERS = ("balanced", "contiguous")
BOUNDARIES = ("loss", "blocks", "batch")
CAUSAL_SHARE = 0.75
"""Of the keys and values of a full ring, those that a causal mask needs when ranks have an early and a late part each."""


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """Context parallelism: the tokens of each sequence are sharded over the ranks, which share each batch."""

    size: int = 1
    """Ranks along the axis."""
    method: Method | Literal["auto"] | Mapping[str, str] = field(default="auto", hash=False)
    """How attention sees all keys. ``p2p``: each rank receives the pieces of keys and values that its queries see. ``all_gather``:
    every rank receives all of them. ``a2a``: ranks exchange tokens for heads (DeepSpeed-Ulysses). ``a2a+p2p``: a2a between the ranks
    of an inner group, p2p between groups. ``auto``: p2p or a2a, whichever sends fewer bytes under a mask. A mapping gives kinds of
    attention a method each: ``{full_attention: p2p, sliding_attention: all_gather}``. ``sliding_attention`` has a window,
    ``full_attention`` is any other, and a kind that is left out is ``auto``."""
    hierarchical_sizes: Sequence[int] | None = field(default=None, hash=False)
    """Of ``a2a+p2p``: ranks of an inner group, and the number of groups; their product is ``size``."""
    order: Literal["auto", "balanced", "contiguous"] = "auto"
    """Which tokens a rank has. ``balanced``: an early and a late part, which have the same work under a causal mask.
    ``contiguous``: one part, which suits windows. ``auto``: by the mask of each batch; ``balanced`` with ``boundary: batch``, since no
    mask is known yet."""
    boundary: Literal["auto", "loss", "blocks", "batch"] = "auto"
    """Where tokens are sharded. ``loss``: from the first block to the loss. ``blocks``: from the first to the last block. ``batch``:
    from the batch to the loss; a rank makes embeddings of its tokens only, for sequences whose embeddings do not fit. Token ids and
    labels stay unsharded, so that positions and the shift of labels are those of the whole sequence."""
    pieces: int = 8
    """Pieces in which a rank receives the keys and values of all others, of ``p2p`` and ``all_gather``. More of them hide more of the
    transfers, and make smaller products."""
    overlap: bool | Literal["auto"] = "auto"
    """Pieces travel while others are used."""
    verify_blocks: bool = True
    """In the first training step, the output and gradients of the first block of each kind are compared with an unsharded copy's,
    unless the whole step is compared (``verify_first_step``)."""

    def __post_init__(self) -> None:
        check_count("context_parallel.size", self.size)
        self._check_methods()
        check_word("context_parallel.order", self.order, ("auto", *ORDERS))
        check_word("context_parallel.boundary", self.boundary, ("auto", *BOUNDARIES))
        check_switch("context_parallel.overlap", self.overlap)
        check_flags("context_parallel", self)
        check_count("context_parallel.pieces", self.pieces)
        sizes = self.hierarchical_sizes
        if (sizes is None) == ("a2a+p2p" in self.methods.values()):
            raise ConfigError(
                "context_parallel.hierarchical_sizes and context_parallel.method: a2a+p2p belong together: give both, such as "
                "hierarchical_sizes: [2, 2] for 4 ranks, or neither"
            )
        if sizes is not None:
            for size in sizes:
                check_count("context_parallel.hierarchical_sizes", size)
            if len(sizes) != 2 or sizes[0] * sizes[1] != self.size:
                raise ConfigError(
                    f"context_parallel.hierarchical_sizes: {list(sizes)} must be two sizes whose product is "
                    f"context_parallel.size={self.size}"
                )

    def _check_methods(self) -> None:
        if not isinstance(self.method, Mapping):
            check_word("context_parallel.method", self.method, ("auto", *METHODS))
            return
        for kind, method in self.method.items():
            if kind not in KINDS:
                raise ConfigError(
                    f"context_parallel.method has the kind of attention {kind!r}: known are {' and '.join(KINDS)}, and attention "
                    "without a window (also in chunks) is full_attention"
                )
            check_word(f"context_parallel.method[{kind}]", method, ("auto", *METHODS))

    @property
    def methods(self) -> dict[str, str]:
        """By kind of attention, the configured method."""
        given = self.method if isinstance(self.method, Mapping) else dict.fromkeys(KINDS, self.method)
        return {kind: given.get(kind, "auto") for kind in KINDS}


@dataclass(frozen=True)
class ContextFacts:
    """What context parallelism looks at in a model.

    Attributes:
        summary: the list of blocks.
        heads: query heads of an attention; None if the model does not tell.
        kv_heads: key and value heads; None if the model does not tell.
        mixers: modules in the blocks that mix tokens and are no attention.
        embeddings: modules that make hidden states before the blocks, token by token.
        compiled: modules that are compiled.
    """

    summary: str
    heads: int | None = None
    kv_heads: int | None = None
    mixers: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContextChoices(Choices):
    """What was decided for context parallelism; for its settings see :class:`ContextParallel`.

    Attributes:
        method: how attention sees all keys.
        methods: the same by kind of attention, a name of :data:`METHODS` or :data:`BY_MASK`.
        order: which tokens a rank has.
        boundary: where tokens are sharded.
        pieces: in which a rank receives the keys and values of all others.
        overlap: pieces travel while others are used.
    """

    method: Choice[str]
    methods: Mapping[str, Method | Literal["by mask"]]
    order: Choice[str]
    boundary: Choice[str]
    pieces: Choice[int]
    overlap: Choice[bool]


def decide(config: ContextParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> ContextChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if config.size == 1:
        for name in ("method", "order", "boundary", "overlap"):
            if (asked := getattr(config, name)) not in ("auto", False):
                value = "true" if asked is True else asked
                raise ConfigError(f"context_parallel.{name}: {value} needs context_parallel.size of at least 2")
        return None
    model = facts.of(ContextFacts)
    mixers, compiled = (model.mixers, model.compiled) if model is not None else ((), ())
    refuse(
        f"context_parallel.size={config.size}",
        [
            (
                bool(mixers),
                f"{', '.join(mixers[:3])} mixes tokens and is no attention: a rank would mix its own tokens only. If it works on "
                "each token by itself, give it the role token_wise in parallel_plan",
            ),
            (
                facts.compiled,
                f"{', '.join(compiled[:3]) or 'the module'} is compiled, and compiled code does not let attention be replaced: leave "
                "torch.compile out",
            ),
        ],
    )
    method = _method(config, degrees, model)
    return ContextChoices(
        size=Choice(config.size, config.size, "the model is not known yet" if model is None else model.summary),
        method=method,
        methods=_methods(config, method),
        order=_order(config),
        boundary=_boundary(config, degrees, model),
        pieces=Choice(config.pieces, config.pieces, f"a rank receives the keys and values of all others in {config.pieces} parts"),
        overlap=settle(
            "context_parallel.overlap",
            config.overlap,
            best=True,
            otherwise=False,
            because="keys and values travel while earlier ones are used, and their gradients while later ones are computed",
            overlap=overlap,
        ),
    )


def _order(config: ContextParallel) -> Choice[str]:
    if config.order != "auto":
        return Choice(config.order, config.order, "as configured")
    if config.boundary == "batch":
        return Choice("balanced", "auto", "embeddings are sharded before a mask is known")
    return Choice("by mask", "auto", "balanced if causal, else contiguous; by documents if packed")


def _boundary(config: ContextParallel, degrees: Degrees, model: ContextFacts | None) -> Choice[str]:
    if config.boundary == "blocks":
        return Choice("blocks", "blocks", "every rank has all tokens after the last block; norm, head and loss run on all of them")
    if config.boundary != "batch":
        return Choice(
            "loss", config.boundary, "blocks, final norm and head run on a rank's tokens; embeddings and labels are unsharded"
        )
    refuse(
        "context_parallel.boundary: batch",
        [
            (
                degrees.pipeline > 1,
                "in a pipeline every stage takes unsharded embeddings, of one microbatch at a time: set boundary: loss",
            ),
            (
                model is not None and not model.embeddings,
                "the model has no nn.Embedding outside of the blocks: give the module that makes the hidden states, token by token, "
                "the role token_wise in parallel_plan, or set boundary: loss",
            ),
        ],
    )
    names = "embeddings" if model is None else ", ".join(model.embeddings)
    return Choice("batch", "batch", f"{names}, blocks, final norm and head run on a rank's tokens; token ids and labels are unsharded")


def _method(config: ContextParallel, degrees: Degrees, model: ContextFacts | None) -> Choice[str]:
    asked = set(config.methods.values())
    if isinstance(config.method, Mapping) and len(asked) > 1:
        words = ", ".join(f"{kind}: {method}" for kind, method in config.methods.items())
        return Choice(words, words, f"by layer, as configured{'; auto is ' + _BY_BYTES if 'auto' in asked else ''}")
    (one,) = asked
    if one != "auto":
        return Choice(one, one, "as configured")
    if model is None or model.heads is None or model.kv_heads is None:
        return Choice(BY_MASK, "auto", _BY_BYTES)
    heads, kv_heads = model.heads // degrees.tensor, max(model.kv_heads // degrees.tensor, 1)
    if heads % config.size:
        return Choice("p2p", "auto", f"{heads} heads do not divide over {config.size} ranks, as a2a needs")
    p2p = CAUSAL_SHARE * (config.size - 1) / config.size * sent_by_p2p(kv_heads)
    a2a = sent_by_a2a(heads, kv_heads, config.size) / config.size
    method, share = ("p2p", p2p / a2a) if p2p <= a2a else ("a2a", a2a / p2p)
    return Choice(BY_MASK, "auto", f"{_BY_BYTES}: {method} for a causal mask, about {share:.0%} of the other's")


_BY_BYTES = "for each mask p2p or a2a, whichever sends fewer bytes (no link is measured)"


def _methods(config: ContextParallel, method: Choice[str]) -> Mapping[str, Method | Literal["by mask"]]:
    names: dict[str, Method | Literal["by mask"]] = {name: name for name in METHODS}
    return {kind: names.get(method.value if asked == "auto" else asked, BY_MASK) for kind, asked in config.methods.items()}


def sent_by_p2p(kv_heads: int) -> float:
    """What a rank receives in the forward of an attention by ``p2p`` for each token whose keys its queries see, in heads."""
    return 2 * kv_heads


def sent_by_a2a(heads: int, kv_heads: int, ranks: int) -> float:
    """What a rank sends in the forward of an attention by ``a2a`` for each of its tokens, in heads: q, k, v and the output."""
    return (2 * heads + 2 * max(kv_heads, min(ranks, heads))) * (ranks - 1) / ranks


def alternatives(config: ContextParallel, degrees: Degrees, facts: Facts, room: Room) -> Iterator[ContextParallel]:
    """See :class:`lightning_overlap.modes.descriptor.Alternatives`."""
    for size in larger_sizes(config.size, degrees.data):
        yield replace(config, size=size)
    if config.size > 1 and config.method == "auto":
        for method in ("p2p", "a2a", "all_gather"):
            yield replace(config, method=method)
