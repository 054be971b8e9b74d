"""Configuration and decisions of data parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lightning_overlap.decision import Choice, Choices, ConfigError, check_count, check_flags, check_switch, check_word, settle
from lightning_overlap.facts import Facts, Room
from lightning_overlap.ranks.degrees import Degrees

Switch = bool | Literal["auto"]

ADVICE = {
    "": "reduce_scatter_with_fp32_accumulation: true (half the bytes of gradients), or more batches a step",
    "grads": "a smaller bucket_size, which starts earlier and leaves less at the end",
    "params": "a smaller bucket_size: forward waits for its first bucket",
    "norm": "clipping by value, which waits for no norm",
}
"""By kind of transfer: a setting that may hide more of it."""
UNALIGNED = "each stage gathers when its own backward ends, while earlier stages still compute, which hides more"
"""Why ``auto`` does not align the gathers of stages that update in backward."""
UNKNOWN_OPTIMIZER = "default for elementwise optimizers such as AdamW; checked when fit creates it"
"""Why the optimizer is sharded before it is known."""
MIN_BUCKET = 65_536
"""Elements of the smallest bucket that ``auto`` chooses."""
GROWTH = "; buckets grow towards the middle of backward"
FEW_AND_MANY = (8, 64)
"""Numbers of buckets of one size that are worth a try beside those of ``auto``."""


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """Data parallelism with a distributed optimizer (ZeRO stage 1, with reduce-scattered gradients)."""

    size: int | Literal["auto"] = "auto"
    """Number of data ranks; ``auto``: all ranks divided by the sizes of the other modes."""
    distributed_optimizer: Switch = "auto"
    """Each rank updates a shard of the parameters and keeps the optimizer's state of that shard only."""
    overlap_grad_reduce: Switch = "auto"
    """Reduce a bucket as soon as its gradients are complete."""
    overlap_param_gather: Switch = "auto"
    """Gather updated parameters under the next forward. Needs the distributed optimizer."""
    overlap_optimizer_step: Switch = "auto"
    """Update a bucket in backward, as soon as it is reduced. Nothing may need all gradients first, such as clipping."""
    align_param_gather: Switch = "auto"
    """Start the gathers of all pipeline stages after the step, in the order of forward, instead of in each stage's last backward. On
    NCCL ``auto`` turns it on, with or without a pipeline."""
    bucket_size: int | Literal["auto"] = "auto"
    """Elements at which a bucket closes. Smaller buckets hide more, larger ones take less of the processor. ``auto``: a 32nd of the
    elements for the first and the last bucket of a backward, and more for those between."""
    param_gather_prefetch: int | Literal["all"] = "all"
    """Buckets that are gathered ahead of the one that forward waits for."""
    grad_reduce_dtype: Literal["fp32", "param"] = "fp32"
    """Dtype in which gradients are kept and reduced: fp32, or the parameter's."""
    reduce_scatter_with_fp32_accumulation: bool = False
    """Send bf16 and sum in fp32. Halves the bytes of an fp32 reduction."""
    average_in_collective: bool = True
    """Divide gradients by the number of ranks in the reduction; otherwise before it."""
    check_for_nan_in_grad: bool = False
    """Raise an error, with parameter, bucket and rank, if a gradient is NaN or infinite. Nothing is updated before this check."""
    num_optimizer_instances: int = 1
    """Shard the optimizer inside each of so many groups of ranks, and all-reduce shards over the groups."""
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
        check_flags("data_parallel", self)
        check_word("data_parallel.grad_reduce_dtype", self.grad_reduce_dtype, ("fp32", "param"))


@dataclass(frozen=True, kw_only=True)
class DataChoices(Choices):
    """The decisions for data parallelism; for the settings see :class:`DataParallel`.

    Attributes:
        distributed_optimizer: what a rank updates: a flat shard, some whole parameters, or (``off``) all parameters.
        gradients: the collective that reduces gradients.
        overlap_grad_reduce: whether buckets are reduced in backward.
        overlap_param_gather: when parameters are gathered: under the next forward, before it, or (``off``) in the step.
        overlap_optimizer_step: when buckets are updated; ``off``: all at once in the user's ``step()``.
        align_param_gather: whether gathers start after the step, on all ranks in the order of forward.
        bucket_size: elements at which a bucket closes.
        largest_bucket: elements at which the largest one closes; 0: all are alike.
        grad_reduce_dtype: in which gradients are kept and reduced.
        num_optimizer_instances: groups of ranks inside each of which the optimizer is sharded.
        later_parameters: whether parameters that are frozen at setup may be trained later.
    """

    distributed_optimizer: Choice[Literal["off", "elementwise shards", "whole parameters"]]
    gradients: Choice[Literal["all-reduce", "reduce-scatter"]]
    overlap_grad_reduce: Choice[bool]
    overlap_param_gather: Choice[Literal["off", "under next forward", "before next forward"]]
    overlap_optimizer_step: Choice[Literal["off", "in backward", "after backward"]]
    align_param_gather: Choice[bool]
    bucket_size: Choice[int]
    largest_bucket: int
    grad_reduce_dtype: Choice[str]
    num_optimizer_instances: Choice[int]
    later_parameters: bool

    @property
    def is_sharded(self) -> bool:
        """Whether a rank updates a shard of the parameters only."""
        return self.distributed_optimizer.value != "off"


def decide(config: DataParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> DataChoices | None:
    """Decides everything of this mode; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if degrees.gradients == 1:
        return None
    if facts.precision == "16-mixed":
        raise ConfigError("precision 16-mixed scales the loss, which is not supported; use bf16-mixed")
    optimizer = _optimizer(config, facts)
    sharded = optimizer.value != "off"
    gradients = _gradients(sharded, facts)
    _refuse_settings(config, degrees, sharded=sharded, scattered=gradients.value == "reduce-scatter")
    reduce = settle(
        "data_parallel.overlap_grad_reduce",
        config.overlap_grad_reduce,
        best=True,
        otherwise=False,
        because="a bucket is reduced as soon as its gradients are complete",
        overlap=overlap,
    )
    gather = _gather(config, facts, sharded=sharded, overlap=overlap)
    step = _step(config, facts, sharded=sharded, reduced=reduce.value, gathered=gather.value != "off", overlap=overlap)
    wire = "sent in bf16, summed in fp32" if config.reduce_scatter_with_fp32_accumulation else "gradients are kept and sent in it"
    instances = config.num_optimizer_instances
    return DataChoices(
        size=Choice(degrees.data, config.size, _size_reason(degrees, facts)),
        distributed_optimizer=optimizer,
        gradients=gradients,
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather,
        overlap_optimizer_step=step,
        align_param_gather=_alignment(config, degrees, facts, sharded=sharded, gather=gather, step=step, overlap=overlap),
        bucket_size=_bucket_size(config, degrees, facts),
        largest_bucket=_largest_bucket(degrees) if config.bucket_size == "auto" else 0,
        grad_reduce_dtype=Choice(config.grad_reduce_dtype, config.grad_reduce_dtype, wire),
        num_optimizer_instances=Choice(instances, instances, f"the optimizer is sharded over {degrees.gradients // instances} ranks"),
        later_parameters=bool(facts.unfreezers),
    )


def _size_reason(degrees: Degrees, facts: Facts) -> str:
    others = {"pipeline": degrees.pipeline, "context": degrees.context, "tensor": degrees.tensor}
    reason = " / ".join([f"{facts.world_size} ranks", *(f"{name} {size}" for name, size in others.items() if size > 1)])
    if degrees.context == 1:
        return reason
    return f"{reason}; gradients are averaged over {degrees.gradients} ranks (data {degrees.data} x context {degrees.context})"


def _needs_optimizer(sharded: bool) -> tuple[bool, str]:
    return not sharded, "it needs the distributed optimizer; set data_parallel.distributed_optimizer: true"


def _gather(
    config: DataParallel, facts: Facts, *, sharded: bool, overlap: bool
) -> Choice[Literal["off", "under next forward", "before next forward"]]:
    best: Literal["under next forward", "before next forward"] = "before next forward" if facts.compiled else "under next forward"
    compiled = "compiled code cannot wait for a single weight, so all are gathered before it runs"
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
    # A step that needs all gradients comes after backward. It can still update one bucket after the other, each before its gather.
    by_bucket = overlap and config.overlap_optimizer_step == "auto" and gathered and not inseparable
    otherwise: Literal["off", "after backward"] = "after backward" if by_bucket else "off"
    return settle(
        "data_parallel.overlap_optimizer_step",
        config.overlap_optimizer_step,
        best="in backward",
        otherwise=otherwise,
        because="nothing needs all gradients before the step",
        blockers=[
            _needs_optimizer(sharded),
            (not reduced, "gradients are not reduced in backward; set data_parallel.overlap_grad_reduce: true"),
            (bool(facts.gradient_clip_val), "gradient_clip_val needs all gradients before the step; train without it"),
            (bool(readers), f"{readers} may read or change gradients; remove it"),
            (config.check_for_nan_in_grad, "check_for_nan_in_grad checks all gradients before the step; turn it off"),
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
    asked = config.align_param_gather is True
    earlier = step.value == "in backward"
    if ordered and earlier and config.align_param_gather is False:
        raise ConfigError(
            "data_parallel.align_param_gather: false can deadlock on NCCL: NCCL needs the same order of collectives on all ranks, "
            "and without alignment each rank starts its all-gathers when its own reductions complete. Remove the setting, or set "
            "it to auto"
        )
    return settle(
        "data_parallel.align_param_gather",
        config.align_param_gather,
        best=True,
        otherwise=False,
        because="on NCCL all ranks must post in one order" if ordered else "after the step, all stages gather in the order of forward",
        blockers=[
            (
                alone,
                "no pipeline: there are no stages to align" + ("; remove the setting, or set pipeline_parallel.size" if asked else ""),
            ),
            _needs_optimizer(sharded),
            (gather.value == "off", "parameters are gathered in the step; set data_parallel.overlap_param_gather: true"),
            (config.param_gather_prefetch != "all", "with param_gather_prefetch, forward posts the gathers; set it to all"),
            (
                config.align_param_gather == "auto" and not alone and not ordered,
                UNALIGNED if earlier else "all stages gather after backward without it",
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
        because="; ".join(whole) or "; ".join(f.reason for f in facts.optimizers or ()) or UNKNOWN_OPTIMIZER,
        blockers=[
            (
                not facts.automatic_optimization,
                "with manual optimization user code steps unsharded parameters; set automatic_optimization = True",
            ),
            (bool(coupled), f"{'; '.join(coupled)}; use an optimizer such as AdamW"),
            (
                bool(readers),
                f"{', '.join(readers)} reads the optimizer's state outside the step, by parameter, but the state is sharded; use an "
                "optimizer that does not",
            ),
            (bool(facts.unfreezers), f"{', '.join(facts.unfreezers)} adds parameters during training; remove it"),
        ],
    )


def _gradients(sharded: bool, facts: Facts) -> Choice[Literal["all-reduce", "reduce-scatter"]]:
    if not sharded:
        return Choice("all-reduce", None, "every rank updates every parameter")
    if facts.gradient_readers:
        return Choice("all-reduce", None, f"{', '.join(facts.gradient_readers)} may read gradients, so each rank gets all gradients")
    return Choice("reduce-scatter", None, "each rank needs the gradients of its shard only")


def _largest_bucket(degrees: Degrees) -> int:
    """Elements of the largest bucket that ``auto`` chooses."""
    return max(40_000_000, 1_000_000 * degrees.gradients)


def _bucket_size(config: DataParallel, degrees: Degrees, facts: Facts) -> Choice[int]:
    if config.bucket_size != "auto":
        return Choice(config.bucket_size, config.bucket_size, "elements")
    large = _largest_bucket(degrees)
    if facts.parameters is None:
        return Choice(large, "auto", "elements, the maximum; a smaller model gets smaller ones")
    per_rank = facts.parameters // (degrees.pipeline * degrees.tensor)
    share = per_rank // 32
    limit = ""
    if share < MIN_BUCKET:
        limit = f" = {share:,}, raised to the minimum {MIN_BUCKET:,}"
    elif share > large:
        limit = f" = {share:,}, lowered to the maximum {large:,}"
    return Choice(min(large, max(share, MIN_BUCKET)), "auto", f"elements: {per_rank:,} parameters per rank / 32{limit}{GROWTH}")


def _refuse_settings(config: DataParallel, degrees: Degrees, *, sharded: bool, scattered: bool) -> None:
    """Checks settings that are no decision of their own.

    Raises:
        ConfigError: with every reason against them.
    """
    instances, size = config.num_optimizer_instances, degrees.gradients
    reasons = [
        (
            instances > 1 and degrees.expert > 1,
            f"num_optimizer_instances={instances} needs all parameters on every rank, and expert_parallel.size={degrees.expert} "
            "spreads experts; set num_optimizer_instances: 1",
        ),
        (instances > 1 and not sharded, "num_optimizer_instances > 1 needs the distributed optimizer"),
        (size % instances > 0, f"num_optimizer_instances={instances} must divide the {size} ranks that average gradients"),
        (
            config.reduce_scatter_with_fp32_accumulation and not scattered,
            "reduce_scatter_with_fp32_accumulation needs gradients to be reduce-scattered; set it to false",
        ),
    ]
    if problems := [reason for applies, reason in reasons if applies]:
        raise ConfigError("data_parallel: " + "; ".join(problems))


def alternatives(config: DataParallel, degrees: Degrees, facts: Facts, room: Room) -> Iterator[DataParallel]:
    """See :class:`lightning_overlap.modes.descriptor.Alternatives`."""
    if degrees.gradients == 1:
        return
    if config.bucket_size == "auto" and facts.parameters is not None:
        per_rank = facts.parameters // (degrees.pipeline * degrees.tensor)
        for buckets in FEW_AND_MANY:
            yield replace(config, bucket_size=max(per_rank // buckets, MIN_BUCKET))
    if config.distributed_optimizer == "auto":
        yield replace(config, distributed_optimizer=False)
