"""Configuration and gates of expert parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lightning_overlap.decision import Choice, Choices, ConfigError, check_count, check_flags, check_switch, check_word, refuse, settle
from lightning_overlap.facts import Facts, Room
from lightning_overlap.modes.expert.layout import SPLITS, Split, choose
from lightning_overlap.ranks.degrees import Degrees, larger_sizes

ADVICE = {
    "bytes": "fewer ranks on this axis, or ranks of one node: a token is sent once for each of its experts",
    "": "more parts, or overlap_shared_experts",
}
"""By kind of transfer, what may help where it is exposed."""
Dispatcher = Literal["alltoall", "allgather", "flex"]
DISPATCHERS: tuple[Dispatcher, ...] = ("alltoall", "allgather", "flex")
Auto = Literal["auto"]
OVERLAPS = ("overlap_dispatch", "overlap_shared_experts", "delay_wgrad")


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Expert parallelism: the experts of a layer are sharded over ranks, which send each other the tokens that choose them."""

    size: int = 1
    """Ranks over which the experts of a layer are sharded. They are ranks of the other axes: it takes none of its own."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens reach their experts. ``alltoall``: once for each of their experts. ``allgather``: once to each rank, which is less
    where tokens have more experts than there are ranks; parts are then some of the tokens. ``flex``: once to each rank that has an
    expert of them, by the kernels of DeepEP (CUDA, bf16; parts are some of the tokens), never run by the authors of this package."""
    overlap_dispatch: bool | Literal["auto"] = "auto"
    """Tokens travel in parts: the next part is sent to its experts, and the last one back, while the experts compute this one."""
    split: Split | Literal["auto"] = "auto"
    """What a part is. ``experts``: some of a rank's experts, with all of their tokens. ``experts+local``: the same, but a rank
    computes its own tokens of the first and the last part apart, while those of other ranks travel. ``tokens``: some tokens of each
    expert, also in this way. ``auto``: experts and local tokens, if ranks have enough experts."""
    parts: int | Literal["auto"] = "auto"
    """Number of parts. More of them hide more of the transfers, and make smaller ones. ``auto``: as few as leave little exposed."""
    overlap_shared_experts: bool | Literal["auto"] = "auto"
    """Experts that every token takes compute while tokens travel."""
    delay_wgrad: bool | Literal["auto"] = "auto"
    """Backward sends the tokens' gradients home before it computes those of the experts' weights, and keeps the gradients of outputs
    until then. ``auto``: with ``split: experts``; otherwise the tokens of a rank itself hide the last transfers."""
    update_bias_rate: float = 0.0
    """Step of the biases by which routers of transformers (``e_score_correction_bias``) balance their experts, once an optimizer step;
    0: they stay. A router of ``lightning_overlap.nn`` has its own."""
    log_expert_load: bool = False
    """Log for each layer how many tokens each expert and each rank got in the last step, and their maximum over the mean."""

    def __post_init__(self) -> None:
        check_count("expert_parallel.size", self.size)
        check_word("expert_parallel.dispatcher", self.dispatcher, DISPATCHERS)
        check_word("expert_parallel.split", self.split, ("auto", *SPLITS))
        for name in OVERLAPS:
            check_switch(f"expert_parallel.{name}", getattr(self, name))
        if self.parts != "auto":
            check_count("expert_parallel.parts", self.parts)
        if isinstance(self.update_bias_rate, bool) or not self.update_bias_rate >= 0:
            raise ConfigError(f"expert_parallel.update_bias_rate={self.update_bias_rate!r} must be a number, at least 0")
        check_flags("expert_parallel", self)
        if self.dispatcher != "alltoall" and self.split not in ("auto", "tokens"):
            raise ConfigError(
                f"expert_parallel.split: {self.split} cannot be used with dispatcher: {self.dispatcher}, which sends a token once for "
                "several of its experts; set split: tokens or auto"
            )


@dataclass(frozen=True)
class ExpertFacts:
    """What expert parallelism looks at in a model.

    Attributes:
        summary: where the experts are, and how many.
        least: the smallest number of experts of a layer.
        unshared: why shared experts cannot compute while tokens travel; empty if they can.
        has_biases: whether routers have biases that move.
        has_losses: whether layers return a balancing loss, which is of the tokens of all ranks that share a batch.
        counts: the numbers of experts that layers have.
    """

    summary: str
    least: int
    unshared: str
    has_biases: bool = False
    has_losses: bool = False
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertChoices(Choices):
    """What was decided for expert parallelism; for its settings see :class:`ExpertParallel`.

    Attributes:
        dispatcher: how tokens reach their experts.
        overlap_dispatch: tokens travel in parts.
        split: what a part is.
        parts: the number of parts.
        overlap_shared_experts: experts that every token takes compute while tokens travel.
        delay_wgrad: backward sends gradients home before it computes those of weights.
        balance: the ranks count the tokens of each expert together.
    """

    dispatcher: Choice[Dispatcher]
    overlap_dispatch: Choice[bool]
    split: Choice[Split | Auto]
    parts: Choice[int | Auto]
    overlap_shared_experts: Choice[bool]
    delay_wgrad: Choice[bool]
    balance: Choice[bool]


def decide(config: ExpertParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> ExpertChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    model = facts.of(ExpertFacts)
    balance = _balance(config, model)
    if config.size == 1:
        _refuse_settings_of_one_rank(config)
        sums_losses = model is not None and model.has_losses and degrees.stage > 1
        return _unspread(config, balance) if balance.value or sums_losses else None
    if config.dispatcher == "flex":
        refuse("expert_parallel.dispatcher: flex", _against_flex(config, model, facts), advice=". Or use dispatcher: alltoall")
    dispatch = settle(
        "expert_parallel.overlap_dispatch",
        config.overlap_dispatch,
        best=True,
        otherwise=False,
        because="parts travel to and from their experts while others compute",
        overlap=overlap,
    )
    split, parts = _layout(config, model, in_parts=config.overlap_dispatch is not False)
    only_bf16 = config.dispatcher == "flex" and facts.precision.endswith("-mixed")
    return ExpertChoices(
        first_step_blocker="expert_parallel.dispatcher: flex computes only in bf16" if only_bf16 else "",
        size=Choice(config.size, config.size, _UNKNOWN if model is None else model.summary),
        dispatcher=Choice(config.dispatcher, config.dispatcher, _DISPATCHERS[config.dispatcher]),
        overlap_dispatch=dispatch,
        split=split,
        parts=parts,
        overlap_shared_experts=settle(
            "expert_parallel.overlap_shared_experts",
            config.overlap_shared_experts,
            best=True,
            otherwise=False,
            because="they compute while the first tokens travel",
            blockers=[
                (model is not None and bool(model.unshared), model.unshared if model is not None else ""),
                (degrees.tensor > 1, "under tensor_parallel their layers may be sharded, with transfers of their own"),
            ],
            overlap=overlap,
        ),
        delay_wgrad=_delay_wgrad(config, split.value, overlap=overlap),
        balance=balance,
    )


def _against_flex(config: ExpertParallel, model: ExpertFacts | None, facts: Facts) -> list[tuple[bool, str]]:
    uneven = next((count for count in model.counts if count % config.size), 0) if model is not None else 0
    return [
        (facts.device != "cuda", f"it needs CUDA, and the device is {facts.device}"),
        (
            not facts.deep_ep,
            "DeepEP is not installed (deep_ep 2.1 or newer, from github.com/deepseek-ai/DeepEP); HybridEP and NCCL-EP, which "
            "Megatron-Core's flex takes as well, are not supported",
        ),
        (
            facts.precision not in ("bf16-mixed", "bf16-true"),
            f"DeepEP sums in bf16, and precision is {facts.precision}: set precision: bf16-mixed or bf16-true",
        ),
        (uneven > 0, f"DeepEP needs the same number of experts on each rank, and {uneven} are not divisible by {config.size}"),
    ]


def _delay_wgrad(config: ExpertParallel, split: Split | Auto, *, overlap: bool) -> Choice[bool]:
    if config.delay_wgrad == "auto" and overlap and split in ("experts+local", "tokens"):
        why = "a rank's own tokens are computed under the last transfers; gradients would be kept until then"
        return Choice(False, "auto", why)
    return settle(
        "expert_parallel.delay_wgrad",
        config.delay_wgrad,
        best=True,
        otherwise=False,
        because="the tokens' gradients travel home while those of the experts' weights are computed",
        overlap=overlap,
    )


def _balance(config: ExpertParallel, model: ExpertFacts | None) -> Choice[bool]:
    asked = "log_expert_load" if config.log_expert_load else config.update_bias_rate or "auto"
    if config.update_bias_rate or (model is not None and model.has_biases):
        return Choice(True, asked, "routers' biases move once an optimizer step, by the tokens of all ranks")
    if config.log_expert_load:
        return Choice(True, asked, "tokens are counted on all ranks; OverlapProfiler logs them")
    return Choice(False, asked, "no router has a bias that moves")


def _unspread(config: ExpertParallel, balance: Choice[bool]) -> ExpertChoices:
    """The choices where each rank has all experts: ranks only balance them together."""

    def off(asked: object) -> Choice[bool]:
        return Choice(False, asked, "each rank has all experts")

    return ExpertChoices(
        size=Choice(1, 1, "each rank has all experts, and ranks balance them together"),
        dispatcher=Choice(config.dispatcher, config.dispatcher, "tokens stay on their ranks"),
        overlap_dispatch=off(config.overlap_dispatch),
        split=Choice("experts", config.split, "tokens stay on their ranks"),
        parts=Choice(1, config.parts, "tokens stay on their ranks"),
        overlap_shared_experts=off(config.overlap_shared_experts),
        delay_wgrad=off(config.delay_wgrad),
        balance=balance,
    )


_DISPATCHERS: dict[Dispatcher, str] = {
    "alltoall": "a token travels once for each of its experts",
    "allgather": "a token travels once to each rank",
    "flex": "a token travels once to each rank that has an expert of it, by DeepEP's kernels (never run by the authors)",
}


def _refuse_settings_of_one_rank(config: ExpertParallel) -> None:
    defaults = ExpertParallel()
    for name in ("dispatcher", "split", "parts", *OVERLAPS):
        asked = getattr(config, name)
        if asked not in (getattr(defaults, name), False):
            value = "true" if asked is True else asked
            raise ConfigError(f"expert_parallel.{name}: {value} needs expert_parallel.size of at least 2")


def _layout(config: ExpertParallel, model: ExpertFacts | None, *, in_parts: bool) -> tuple[Choice[Split | Auto], Choice[int | Auto]]:
    """Decides what a part is, and how many there are."""
    split: Split | None = None if config.split == "auto" else config.split
    split = "tokens" if config.dispatcher != "alltoall" else split
    if config.parts == "auto" and not in_parts:
        return Choice(split or "experts", config.split, "there is one part"), Choice(1, "auto", "without overlap_dispatch")
    if model is None:
        return Choice(config.split, config.split, _UNKNOWN), Choice(config.parts, config.parts, _UNKNOWN)
    chosen, parts = choose(model.least, config.size, split, None if config.parts == "auto" else config.parts)
    why = "as configured" if config.parts != "auto" else "little is exposed: the first dispatch and the last combine"
    return Choice(chosen, config.split, _SPLITS[chosen]), Choice(parts, config.parts, why)


_UNKNOWN = "the model is not known yet"
_SPLITS: dict[Split, str] = {
    "experts": "a part is some experts of each rank",
    "experts+local": "a part is some experts; a rank computes its own tokens of the first and the last one apart",
    "tokens": "a part is some tokens of each expert",
}


def alternatives(config: ExpertParallel, degrees: Degrees, facts: Facts, room: Room) -> Iterator[ExpertParallel]:
    """See :class:`lightning_overlap.modes.descriptor.Alternatives`."""
    model = facts.of(ExpertFacts)
    for size in larger_sizes(config.size, degrees.stage // config.size):
        if model is not None and size <= model.least:
            yield replace(config, size=size)
    if config.size > 1 and config.overlap_dispatch == "auto":
        yield replace(config, overlap_dispatch=False)
