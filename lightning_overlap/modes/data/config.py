"""Configuration and gates of data parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_overlap.decision import ConfigError, Decision, check_count, settle

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts

Switch = bool | Literal["auto"]

ALIGNING = "a stage that is through gathers while those before it are not; later, less of that is hidden"
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

    def advice(self, kind: str) -> str:
        """What may help where a kind of transfer is exposed: ``grads``, ``params``, ``norm``; ``bytes``: the link is too slow."""
        known = {
            "bytes": "reduce_scatter_with_fp32_accumulation: true (half the bytes of gradients), or more batches a step",
            "grads": "a smaller bucket_size, which starts earlier and leaves less at the end",
            "params": "a smaller bucket_size: forward waits for its first bucket",
            "norm": "clipping by value, which waits for no norm",
        }
        return f"data_parallel: {known.get(kind, known['bytes'])}"

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
            if getattr(self, name) not in (True, False, "auto"):
                raise ConfigError(f"data_parallel.{name} must be true, false or auto, got {getattr(self, name)!r}")
        if self.grad_reduce_dtype not in ("fp32", "param"):
            raise ConfigError(f"data_parallel.grad_reduce_dtype must be fp32 or param, got {self.grad_reduce_dtype!r}")


def decide(own: DataParallel, whole: OverlapConfig, facts: Facts) -> list[Decision]:
    """The home of this mode's gates."""
    data_ranks = whole.degrees(facts.world_size).data
    if data_ranks == 1:
        return [Decision("data_parallel", str(own.size), "off", "the data axis has one rank")]
    if facts.precision == "16-mixed":
        raise ConfigError("precision 16-mixed scales the loss, which is not in this version; use bf16-mixed")
    optimizer = _optimizer(own, facts)
    sharded = optimizer.choice != "off"
    gradients = _gradients(sharded, facts)
    quiet = whole.overlap == "off"

    def overlap(feature: str, asked: Switch, best: str, because: str, blockers: list[tuple[bool, str]]) -> Decision:
        if quiet:
            return Decision(f"data_parallel.{feature}", str(asked), "off", 'overlap="off" turns every overlap off')
        return settle(f"data_parallel.{feature}", asked, best=best, because=because, blockers=blockers)

    needs_optimizer = (not sharded, "it needs the distributed optimizer; set data_parallel.distributed_optimizer: true")
    reduce = overlap("overlap_grad_reduce", own.overlap_grad_reduce, "in backward", f"{data_ranks} ranks", [])
    gather = overlap("overlap_param_gather", own.overlap_param_gather, "under next forward", "updated in shards", [needs_optimizer])
    if facts.compiled and gather.choice != "off":
        why = "compiled code reads weights where nothing can wait for them, so all are waited for before it"
        gather = Decision(gather.feature, gather.asked, "until next forward", why)
    inseparable = [f.reason for f in facts.optimizers or () if not f.separable]
    readers = ", ".join(facts.gradient_readers)
    step = overlap(
        "overlap_optimizer_step",
        own.overlap_optimizer_step,
        "in backward",
        "nothing looks at all the gradients before the step",
        [
            needs_optimizer,
            (reduce.choice == "off", "gradients are not reduced in backward; set data_parallel.overlap_grad_reduce: true"),
            (bool(facts.gradient_clip_val), "gradient_clip_val looks at all the gradients; train without it"),
            (bool(readers), f"{readers} may read or change gradients; remove it"),
            (own.check_for_nan_in_grad, "check_for_nan_in_grad must pass before any update; turn it off"),
            (bool(inseparable), "; ".join(inseparable) + "; use an optimizer such as AdamW"),
        ],
    )
    if step.choice == "off" and step.asked == "auto" and not quiet and gather.choice != "off" and not inseparable:
        step = Decision(step.feature, step.asked, "by bucket after backward", step.why)
    ordered = facts.backend == "nccl"
    alone = whole.pipeline_parallel.size == 1 and not ordered
    earlier = step.choice == "in backward"
    if ordered and earlier and own.align_param_gather is False:
        raise ConfigError(
            "data_parallel.align_param_gather: false cannot run on NCCL: a gather that is posted when a rank sees that a reduce has "
            "arrived stands before reduces that another rank has posted first, and may wait for them. Leave it out"
        )
    align = overlap(
        "align_param_gather",
        own.align_param_gather,
        "after the step",
        "all ranks post in one order on NCCL" if ordered else "all stages gather in the order of forward once the step is over",
        [
            (alone, "one rank has all stages; leave it out, or set pipeline_parallel.size"),
            needs_optimizer,
            (gather.choice == "off", "parameters are gathered in the step; set data_parallel.overlap_param_gather: true"),
            (own.param_gather_prefetch != "all", "forward posts what param_gather_prefetch bounds; set it to all"),
            (
                own.align_param_gather == "auto" and not alone and not ordered,
                ALIGNING if earlier else "all stages gather after backward as it is",
            ),
        ],
    )
    return [
        Decision("data_parallel", str(own.size), str(data_ranks), f"{facts.world_size} ranks"),
        optimizer,
        gradients,
        reduce,
        gather,
        step,
        align,
        _bucket_size(own, whole, facts),
        *_settings(own, data_ranks, sharded, gradients.choice),
    ]


def _optimizer(own: DataParallel, facts: Facts) -> Decision:
    feature = "data_parallel.distributed_optimizer"
    if any(f.name == "LBFGS" for f in facts.optimizers or ()) and facts.automatic_optimization:
        raise ConfigError("L-BFGS evaluates the loss inside its step, where nothing overlaps; use AdamW, or manual optimization")
    whole = [f.reason for f in facts.optimizers or () if not f.elementwise]
    coupled = [f.reason for f in facts.optimizers or () if not f.independent]
    readers = [f"{f.name}.{method}" for f in facts.optimizers or () for method in f.methods]
    return settle(
        feature,
        own.distributed_optimizer,
        best="whole parameters" if whole else "elementwise shards",
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


def _gradients(sharded: bool, facts: Facts) -> Decision:
    feature = "data_parallel.gradients"
    if not sharded:
        return Decision(feature, "", "all-reduce", "every rank updates every parameter")
    if facts.gradient_readers:
        return Decision(
            feature, "", "all-reduce", f"{', '.join(facts.gradient_readers)} may read gradients, so every rank gets all of them"
        )
    return Decision(feature, "", "reduce-scatter", "each rank needs the gradients of its shard only")


def _bucket_size(own: DataParallel, whole: OverlapConfig, facts: Facts) -> Decision:
    feature = "data_parallel.bucket_size"
    if own.bucket_size != "auto":
        return Decision(feature, str(own.bucket_size), str(own.bucket_size), "elements, asked for")
    large = max(40_000_000, 1_000_000 * whole.degrees(facts.world_size).data)
    if facts.parameters is None:
        return Decision(feature, "auto", str(large), "elements; a smaller model gets 32 buckets")
    degrees = whole.degrees(facts.world_size)
    here = facts.parameters // (degrees.pipeline * degrees.tensor)
    size = min(large, max(here // 32, 65_536))
    return Decision(feature, "auto", str(size), f"elements; {here:,} in all on a rank, 32 buckets leave a short tail")


def _settings(own: DataParallel, data_ranks: int, sharded: bool, gradients: str) -> list[Decision]:
    problems = []
    if own.num_optimizer_instances > 1:
        if not sharded:
            problems.append("num_optimizer_instances > 1 needs the distributed optimizer")
        if data_ranks % own.num_optimizer_instances:
            problems.append(f"num_optimizer_instances={own.num_optimizer_instances} must divide the {data_ranks} data ranks")
    if own.reduce_scatter_with_fp32_accumulation and gradients != "reduce-scatter":
        problems.append("reduce_scatter_with_fp32_accumulation needs gradients to be reduce-scattered; set it to false")
    if problems:
        raise ConfigError("data_parallel: " + "; ".join(problems))
    wire = "bf16 on the wire, fp32 sums" if own.reduce_scatter_with_fp32_accumulation else "on the wire as kept"
    return [
        Decision("data_parallel.grad_reduce_dtype", own.grad_reduce_dtype, own.grad_reduce_dtype, wire),
        Decision(
            "data_parallel.num_optimizer_instances",
            str(own.num_optimizer_instances),
            str(own.num_optimizer_instances),
            f"shards over {data_ranks // own.num_optimizer_instances} ranks",
        ),
    ]
