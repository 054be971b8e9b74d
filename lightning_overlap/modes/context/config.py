"""Configuration and gates of context parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_overlap.decision import Choice, Choices, ConfigError, check_count, check_switch, check_word, refuse, settle
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees

ADVICE = {
    "bytes": "method: a2a, whose traffic does not grow with the number of ranks; or fewer ranks on this axis",
    "": "more pieces, longer sequences, or another method",
}
"""By kind of transfer, what may help where it is exposed."""
Method = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
METHODS: tuple[Method, ...] = ("p2p", "all_gather", "a2a", "a2a+p2p")
ORDERS = ("balanced", "contiguous")
BOUNDARIES = ("loss", "blocks")
CAUSAL_SHARE = 0.75
"""Of the keys and values of a full ring, those that a causal mask needs when ranks have an early and a late part each."""


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """Context parallelism: the tokens of each sequence are sharded over the ranks, which share each batch."""

    size: int = 1
    """Ranks along the axis."""
    method: Method | Literal["auto"] = "auto"
    """How attention sees all keys. ``p2p``: each rank receives the pieces of keys and values that its queries see. ``all_gather``:
    every rank receives all of them. ``a2a``: ranks exchange tokens for heads (DeepSpeed-Ulysses). ``a2a+p2p``: a2a between the ranks
    of an inner group, p2p between groups. ``auto``: p2p or a2a, whichever sends fewer bytes."""
    hierarchical_sizes: Sequence[int] | None = field(default=None, hash=False)
    """Of ``a2a+p2p``: ranks of an inner group, and the number of groups; their product is ``size``."""
    order: Literal["auto", "balanced", "contiguous"] = "auto"
    """Which tokens a rank has. ``balanced``: an early and a late part, which have the same work under a causal mask.
    ``contiguous``: one part, which suits windows. ``auto``: by the mask of each batch."""
    boundary: Literal["auto", "loss", "blocks"] = "auto"
    """Where tokens are joined again. ``loss``: logits stay sharded until they are a loss. ``blocks``: after the last block."""
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
        check_word("context_parallel.method", self.method, ("auto", *METHODS))
        check_word("context_parallel.order", self.order, ("auto", *ORDERS))
        check_word("context_parallel.boundary", self.boundary, ("auto", *BOUNDARIES))
        check_switch("context_parallel.overlap", self.overlap)
        check_count("context_parallel.pieces", self.pieces)
        sizes = self.hierarchical_sizes
        if (sizes is None) == (self.method == "a2a+p2p"):
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


@dataclass(frozen=True)
class ContextFacts:
    """What context parallelism looks at in a model.

    Attributes:
        summary: the list of blocks.
        heads: query heads of an attention; None if the model does not tell.
        kv_heads: key and value heads; None if the model does not tell.
        mixers: modules in the blocks that mix tokens and are no attention.
    """

    summary: str
    heads: int | None = None
    kv_heads: int | None = None
    mixers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContextChoices(Choices):
    """What was decided for context parallelism; for its settings see :class:`ContextParallel`.

    Attributes:
        method: how attention sees all keys.
        order: which tokens a rank has.
        boundary: where tokens are joined again.
        pieces: in which a rank receives the keys and values of all others.
        overlap: pieces travel while others are used.
    """

    method: Choice[Method]
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
    mixers = model.mixers if model is not None else ()
    refuse(
        f"context_parallel.size={config.size}",
        [
            (
                bool(mixers),
                f"{', '.join(mixers[:3])} mixes tokens and is no attention: a rank would mix its own tokens only. If it works on "
                "each token by itself, give it the role token_wise in parallel_plan",
            ),
            (facts.compiled, "the module is compiled, and compiled code does not let attention be replaced: compile its blocks' mlps"),
        ],
    )
    return ContextChoices(
        size=Choice(config.size, config.size, "the model is not known yet" if model is None else model.summary),
        method=_method(config, degrees, model),
        order=Choice("by mask", "auto", "balanced if causal, else contiguous; by documents if packed")
        if config.order == "auto"
        else Choice(config.order, config.order, "as configured"),
        boundary=_boundary(config),
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


def _boundary(config: ContextParallel) -> Choice[str]:
    if config.boundary == "blocks":
        return Choice("blocks", "blocks", "every rank has all tokens after the last block; norm, head and loss run on all of them")
    return Choice(
        "loss",
        config.boundary,
        "blocks, final norm and head run on a rank's tokens; embeddings and labels are unsharded",
    )


def _method(config: ContextParallel, degrees: Degrees, model: ContextFacts | None) -> Choice[Method]:
    if config.method != "auto":
        return Choice(config.method, config.method, "as configured")
    if model is None or model.heads is None or model.kv_heads is None:
        return Choice("p2p", "auto", "it fits any number of heads")
    heads, kv_heads = model.heads // degrees.tensor, max(model.kv_heads // degrees.tensor, 1)
    if heads % config.size:
        return Choice("p2p", "auto", f"{heads} heads do not divide over {config.size} ranks, as a2a needs")
    # Sent by a rank in a forward, in units of its tokens x the size of a head.
    p2p = CAUSAL_SHARE * 2 * kv_heads * (config.size - 1)
    a2a = (2 * heads + 2 * max(kv_heads, min(config.size, heads))) * (config.size - 1) / config.size
    if p2p <= a2a:
        return Choice("p2p", "auto", f"it sends about {p2p / a2a:.0%} of the bytes of a2a (causal mask)")
    return Choice("a2a", "auto", f"it sends about {a2a / p2p:.0%} of the bytes of p2p (causal mask)")
