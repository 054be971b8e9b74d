"""Configuration and gates of tensor and sequence parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_overlap.decision import (
    Choice,
    Choices,
    ConfigError,
    Setting,
    check_count,
    check_flags,
    check_switch,
    check_word,
    refuse,
    settle,
)
from lightning_overlap.facts import Facts, Room
from lightning_overlap.ranks.degrees import Degrees, larger_sizes

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
"""Below this number of entries, the complete vocabulary on each rank costs less than two sums of activations over the ranks."""


_PLAIN = {"plain": "its transfer is waited for where it is posted"}
METHODS = {
    "column_fprop": {"ring": "this rank's tokens are multiplied first, then the others' as they are received", **_PLAIN},
    "column_dgrad": {
        "pipeline": "the input's gradient is sent piece by piece while it and the weights' gradients are computed",
        "bulk": "the input's gradient is sent in one piece while the weights' gradients are computed",
        **_PLAIN,
    },
    "column_wgrad": {"bulk": "the input is gathered again during the row layer's backward", **_PLAIN},
    "row_fprop": {"pipeline": "the output is sent piece by piece while it is computed", **_PLAIN},
    "row_dgrad": {"ring": "this rank's tokens are multiplied first, then the others' as they are received", **_PLAIN},
}
"""By product, the methods that hide its transfer, and what they do. The first one is the default."""


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """Tensor parallelism: the weights of linear layers are sharded over the ranks, which share each batch."""

    size: int = 1
    """Ranks along the axis."""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """Inside the blocks, except in attention and mlp, each rank has its part of the tokens only (Korthikanti et al., 2022)."""
    overlap: bool | Literal["auto"] = "auto"
    """Transfers run while the products are computed that read or make their data."""
    splits: int | Literal["auto"] = "auto"
    """Pieces in which a rank's part of the tokens is sent; ``auto``: at most 4, of at least 256 KiB."""
    methods: dict[str, str] = field(default_factory=dict, hash=False)
    """By product, the method that hides its transfer, if it is not the default: ``{row_fprop: plain}``. Products of column and row
    layers are ``fprop``, ``dgrad`` and ``wgrad`` (the wgrad of a row layer reads the gradient that ``row_dgrad`` gathers).
    :data:`METHODS` lists all."""
    keep_gathered_input: bool = False
    """Backward uses the input that forward has gathered, and does not gather it again: more memory, fewer transfers."""
    vocab_parallel: bool | Literal["auto"] = "auto"
    """Embedding and head are sharded along the vocabulary, and logits stay sharded until the loss; ``auto``: if it is large."""
    backend: Literal["p2p", "symm_mem", "userbuffers"] = "p2p"
    """How products and transfers overlap. ``p2p``: point-to-point transfers, on any device. ``symm_mem``: torch's fused operators over
    symmetric memory (CUDA). ``userbuffers``: Transformer Engine's linear layers over its userbuffers (CUDA, bf16; the extra ``te``),
    which have the shape of the first training step's activations. Activations that do not fit are sent by ``p2p``."""
    verify_blocks: bool = True
    """In the first training step, the output and gradients of the first block of each kind are compared with an unsharded copy's,
    unless the whole step is compared (``verify_first_step``)."""

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
        check_flags("tensor_parallel", self)


@dataclass(frozen=True)
class TensorFacts:
    """What tensor parallelism can shard in a model.

    Attributes:
        summary: the source of the roles, and the number of modules with each role.
        loose: names of modules in the blocks, outside attention and mlp, that may mix tokens.
        entries: the vocabulary's size; 0 if neither embedding nor head has a role.
        transposed: names of layers whose weight is ``(in, out)``.
        shared: names of parameters that the blocks share with other modules.
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
        overlap: transfers run while the products are computed that read or make their data.
        vocab_parallel: embedding and head are sharded along the vocabulary.
        methods: by product, the methods that are not the default.
        keep_gathered_input: backward uses the input that forward has gathered; None if nothing is gathered.
        backend: how products and transfers overlap.
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
        because="tokens are multiplied piece by piece as they are received, and sent piece by piece as they are ready"
        if sharded
        else "inputs' gradients are summed while weights' gradients are computed, outputs piece by piece",
        blockers=[
            (
                config.overlap is True and not sharded,
                "it hides gathers and reduce-scatters, and only sequence_parallel has these: set overlap to auto",
            )
        ],
        overlap=overlap,
    )
    backend = _backend(config, degrees, facts, sharded=sharded, overlapped=overlapped.value, overlap=overlap)
    fused = backend.value != "p2p"
    return TensorChoices(
        size=Choice(config.size, config.size, "the model is not known yet" if model is None else model.summary),
        first_step_blocker=f"tensor_parallel.backend {backend.value} computes only in bf16 and in the first step's shapes"
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
                f"{', '.join(loose[:3])}{more} may mix tokens, of which the block's own forward would see only a part: put attention "
                "and mlp into modules of their own, or give modules that treat each token separately the role token_wise",
            ),
            (
                bool(shared),
                f"{', '.join(shared[:3])} is used inside and outside of the blocks; inside, a rank would have a part of its gradient",
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
                f"{entries:,} entries: sums over the ranks would cost more than the smaller products save",
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
                (not sharded, "they are for sequence_parallel, which is off"),
                (config.overlap is False, "overlap: false makes all of them plain: remove it"),
                (config.backend != "p2p", f"backend: {config.backend} has methods of its own: set backend: p2p"),
                (
                    config.keep_gathered_input and "column_wgrad" in config.methods,
                    "with keep_gathered_input: true nothing is gathered for column_wgrad: remove one of the two",
                ),
            ],
            advice=". Or remove methods",
        )
    choices = {}
    for product, known in METHODS.items():
        default = next(iter(known))
        method = config.methods.get(product, default)
        if method != default:
            # overlap: off keeps the rest of the configuration valid: it only turns overlaps off.
            value, why = (method, known[method]) if overlapped else ("plain", "overlap is off")
            choices[product] = Choice(value, method, why)
    return choices


def _kept_input(config: TensorParallel) -> Choice[bool]:
    kept = config.keep_gathered_input
    return Choice(kept, kept, "backward uses the input that forward has gathered" if kept else "backward gathers the input again")


def _backend(config: TensorParallel, degrees: Degrees, facts: Facts, *, sharded: bool, overlapped: bool, overlap: bool) -> Choice[str]:
    """Decides the backend.

    Raises:
        ConfigError: the requested backend cannot run; with every reason.
    """
    if config.backend == "p2p":
        return Choice("p2p", "p2p", "point-to-point transfers, on any device")
    if not overlap:
        return Choice("p2p", config.backend, "overlap is off, and only p2p can run without it")
    refuse(
        f"tensor_parallel.backend: {config.backend}",
        [
            (facts.device != "cuda", f"it needs CUDA, and the device is {facts.device}"),
            (not sharded, "it needs sequence_parallel"),
            (not overlapped, "it cannot run without overlap, which is off"),
            (config.keep_gathered_input, "it gathers inputs again in backward: set keep_gathered_input: false"),
            *(_against_userbuffers(config, degrees, facts) if config.backend == "userbuffers" else []),
        ],
        advice=". Or use backend: p2p",
    )
    why = "torch's fused operators; p2p for sequences whose length is not divisible by the number of ranks"
    if config.backend == "userbuffers":
        why = (
            f"linear layers of Transformer Engine {facts.transformer_engine}, with its own transfers; p2p for activations of another "
            "shape than in the first training step"
        )
    return Choice(config.backend, config.backend, why)


def _against_userbuffers(config: TensorParallel, degrees: Degrees, facts: Facts) -> list[tuple[bool, str]]:
    model = facts.of(TensorFacts)
    transposed = model.transposed if model is not None else ()
    return [
        (facts.transformer_engine is None, "Transformer Engine is not installed: pip install 'lightning-overlap[te]'"),
        (config.splits != "auto", "Transformer Engine chooses the pieces itself: set splits: auto"),
        (
            facts.precision not in ("bf16-mixed", "bf16-true"),
            f"it computes in bf16, and precision is {facts.precision}: set precision: bf16-mixed or bf16-true",
        ),
        (
            degrees.pipeline > 1,
            "all ranks must set up its buffers together, but a pipeline's stages start one after the other: set pipeline_parallel: 1",
        ),
        (bool(transposed), f"weights of {', '.join(transposed[:3])} are (in, out), but Transformer Engine needs (out, in)"),
    ]


def _refuse_what_cannot_run(config: TensorParallel, facts: Facts) -> None:
    """Refuses what tensor parallelism does not support.

    Raises:
        ConfigError: there is a reason; with every reason.
    """
    coupled = [o.name for o in facts.optimizers or () if not o.elementwise and o.known]
    unknown = [o.reason for o in facts.optimizers or () if not o.known]
    refuse(
        f"tensor_parallel.size={config.size}",
        [
            (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which this version does not support: use bf16-mixed"),
            (
                bool(coupled),
                f"{', '.join(coupled)} needs complete matrices, but a rank has parts: use an elementwise optimizer",
            ),
            (
                bool(facts.clippers),
                f"{', '.join(facts.clippers)} clips by the norm of this rank's gradients only, which are pieces: use "
                "gradient_clip_val, or call self.clip_gradients(...) in configure_gradient_clipping",
            ),
            (
                bool(unknown),
                f"{'; '.join(unknown)}. A rank has parts of matrices only: use an elementwise optimizer such as AdamW",
            ),
            (
                bool(facts.averagers),
                f"{', '.join(facts.averagers)} averages copies of complete weights, but a rank has a part of each: save checkpoints "
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
        why = "tensor_parallel: with one hardware queue, kernels start in the order of their launch, transfers first"
        settings.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", why))
    if config.backend == "userbuffers":
        why = "tensor_parallel: Transformer Engine's norms leave some multiprocessors free for its transfers"
        settings += [Setting(f"NVTE_{way}_LAYERNORM_SM_MARGIN", "16", why) for way in ("FWD", "BWD")]
    return settings


def alternatives(config: TensorParallel, degrees: Degrees, facts: Facts, room: Room) -> Iterator[TensorParallel]:
    """See :class:`lightning_overlap.modes.descriptor.Alternatives`. Ranks stay inside a host, if it has several."""
    for size in larger_sizes(config.size, degrees.data):
        if room.ranks_per_host == 1 or room.ranks_per_host % size == 0:
            yield replace(config, size=size)
    if config.size > 1 and not config.keep_gathered_input:
        yield replace(config, keep_gathered_input=True)
