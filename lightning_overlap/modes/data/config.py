"""Configuration and gates of data parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_overlap.decision import Choice, Choices, ConfigError, check_count, check_switch, check_word, settle
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees

Switch = bool | Literal["auto"]

ADVICE = {
    "": "reduce_scatter_with_fp32_accumulation: true (half the bytes of gradients), or more batches a step",
    "grads": "a smaller bucket_size, which starts earlier and leaves less at the end",
    "params": "a smaller bucket_size: forward waits for its first bucket",
    "norm": "clipping by value, which waits for no norm",
}
"""By kind of transfer, what may help where it is exposed."""
UNALIGNED = "a stage whose backward is over gathers while earlier stages still compute; a later start would hide less"
"""Why ``auto`` does not align the gathers of stages that update in backward."""


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """Data parallelism with a distributed optimizer (ZeRO stage 1 with sharded gradients' reduction)."""

    size: int | Literal["auto"] = "auto"
    """Ranks along the axis; ``auto``: those that the other axes leave."""
    distributed_optimizer: Switch = "auto"
    """Each rank updates its share of the parameters and keeps the optimizer's state of that share only."""
    overlap_grad_reduce: Switch = "auto"
    """Reduce a bucket as soon as backward has made its gradients."""
    overlap_param_gather: Switch = "auto"
    """Gather updated parameters under the next forward. Needs the distributed optimizer."""
    overlap_optimizer_step: Switch = "auto"
    """Update a bucket as soon as it is reduced, in backward. Needs that nothing looks at all the gradients first."""
    align_param_gather: Switch = "auto"
    """Start the gathers of a pipeline's stages after the whole step, in the order of forward, not in each stage's last backward; on
    NCCL ``auto`` does, with or without a pipeline."""
    bucket_size: int | Literal["auto"] = "auto"
    """Elements at which a bucket closes. Smaller hides more, larger moves faster."""
    param_gather_prefetch: int | Literal["all"] = "all"
    """Buckets in flight ahead of the one that forward waits for."""
    grad_reduce_dtype: Literal["fp32", "param"] = "fp32"
    """Dtype in which gradients are kept and reduced: fp32, or the parameter's."""
    reduce_scatter_with_fp32_accumulation: bool = False
    """bf16 on the wire, sums in fp32. Halves the bytes of an fp32 reduction."""
    average_in_collective: bool = True
    """Divide by the number of ranks in the reduction; otherwise before it."""
    check_for_nan_in_grad: bool = False
    """Raise before a gradient that is not finite is sent, naming parameter, bucket and rank."""
    num_optimizer_instances: int = 1
    """Shard inside each of so many groups of ranks, and all-reduce across them."""
    pad_buckets_for_high_nccl_busbw: bool = False
    """Pad buckets to multiples of 2**16 elements."""

    def __post_init__(self) -> None:
        for name in ("size", "bucket_size", "param_gather_prefetch", "num_optimizer_instances"):
            value, word = getattr(self, name), "all" if name == "param_gather_prefetch" else "auto"
            if value == word and name != "num_optimizer_instances":
                continue
            check_count(f"data_parallel.{name}", value, most=None)
        for name in (
            "distributed_optimizer",
            "overlap_grad_reduce",
            "overlap_param_gather",
            "overlap_optimizer_step",
            "align_param_gather",
        ):
            check_switch(f"data_parallel.{name}", getattr(self, name))
        check_word("data_parallel.grad_reduce_dtype", self.grad_reduce_dtype, ("fp32", "param"))


@dataclass(frozen=True, kw_only=True)
class DataChoices(Choices):
    """What was decided for data parallelism; for its settings see :class:`DataParallel`.

    Attributes:
        distributed_optimizer: what a rank updates: a flat shard of the elements, some whole parameters, or (``off``) everything.
        gradients: the collective that reduces them.
        overlap_grad_reduce: each bucket is reduced in backward.
        overlap_param_gather: parameters are gathered under the next forward, before it, or (``off``) in the step.
        overlap_optimizer_step: when buckets are updated; ``off``: all of them in the user's ``step()``.
        align_param_gather: gathers start after the step, on all ranks in the order of forward.
        bucket_size: elements at which a bucket closes.
        grad_reduce_dtype: in which gradients are kept and reduced.
        num_optimizer_instances: groups of ranks inside each of which the optimizer is sharded.
        later_parameters: parameters that are frozen now may be trained later.
    """

    distributed_optimizer: Choice[Literal["off", "elementwise shards", "whole parameters"]]
    gradients: Choice[Literal["all-reduce", "reduce-scatter"]]
    overlap_grad_reduce: Choice[bool]
    overlap_param_gather: Choice[Literal["off", "under next forward", "before next forward"]]
    overlap_optimizer_step: Choice[Literal["off", "in backward", "after backward"]]
    align_param_gather: Choice[bool]
    bucket_size: Choice[int]
    grad_reduce_dtype: Choice[str]
    num_optimizer_instances: Choice[int]
    later_parameters: bool

    @property
    def is_sharded(self) -> bool:
        """Whether a rank updates a part of the parameters only."""
        return self.distributed_optimizer.value != "off"


def decide(config: DataParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> DataChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if degrees.gradients == 1:
        return None
    if facts.precision == "16-mixed":
        raise ConfigError("precision 16-mixed scales the loss, which is not in this version; use bf16-mixed")
    optimizer = _optimizer(config, facts)
    sharded = optimizer.value != "off"
    gradients = _gradients(sharded, facts)
    _refuse_settings(config, degrees.gradients, sharded=sharded, scattered=gradients.value == "reduce-scatter")
    reduce = settle(
        "data_parallel.overlap_grad_reduce",
        config.overlap_grad_reduce,
        best=True,
        otherwise=False,
        because="a bucket is reduced as soon as backward has made its gradients",
        overlap=overlap,
    )
    gather = _gather(config, facts, sharded=sharded, overlap=overlap)
    step = _step(config, facts, sharded=sharded, reduced=reduce.value, gathered=gather.value != "off", overlap=overlap)
    wire = "sent in bf16, summed in fp32" if config.reduce_scatter_with_fp32_accumulation else "gradients are sent as they are kept"
    instances = config.num_optimizer_instances
    return DataChoices(
        size=Choice(degrees.data, config.size, _ranks(degrees)),
        distributed_optimizer=optimizer,
        gradients=gradients,
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather,
        overlap_optimizer_step=step,
        align_param_gather=_alignment(config, degrees, facts, sharded=sharded, gather=gather, step=step, overlap=overlap),
        bucket_size=_bucket_size(config, degrees, facts),
        grad_reduce_dtype=Choice(config.grad_reduce_dtype, config.grad_reduce_dtype, wire),
        num_optimizer_instances=Choice(instances, instances, f"the optimizer is sharded over {degrees.gradients // instances} ranks"),
        later_parameters=bool(facts.unfreezers),
    )


def _ranks(degrees: Degrees) -> str:
    if degrees.context == 1:
        return f"of {degrees.world} ranks"
    return f"of {degrees.world} ranks; gradients are averaged over these x context {degrees.context}"


def _needs_optimizer(sharded: bool) -> tuple[bool, str]:
    return not sharded, "it needs the distributed optimizer; set data_parallel.distributed_optimizer: true"


def _gather(
    config: DataParallel, facts: Facts, *, sharded: bool, overlap: bool
) -> Choice[Literal["off", "under next forward", "before next forward"]]:
    best: Literal["under next forward", "before next forward"] = "before next forward" if facts.compiled else "under next forward"
    compiled = "compiled code cannot wait for single weights, so all of them are waited for before it"
    return settle(
        "data_parallel.overlap_param_gather",
        config.overlap_param_gather,
        best=best,
        otherwise="off",
        because=compiled if facts.compiled else "each rank updates a shard; forward waits where it reads a weight",
        blockers=[_needs_optimizer(sharded)],
        overlap=overlap,
    )


def _step(
    config: DataParallel, facts: Facts, *, sharded: bool, reduced: bool, gathered: bool, overlap: bool
) -> Choice[Literal["off", "in backward", "after backward"]]:
    inseparable = [f.reason for f in facts.optimizers or () if not f.separable]
    readers = ", ".join(facts.gradient_readers)
    # A step that looks at all the gradients comes after backward, and can still go bucket by bucket, each followed by its gather.
    by_bucket = overlap and config.overlap_optimizer_step == "auto" and gathered and not inseparable
    otherwise: Literal["off", "after backward"] = "after backward" if by_bucket else "off"
    return settle(
        "data_parallel.overlap_optimizer_step",
        config.overlap_optimizer_step,
        best="in backward",
        otherwise=otherwise,
        because="nothing looks at all the gradients before the step",
        blockers=[
            _needs_optimizer(sharded),
            (not reduced, "gradients are not reduced in backward; set data_parallel.overlap_grad_reduce: true"),
            (bool(facts.gradient_clip_val), "gradient_clip_val looks at all the gradients; train without it"),
            (bool(readers), f"{readers} may read or change gradients; remove it"),
            (config.check_for_nan_in_grad, "check_for_nan_in_grad must pass before any update; turn it off"),
            (bool(inseparable), "; ".join(inseparable) + "; use an optimizer such as AdamW"),
        ],
        overlap=overlap,
    )


def _alignment(
    config: DataParallel,
    degrees: Degrees,
    facts: Facts,
    *,
    sharded: bool,
    gather: Choice[Literal["off", "under next forward", "before next forward"]],
    step: Choice[Literal["off", "in backward", "after backward"]],
    overlap: bool,
) -> Choice[bool]:
    ordered = facts.backend == "nccl"
    alone = degrees.pipeline == 1 and not ordered
    earlier = step.value == "in backward"
    if ordered and earlier and config.align_param_gather is False:
        raise ConfigError(
            "data_parallel.align_param_gather: false cannot run on NCCL: a gather that is posted when a rank sees that a reduce has "
            "arrived stands before reduces that another rank has posted first, and may wait for them. Leave it out"
        )
    return settle(
        "data_parallel.align_param_gather",
        config.align_param_gather,
        best=True,
        otherwise=False,
        because="all ranks post in one order on NCCL"
        if ordered
        else "all stages gather in the order of forward once the step is over",
        blockers=[
            (alone, "one rank has all stages; leave it out, or set pipeline_parallel.size"),
            _needs_optimizer(sharded),
            (gather.value == "off", "parameters are gathered in the step; set data_parallel.overlap_param_gather: true"),
            (config.param_gather_prefetch != "all", "forward posts what param_gather_prefetch bounds; set it to all"),
            (
                config.align_param_gather == "auto" and not alone and not ordered,
                UNALIGNED if earlier else "all stages gather after backward as it is",
            ),
        ],
        overlap=overlap,
    )


def _optimizer(config: DataParallel, facts: Facts) -> Choice[Literal["off", "elementwise shards", "whole parameters"]]:
    if any(f.name == "LBFGS" for f in facts.optimizers or ()) and facts.automatic_optimization:
        raise ConfigError("L-BFGS evaluates the loss inside its step, where nothing overlaps; use AdamW, or manual optimization")
    whole = [f.reason for f in facts.optimizers or () if not f.elementwise]
    coupled = [f.reason for f in facts.optimizers or () if not f.independent]
    readers = [f"{f.name}.{method}" for f in facts.optimizers or () for method in f.methods]
    best: Literal["elementwise shards", "whole parameters"] = "whole parameters" if whole else "elementwise shards"
    return settle(
        "data_parallel.distributed_optimizer",
        config.distributed_optimizer,
        best=best,
        otherwise="off",
        because="; ".join(whole) or "; ".join(f.reason for f in facts.optimizers or ()) or "the optimizer is not known yet",
        blockers=[
            (
                not facts.automatic_optimization,
                "with manual optimization user code toggles and steps whole parameters; set automatic_optimization = True",
            ),
            (bool(coupled), f"{'; '.join(coupled)}; use an optimizer such as AdamW"),
            (
                bool(readers),
                f"{', '.join(readers)} reads the optimizer's state outside of the step, by parameters, and would find none in shards; "
                "use an optimizer without",
            ),
            (bool(facts.unfreezers), f"{', '.join(facts.unfreezers)} brings in parameters while training; remove it"),
        ],
    )


def _gradients(sharded: bool, facts: Facts) -> Choice[Literal["all-reduce", "reduce-scatter"]]:
    if not sharded:
        return Choice("all-reduce", None, "every rank updates every parameter")
    if facts.gradient_readers:
        return Choice("all-reduce", None, f"{', '.join(facts.gradient_readers)} may read gradients, so every rank gets all of them")
    return Choice("reduce-scatter", None, "each rank needs the gradients of its shard only")


def _bucket_size(config: DataParallel, degrees: Degrees, facts: Facts) -> Choice[int]:
    if config.bucket_size != "auto":
        return Choice(config.bucket_size, config.bucket_size, "elements")
    large = max(40_000_000, 1_000_000 * degrees.gradients)
    if facts.parameters is None:
        return Choice(large, "auto", "elements; a smaller model gets 32 buckets")
    of_rank = facts.parameters // (degrees.pipeline * degrees.tensor)
    size = min(large, max(of_rank // 32, 65_536))
    return Choice(size, "auto", f"elements: {of_rank:,} parameters a rank / 32, at least 65,536 and at most {large:,}")


def _refuse_settings(config: DataParallel, size: int, *, sharded: bool, scattered: bool) -> None:
    """Raises:
    ConfigError: with every reason against settings that decide nothing.
    """
    instances = config.num_optimizer_instances
    reasons = [
        (instances > 1 and not sharded, "num_optimizer_instances > 1 needs the distributed optimizer"),
        (size % instances > 0, f"num_optimizer_instances={instances} must divide the {size} ranks that average gradients"),
        (
            config.reduce_scatter_with_fp32_accumulation and not scattered,
            "reduce_scatter_with_fp32_accumulation needs gradients to be reduce-scattered; set it to false",
        ),
    ]
    if problems := [reason for applies, reason in reasons if applies]:
        raise ConfigError("data_parallel: " + "; ".join(problems))
