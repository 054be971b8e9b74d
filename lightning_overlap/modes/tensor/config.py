"""Configuration and gates of tensor and sequence parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_overlap.decision import ConfigError, Decision, settle

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts


WORTH_CUTTING = 8192
"""Entries of a vocabulary below which a rank has less work with all of it than with two sums over the ranks of whole activations."""


_PLAIN = {"plain": "its transfer is waited for where it is posted"}
METHODS = {
    "column_fprop": {"ring": "this rank's tokens are multiplied first, then the others' as they arrive", **_PLAIN},
    "column_dgrad": {
        "pipeline": "the input's gradient is sent piece by piece while it is computed, and travels under the weights' gradients",
        "bulk": "the input's gradient is computed whole, and travels under the weights' gradients",
        **_PLAIN,
    },
    "column_wgrad": {"bulk": "the input is gathered again under the row layer's backward", **_PLAIN},
    "row_fprop": {"pipeline": "the output is sent piece by piece while it is computed", **_PLAIN},
    "row_dgrad": {"ring": "this rank's tokens are multiplied first, then the others' as they arrive", **_PLAIN},
}
"""By product that has a transfer beside it, what each method does with that; the first one is the default."""


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """Tensor parallelism: the weights of linear layers are cut over the ranks, which share each batch."""

    size: int = 1
    """Ranks along the axis."""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """Inside the list of blocks each rank has its part of the tokens only, except in attention and mlp (Korthikanti et al., 2022)."""
    overlap: bool | Literal["auto"] = "auto"
    """Transfers run beside the products that need them or make them."""
    splits: int | Literal["auto"] = "auto"
    """Pieces in which a rank's part of the tokens travels; ``auto``: of at least 256 KiB, at most 4."""
    methods: dict[str, str] = field(default_factory=dict, hash=False)
    """By product, how its transfer is hidden, where that is not the default: ``{row_fprop: plain}``. Products of column and row layers
    are ``fprop``, ``dgrad`` and ``wgrad`` (a row's weight's gradient reads what ``row_dgrad`` gathers); :data:`METHODS` has all."""
    keep_gathered_input: bool = False
    """Backward uses the input that forward has gathered, instead of gathering it again: memory for traffic."""
    vocab_parallel: bool | Literal["auto"] = "auto"
    """Embedding and head are cut along the vocabulary, and logits stay cut until they are a loss; ``auto``: a large one is."""
    backend: Literal["p2p", "symm_mem", "userbuffers"] = "p2p"
    """What multiplies beside transfers: our own exchange, on any device; or, on CUDA, torch's fused operators over symmetric memory,
    or Transformer Engine's linear layers over its userbuffers (bf16; the extra ``te``), which have the shape of the first training
    step's activations. What does not fit goes by p2p."""
    verify_blocks: bool = True
    """In the first training step, the first block of each kind is compared, output and gradients, with a whole copy of itself."""

    def advice(self, kind: str) -> str:
        """What may help where a kind of transfer is exposed: ``input``, ``output``, ...; ``bytes``: the link is too slow."""
        known = {
            "bytes": "keep_gathered_input: true, which gathers once where twice is the default; or fewer ranks on this axis",
            "input": "keep_gathered_input: true, or other splits",
            "input_grad": "methods: {column_dgrad: bulk}, which sends it in one piece, or other splits",
            "replicated": "longer sequences, against which the sum of the norms' gradients is short",
        }
        return f"tensor_parallel: {known.get(kind, 'other splits')}"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"tensor_parallel.size must be at least 1, got {self.size}")
        if self.splits != "auto" and (not isinstance(self.splits, int) or isinstance(self.splits, bool) or self.splits < 1):
            raise ConfigError(f"tensor_parallel.splits must be at least 1, or auto, got {self.splits!r}")
        if self.backend not in ("p2p", "symm_mem", "userbuffers"):
            raise ConfigError(f"tensor_parallel.backend must be p2p, symm_mem or userbuffers, got {self.backend!r}")
        for product, method in self.methods.items():
            if product not in METHODS:
                raise ConfigError(f"tensor_parallel.methods has no product {product!r}; it has {', '.join(METHODS)}")
            if method not in METHODS[product]:
                raise ConfigError(f"tensor_parallel.methods.{product} must be {' or '.join(METHODS[product])}, got {method!r}")
        for name in ("sequence_parallel", "overlap", "vocab_parallel"):
            if getattr(self, name) not in (True, False, "auto"):
                raise ConfigError(f"tensor_parallel.{name} must be true, false or auto, got {getattr(self, name)!r}")


def decide(own: TensorParallel, whole: OverlapConfig, facts: Facts) -> list[Decision]:
    """The home of this mode's gates."""
    if own.size == 1:
        if own.sequence_parallel is True:
            raise ConfigError("tensor_parallel.sequence_parallel: true needs tensor_parallel.size of at least 2")
        if own.methods:
            raise ConfigError(f"tensor_parallel.methods: {own.methods} needs tensor_parallel.size of at least 2")
        return [Decision("tensor_parallel", "1", "off", "its size is 1")]
    _refuse_what_cannot_run(own, facts)
    found = facts.tensor
    loose = found.loose if found is not None else ()
    more = f" and {len(loose) - 3} more" if loose[3:] else ""
    shared = found.shared if found is not None else ()
    sequence = settle(
        "tensor_parallel.sequence_parallel",
        own.sequence_parallel,
        best="on",
        because="between attention and mlp a rank has its part of the tokens only",
        blockers=[
            (
                bool(loose),
                f"{', '.join(loose[:3])}{more} may mix tokens, or stand in a block's own forward, which would see a part of them: "
                "put attention and mlp into modules of their own, or give what works on each token by itself the role token_wise",
            ),
            (
                bool(shared),
                f"{', '.join(shared[:3])} is used in the blocks, where a rank would have a part of its gradient, and outside of them",
            ),
        ],
    )
    scattered = sequence.choice == "on"
    quiet = whole.overlap == "off"
    explicit = own.overlap is True and not scattered
    overlap = settle(
        "tensor_parallel.overlap",
        False if quiet else own.overlap,
        best="beside products" if scattered else "gradients beside products",
        because="parts of the tokens are multiplied as they arrive, and sent as they are ready"
        if scattered
        else "sums of inputs' gradients travel while weights' gradients are computed, outputs' while the rest of them is",
        blockers=[(explicit, "it hides gathers and reduce-scatters, which only sequence_parallel has: set overlap to auto")],
    )
    return [
        Decision("tensor_parallel", str(own.size), str(own.size), found.said if found is not None else "the model is not known yet"),
        sequence,
        overlap,
        _vocabulary(own, facts),
        *_methods(own, scattered=scattered, overlapped=overlap.choice != "off"),
        *([_again(own)] if scattered else []),
        *_backend(own, whole, facts, scattered=scattered, overlapped=overlap.choice != "off"),
    ]


def _vocabulary(own: TensorParallel, facts: Facts) -> Decision:
    entries = facts.tensor.entries if facts.tensor is not None else 0
    return settle(
        "tensor_parallel.vocab_parallel",
        own.vocab_parallel,
        best="on",
        because=f"embedding, head and loss have {entries} entries",
        blockers=[
            (facts.tensor is not None and entries == 0, "no embedding or head has the role vocab_embedding or vocab_head"),
            (
                own.vocab_parallel == "auto" and 0 < entries < WORTH_CUTTING,
                f"{entries} entries: sums of what is looked up, and of the gradient of the head's input, cost more than it saves",
            ),
        ],
    )


def _methods(own: TensorParallel, *, scattered: bool, overlapped: bool) -> list[Decision]:
    """Of products whose method is not the default.

    Raises:
        ConfigError: with every reason against the methods that were asked for.
    """
    reasons = [
        (not scattered, "gathers and reduce-scatters are of sequence_parallel, which is off"),
        (own.overlap is False, "overlap: false makes all of them plain: leave it out"),
        (own.backend != "p2p", f"backend: {own.backend} has methods of its own: set backend: p2p"),
        (
            own.keep_gathered_input and "column_wgrad" in own.methods,
            "keep_gathered_input: true gathers nothing for column_wgrad: leave one of them out",
        ),
    ]
    if own.methods and (said := [reason for applies, reason in reasons if applies]):
        raise ConfigError(f"tensor_parallel.methods: {own.methods} cannot run here: {'; '.join(said)}. Or leave methods out")
    decisions = []
    for product, known in METHODS.items():
        default = next(iter(known))
        method = own.methods.get(product, default)
        # The plain twin keeps the rest of the configuration, so that overlap: off is no reason to refuse.
        runs = (method, known[method]) if overlapped else ("plain", "overlap is off")
        if method != default:
            decisions.append(Decision(f"tensor_parallel.methods.{product}", method, *runs))
    return decisions


def _again(own: TensorParallel) -> Decision:
    kept = own.keep_gathered_input
    why = "backward reads what forward has gathered" if kept else "backward gathers inputs again, beside the inputs' gradients"
    return Decision("tensor_parallel.keep_gathered_input", "on" if kept else "off", "on" if kept else "off", why)


def _backend(own: TensorParallel, whole: OverlapConfig, facts: Facts, *, scattered: bool, overlapped: bool) -> list[Decision]:
    """Raises:
    ConfigError: with every reason against the one that was asked for.
    """
    if own.backend == "p2p":
        return []
    name = "tensor_parallel.backend"
    if whole.overlap == "off":
        return [Decision(name, own.backend, "p2p", "overlap is off, and the plain twin is p2p's")]
    reasons = [
        (facts.device != "cuda", f"its operators are CUDA's, and this is {facts.device}"),
        (not scattered, "it needs sequence_parallel"),
        (not overlapped, "it has no plain twin: overlap is off"),
        (own.keep_gathered_input, "it gathers inputs again in backward: set keep_gathered_input: false"),
        *(_against_userbuffers(own, whole, facts) if own.backend == "userbuffers" else []),
    ]
    if said := [reason for applies, reason in reasons if applies]:
        raise ConfigError(f"{name}: {own.backend} cannot run here: {'; '.join(said)}. Or use backend: p2p")
    why = "torch's fused operators; sequences that the ranks do not divide go by p2p"
    if own.backend == "userbuffers":
        why = (
            f"linear layers of Transformer Engine {facts.transformer_engine}, with its own transfers; what has another shape than in "
            "the first training step goes by p2p"
        )
    return [Decision(name, own.backend, own.backend, why)]


def _against_userbuffers(own: TensorParallel, whole: OverlapConfig, facts: Facts) -> list[tuple[bool, str]]:
    transposed = facts.tensor.transposed if facts.tensor is not None else ()
    return [
        (facts.transformer_engine is None, "Transformer Engine is not installed: pip install 'lightning-overlap[te]'"),
        (own.splits != "auto", "Transformer Engine cuts transfers as it sees fit: set splits: auto"),
        (
            facts.precision not in ("bf16-mixed", "bf16-true"),
            f"userbuffers are used in bf16, and precision is {facts.precision}: set precision: bf16-mixed or bf16-true",
        ),
        (
            whole.pipeline_parallel.size > 1,
            "all ranks set its buffers up together, and a pipeline's stages come to their first products one after the other: set "
            "pipeline_parallel: 1",
        ),
        (bool(transposed), f"weights are (in, out) in {', '.join(transposed[:3])}, and (out, in) in Transformer Engine"),
    ]


def _refuse_what_cannot_run(own: TensorParallel, facts: Facts) -> None:
    """Raises:
    ConfigError: with every reason.
    """
    whole = [o.name for o in facts.optimizers or () if not o.elementwise]
    reasons = [
        (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which is not in this version: use bf16-mixed"),
        (bool(whole), f"{', '.join(whole)} looks at whole matrices, and a rank has a part of each: use an elementwise optimizer"),
    ]
    if said := [reason for applies, reason in reasons if applies]:
        raise ConfigError(f"tensor_parallel.size={own.size} cannot run here: {'; '.join(said)}")
