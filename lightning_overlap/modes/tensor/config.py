"""Configuration and gates of tensor and sequence parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_overlap.decision import (
    Choice,
    Choices,
    ConfigError,
    Setting,
    check_count,
    check_switch,
    check_word,
    refuse,
    settle,
)
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees

ADVICE = {
    "bytes": "keep_gathered_input: true, which gathers once where twice is the default; or fewer ranks on this axis",
    "input": "keep_gathered_input: true, or other splits",
    "input_grad": "methods: {column_dgrad: bulk}, which sends it in one piece, or other splits",
    "replicated": "longer sequences, against which the sum of the norms' gradients is short",
    "": "other splits",
}
"""By kind of transfer, what may help where it is exposed."""
BLACKWELL = 10
"""The first compute capability (major) whose kernels on several hardware queues start in the order of their launch."""
BACKENDS = ("p2p", "symm_mem", "userbuffers")
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

    def __post_init__(self) -> None:
        check_count("tensor_parallel.size", self.size)
        if self.splits != "auto":
            check_count("tensor_parallel.splits", self.splits)
        check_word("tensor_parallel.backend", self.backend, BACKENDS)
        for product, method in self.methods.items():
            if product not in METHODS:
                raise ConfigError(f"tensor_parallel.methods has no product {product!r}; it has {', '.join(METHODS)}")
            check_word(f"tensor_parallel.methods.{product}", method, tuple(METHODS[product]))
        for name in ("sequence_parallel", "overlap", "vocab_parallel"):
            check_switch(f"tensor_parallel.{name}", getattr(self, name))


@dataclass(frozen=True)
class TensorFacts:
    """What tensor parallelism can cut in a model.

    Attributes:
        summary: the source of the roles, and the number of modules with each.
        loose: modules in the blocks, outside attention and mlp, that may mix tokens.
        entries: of the vocabulary; 0 if neither embedding nor head has a role.
        transposed: layers whose weight is ``(in, out)``.
        shared: parameters that the blocks share with the rest of the model.
    """

    summary: str
    loose: tuple[str, ...]
    entries: int
    transposed: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorChoices(Choices):
    """What was decided for tensor parallelism; for its settings see :class:`TensorParallel`.

    Attributes:
        sequence_parallel: between attention and mlp a rank has its part of the tokens only.
        overlap: transfers run beside the products that need them or make them.
        vocab_parallel: embedding and head are cut along the vocabulary.
        methods: by product, those that are not the default.
        keep_gathered_input: backward uses the input that forward has gathered; None where nothing is gathered.
        backend: what multiplies beside transfers.
    """

    sequence_parallel: Choice[bool]
    overlap: Choice[bool]
    vocab_parallel: Choice[bool]
    methods: Mapping[str, Choice[str]]
    keep_gathered_input: Choice[bool] | None
    backend: Choice[str]


def decide(config: TensorParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> TensorChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if config.size == 1:
        if config.sequence_parallel is True:
            raise ConfigError("tensor_parallel.sequence_parallel: true needs tensor_parallel.size of at least 2")
        if config.methods:
            raise ConfigError(f"tensor_parallel.methods: {config.methods} needs tensor_parallel.size of at least 2")
        return None
    _refuse_what_cannot_run(config, facts)
    model = facts.of(TensorFacts)
    sequence = _sequence(config, model)
    sharded = sequence.value
    overlapped = settle(
        "tensor_parallel.overlap",
        config.overlap,
        best=True,
        otherwise=False,
        because="parts of the tokens are multiplied as they arrive, and sent as they are ready"
        if sharded
        else "sums of inputs' gradients travel while weights' gradients are computed, outputs' while the rest of them is",
        blockers=[
            (
                config.overlap is True and not sharded,
                "it hides gathers and reduce-scatters, which only sequence_parallel has: set overlap to auto",
            )
        ],
        overlap=overlap,
    )
    backend = _backend(config, degrees, facts, sharded=sharded, overlapped=overlapped.value, overlap=overlap)
    fused = backend.value != "p2p"
    return TensorChoices(
        size=Choice(config.size, config.size, "the model is not known yet" if model is None else model.summary),
        first_step_blocker=f"tensor_parallel.backend {backend.value} computes in bf16, and in the shapes of the first step only"
        if fused
        else "",
        sequence_parallel=sequence,
        overlap=overlapped,
        vocab_parallel=_vocabulary(config, model),
        methods=_methods(config, sharded=sharded, overlapped=overlapped.value),
        keep_gathered_input=_kept_input(config) if sharded else None,
        backend=backend,
    )


def _sequence(config: TensorParallel, model: TensorFacts | None) -> Choice[bool]:
    loose, shared = (model.loose, model.shared) if model is not None else ((), ())
    more = f" and {len(loose) - 3} more" if loose[3:] else ""
    return settle(
        "tensor_parallel.sequence_parallel",
        config.sequence_parallel,
        best=True,
        otherwise=False,
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


def _vocabulary(config: TensorParallel, model: TensorFacts | None) -> Choice[bool]:
    entries = model.entries if model is not None else 0
    return settle(
        "tensor_parallel.vocab_parallel",
        config.vocab_parallel,
        best=True,
        otherwise=False,
        because="the model is not known yet" if model is None else f"embedding, head and loss have {entries:,} entries",
        blockers=[
            (model is not None and entries == 0, "no embedding or head has the role vocab_embedding or vocab_head"),
            (
                config.vocab_parallel == "auto" and 0 < entries < WORTH_CUTTING,
                f"{entries:,} entries: summing embeddings and the gradient of the head's input over the ranks would cost more than "
                "the smaller products save",
            ),
        ],
    )


def _methods(config: TensorParallel, *, sharded: bool, overlapped: bool) -> dict[str, Choice[str]]:
    """Products whose method is not the default.

    Raises:
        ConfigError: with every reason against the methods that were asked for.
    """
    if config.methods:
        refuse(
            f"tensor_parallel.methods: {config.methods}",
            [
                (not sharded, "gathers and reduce-scatters are of sequence_parallel, which is off"),
                (config.overlap is False, "overlap: false makes all of them plain: leave it out"),
                (config.backend != "p2p", f"backend: {config.backend} has methods of its own: set backend: p2p"),
                (
                    config.keep_gathered_input and "column_wgrad" in config.methods,
                    "keep_gathered_input: true gathers nothing for column_wgrad: leave one of them out",
                ),
            ],
            advice=". Or leave methods out",
        )
    choices = {}
    for product, known in METHODS.items():
        default = next(iter(known))
        method = config.methods.get(product, default)
        if method != default:
            # The plain twin keeps the rest of the configuration, so that overlap: off is no reason to refuse.
            value, why = (method, known[method]) if overlapped else ("plain", "overlap is off")
            choices[product] = Choice(value, method, why)
    return choices


def _kept_input(config: TensorParallel) -> Choice[bool]:
    kept = config.keep_gathered_input
    return Choice(kept, kept, "backward reads the input that forward has gathered" if kept else "backward gathers the input again")


def _backend(config: TensorParallel, degrees: Degrees, facts: Facts, *, sharded: bool, overlapped: bool, overlap: bool) -> Choice[str]:
    """Raises:
    ConfigError: with every reason against the one that was asked for.
    """
    if config.backend == "p2p":
        return Choice("p2p", "p2p", "point-to-point transfers, on any device")
    if not overlap:
        return Choice("p2p", config.backend, "overlap is off, and the plain twin is p2p's")
    refuse(
        f"tensor_parallel.backend: {config.backend}",
        [
            (facts.device != "cuda", f"its operators are CUDA's, and this is {facts.device}"),
            (not sharded, "it needs sequence_parallel"),
            (not overlapped, "it has no plain twin: overlap is off"),
            (config.keep_gathered_input, "it gathers inputs again in backward: set keep_gathered_input: false"),
            *(_against_userbuffers(config, degrees, facts) if config.backend == "userbuffers" else []),
        ],
        advice=". Or use backend: p2p",
    )
    why = "torch's fused operators; sequences that the ranks do not divide go by p2p"
    if config.backend == "userbuffers":
        why = (
            f"linear layers of Transformer Engine {facts.transformer_engine}, with its own transfers; what has another shape than in "
            "the first training step goes by p2p"
        )
    return Choice(config.backend, config.backend, why)


def _against_userbuffers(config: TensorParallel, degrees: Degrees, facts: Facts) -> list[tuple[bool, str]]:
    model = facts.of(TensorFacts)
    transposed = model.transposed if model is not None else ()
    return [
        (facts.transformer_engine is None, "Transformer Engine is not installed: pip install 'lightning-overlap[te]'"),
        (config.splits != "auto", "Transformer Engine cuts transfers as it sees fit: set splits: auto"),
        (
            facts.precision not in ("bf16-mixed", "bf16-true"),
            f"userbuffers are used in bf16, and precision is {facts.precision}: set precision: bf16-mixed or bf16-true",
        ),
        (
            degrees.pipeline > 1,
            "all ranks set its buffers up together, and a pipeline's stages come to their first products one after the other: set "
            "pipeline_parallel: 1",
        ),
        (bool(transposed), f"weights are (in, out) in {', '.join(transposed[:3])}, and (out, in) in Transformer Engine"),
    ]


def _refuse_what_cannot_run(config: TensorParallel, facts: Facts) -> None:
    """Raises:
    ConfigError: with every reason.
    """
    whole = [o.name for o in facts.optimizers or () if not o.elementwise and o.known]
    unknown = [o.reason for o in facts.optimizers or () if not o.known]
    refuse(
        f"tensor_parallel.size={config.size}",
        [
            (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which is not in this version: use bf16-mixed"),
            (bool(whole), f"{', '.join(whole)} looks at whole matrices, and a rank has a part of each: use an elementwise optimizer"),
            (
                bool(facts.clippers),
                f"{', '.join(facts.clippers)} clips by a norm over the gradients that a rank has, its pieces only: use "
                "gradient_clip_val, or call self.clip_gradients(...) in configure_gradient_clipping",
            ),
            (bool(unknown), f"{'; '.join(unknown)}, and a rank has a part of each matrix: use an elementwise optimizer such as AdamW"),
            (
                bool(facts.averagers),
                f"{', '.join(facts.averagers)} averages copies of whole weights, and a rank has its part of each: save checkpoints "
                "and average those",
            ),
        ],
    )


def environment(config: TensorParallel, capability: int | None) -> list[Setting]:
    """See :class:`lightning_overlap.modes.descriptor.Environment`."""
    if config.size == 1:
        return []
    settings = []
    if capability is not None and capability < BLACKWELL:
        why = "tensor_parallel: with one queue, a transfer that is launched before a product starts before it"
        settings.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", why))
    if config.backend == "userbuffers":
        why = "tensor_parallel: Transformer Engine's norms leave some of the device to its transfers"
        settings += [Setting(f"NVTE_{way}_LAYERNORM_SM_MARGIN", "16", why) for way in ("FWD", "BWD")]
    return settings
