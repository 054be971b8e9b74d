"""Configuration and gates of pipeline parallelism. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lightning_overlap.decision import (
    MOST,
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
from lightning_overlap.facts import Facts, Room
from lightning_overlap.ranks.degrees import Degrees, larger_sizes
from lightning_overlap.steps.defer import defer
from lightning_overlap.steps.named_schedules import SCHEDULES, build
from lightning_overlap.steps.pairs import pair
from lightning_overlap.steps.schedule import Schedule, parse, validate
from lightning_overlap.steps.simulate import simulate

ADVICE = {
    "bytes": "fewer virtual_stages, which send less",
    "tied": "an untied head",
    "norm": "clipping by value, which needs no norm",
    "": "a larger p2p_prefetch, or more microbatches",
}
"""By kind of transfer, what may help where it is exposed."""
WEIGHTS = ("samples", "labels", "causal_labels", "sum")
"""Ways to weigh a microbatch's loss in the batch's loss."""
LEAST_GAIN = 0.01
"""The smallest estimated gain, as a part of a step, for which deferring the head's gradients may take memory."""


EVALUATION = {
    "replicate": "the last hidden states are sent to all ranks, and each computes the loss",
    "last_stage": "the last stage computes the loss, and sends the others what it logs and returns",
}
"""By setting, what it does in a validation inside fit."""


@dataclass(frozen=True, kw_only=True)
class PipelineParallel:
    """Pipeline parallelism: ranks hold consecutive blocks, and a batch passes through them in microbatches."""

    size: int = 1
    """Ranks along the axis."""
    virtual_stages: int = 1
    """Stages on each rank. More stages make the bubble smaller and send more."""
    microbatches: int | Literal["auto"] = "auto"
    """Parts of a batch; ``auto``: four for each rank. A batch with fewer samples has as many parts as samples. Ranks whose
    experts get each other's tokens all take the smallest of their numbers."""
    batch_dims: dict[str, int | None] = field(default_factory=dict)
    """By the path of a tensor in the batch (``mask``, or ``1.mask`` in a tuple), its dim of samples; null: each microbatch gets all of
    it. By default each tensor whose dim 0 has as many entries as the batch has samples is split along that dim."""
    microbatch_weight: Literal["samples", "labels", "causal_labels", "sum"] = "samples"
    """The weight of a microbatch's loss. ``samples``: the loss is a mean over samples. ``labels``: it is a mean over the entries of
    the batch's ``labels`` that are not -100; ``causal_labels``: the same without the first entry of each sequence, as in Hugging
    Face's causal models. ``sum``: it is a sum, or divided by a number of the complete batch, and losses of microbatches add up. A
    method ``microbatch_weight(batch)`` of the module, which returns a microbatch's weight, takes precedence."""
    schedule: str = "auto"
    """``1f1b``, ``eager_1f1b`` (holds more activations, and so hides transfers), ``interleaved``, ``gpipe``, ``zb_h1``,
    ``interleaved_zb``, ``zb_v``, ``dualpipev``, or a schedule's file; ``auto``: ``interleaved`` with virtual stages, else
    ``eager_1f1b``."""
    microbatch_group: int | None = None
    """Microbatches of one stage that an interleaved schedule runs before it runs the rank's next stage; by default ``size``."""
    layers_per_stage: tuple[int, ...] | None = None
    """Blocks of each stage; by default stages have about the same number of parameters."""
    layout: str | None = None
    """Stages as a string, for example ``Et*3|(tt|)*5,tL``: E is the embedding, t a block, L head and loss, | separates stages."""
    held_by_all: tuple[str, ...] = ()
    """Names of modules and parameters that every stage holds, because they are used both before and after the blocks, or beside them.
    Their gradients are summed over the stages, like those of a tied embedding."""
    overlap_p2p: bool | Literal["auto"] = "auto"
    """Transfers between stages run during compute: receives are posted early, and no rank waits for a send."""
    p2p_prefetch: int = 2
    """Receives that are posted early, for each direction."""
    defer_embedding_wgrad: bool | Literal["auto"] = "auto"
    """The rank of the last stage computes the weights' gradients of the head (linear layers after the blocks) while it would wait, and
    so sends sooner. Each deferred microbatch keeps the memory of its logits."""
    lanes: bool | Literal["auto"] = "auto"
    """The forward of a microbatch and the backward of another run beside each other, so that what one waits for (tensor, context or
    expert parallelism) travels while the other computes. With ``size: 1`` too: then microbatches are made for that alone. ``auto``:
    on with ``size: 1``, if ranks wait inside a stage."""
    wgrad_deferral_limit: int = 0
    """The most microbatches whose head gradients are deferred at the same time. 0: no limit; ``size`` if ``auto`` has turned it on."""
    evaluation: Literal["replicate", "last_stage"] = "replicate"
    """A validation inside fit. ``replicate`` sends the last hidden states to all ranks, each of which computes the loss. With
    ``last_stage`` only the last stage computes the loss, and sends the others its logs, its metrics and the numbers that it returns.
    That sends less, and no rank needs another's weights; but what ``validation_step`` collects on ``self`` exists on the last stage
    only."""

    def __post_init__(self) -> None:
        unset = {"microbatches": "auto", "microbatch_group": None}
        for name in ("size", "virtual_stages", "microbatches", "microbatch_group", "p2p_prefetch"):
            if name not in unset or getattr(self, name) != unset[name]:
                check_count(f"pipeline_parallel.{name}", getattr(self, name))
        if type(self.wgrad_deferral_limit) is not int or self.wgrad_deferral_limit < 0:
            raise ConfigError(
                "pipeline_parallel.wgrad_deferral_limit must be a number of microbatches, or 0 for no limit, "
                f"got {self.wgrad_deferral_limit!r}"
            )
        if self.wgrad_deferral_limit and self.defer_embedding_wgrad is False:
            raise ConfigError("pipeline_parallel.wgrad_deferral_limit has no effect with defer_embedding_wgrad: false: remove one")
        if self.microbatch_group is not None and self.microbatch_group < self.size:
            raise ConfigError(
                f"pipeline_parallel.microbatch_group={self.microbatch_group} must be at least size={self.size}: with fewer, a rank "
                f"waits for microbatches to pass the other ranks. Set {self.size} or more, or remove it"
            )
        for name in ("overlap_p2p", "defer_embedding_wgrad", "lanes"):
            check_switch(f"pipeline_parallel.{name}", getattr(self, name))
        check_word("pipeline_parallel.evaluation", self.evaluation, tuple(EVALUATION))
        check_word("pipeline_parallel.microbatch_weight", self.microbatch_weight, WEIGHTS)
        if odd := [dim for dim in self.batch_dims.values() if not (dim is None or (isinstance(dim, int) and dim >= 0))]:
            raise ConfigError(f"pipeline_parallel.batch_dims: each value must be a dim of 0 or more, or null, got {odd[0]!r}")
        if self.layout is not None and self.layers_per_stage is not None:
            raise ConfigError("pipeline_parallel has both layout and layers_per_stage: set only one")
        if (self.size > 1 or self.microbatches != "auto") and self.stages * self.count <= MOST:  # larger ones when the fit starts
            self.plan(self.count)  # refuses a schedule that cannot be built

    @property
    def runs(self) -> bool:
        """Whether the mode is on. Microbatches in one process are the reference of a pipeline."""
        return self.size > 1 or self.count > 1

    @property
    def count(self) -> int:
        """The number of microbatches of a batch with at least as many samples."""
        if self.microbatches == "auto":
            return 4 * self.size if self.size > 1 else 1
        return self.microbatches

    @property
    def schedule_name(self) -> str:
        """The schedule's name, or its file's."""
        if self.schedule == "auto":
            if self.virtual_stages > 1:
                return "interleaved" if self.size > 1 else "gpipe"
            return "1f1b" if self.overlap_p2p is False else "eager_1f1b"
        return self.schedule

    @property
    def deferral_limit(self) -> int:
        """The most microbatches whose head gradients may be deferred at the same time; 0: no limit."""
        return self.wgrad_deferral_limit or (self.size if self.defer_embedding_wgrad == "auto" else 0)

    @property
    def stages(self) -> int:
        """The number of stages of all ranks."""
        return self.size * self.virtual_stages

    def plan(self, microbatches: int) -> Schedule:
        """The schedule for a number of microbatches.

        Raises:
            ConfigError: there is no such schedule.
        """
        if self.schedule_name in SCHEDULES:
            return build(self.schedule_name, self.size, self.virtual_stages, microbatches, group=self.microbatch_group)
        path = Path(self.schedule_name)
        if not path.is_file():
            raise ConfigError(
                f"pipeline_parallel.schedule={self.schedule!r} is neither one of {', '.join(SCHEDULES)} nor a file with a schedule"
            )
        schedule = parse(path.read_text())
        validate(schedule)
        if (schedule.ranks, schedule.stages) != (self.size, self.stages):
            raise ConfigError(
                f"the schedule in {path} is for {schedule.ranks} ranks and {schedule.stages} stages, but pipeline_parallel has "
                f"{self.size} and {self.stages}: change size and virtual_stages, or the file"
            )
        if schedule.microbatches != microbatches:
            raise ConfigError(
                f"the schedule in {path} is for {schedule.microbatches} microbatches, but there are {microbatches}: set "
                f"microbatches: {schedule.microbatches}, with batches of at least as many samples (drop_last=True)"
            )
        return schedule


@dataclass(frozen=True)
class PipelineFacts:
    """What the stages of a pipeline hold.

    Attributes:
        name: of the list of blocks.
        blocks: by stage, the number of blocks.
        work: by stage, the number of matrix elements that a token is multiplied by.
        head_work: the same of the linear layers after the blocks, whose weights' gradients can be deferred.
        split: the fraction of the blocks' trained elements whose gradients a split backward can defer.
        unsplit: class names of modules with matrices whose gradients it cannot defer.
    """

    name: str
    blocks: tuple[int, ...]
    work: tuple[int, ...]
    head_work: int
    split: float = 0.0
    unsplit: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PipelineChoices(Choices):
    """What was decided for pipeline parallelism; for its settings see :class:`PipelineParallel`.

    Attributes:
        schedule: its name, or its file's.
        microbatches: the number of microbatches of a batch with at least as many samples.
        overlap_p2p: receives are posted early, and no rank waits for a send.
        split_backward: gradients of weights are computed separately from those of inputs; None if the schedule does not do that.
        defer_embedding_wgrad: the gradients of the head's weights are computed while its rank would wait.
        lanes: forwards and backwards of different microbatches run beside each other.
        evaluation: how a validation inside fit computes the loss.
        work: as in :class:`PipelineFacts`; empty if the model is not known.
        head_work: as in :class:`PipelineFacts`; 0 if the model is not known.
    """

    schedule: Choice[str]
    microbatches: Choice[int]
    overlap_p2p: Choice[bool]
    split_backward: Choice[bool] | None
    defer_embedding_wgrad: Choice[bool]
    lanes: Choice[bool]
    evaluation: Choice[str]
    work: tuple[int, ...]
    head_work: int


def decide(config: PipelineParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> PipelineChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if not config.runs:
        return None
    schedule = config.plan(config.count)
    _refuse_what_cannot_run(config, facts, splits_sharded_layers=degrees.tensor > 1 and schedule.splits_backward)
    timing = simulate(schedule)
    activations = ", ".join(map(str, timing.peak))
    model = facts.of(PipelineFacts)
    blocks = "" if model is None else f"; blocks by stage: {', '.join(map(str, model.blocks))} ({model.name or 'the model'})"
    per_rank = "one per rank" if config.virtual_stages == 1 else f"{config.virtual_stages} per rank"
    return PipelineChoices(
        size=Choice(config.size, config.size, f"{config.stages} stages, {per_rank}{blocks}"),
        schedule=Choice(
            config.schedule_name,
            config.schedule,
            f"estimated bubble {timing.bubble:.0%} ({config.count} microbatches, transfers fully hidden); "
            f"peak activations by rank, in microbatches: {activations}",
        ),
        microbatches=Choice(config.count, config.microbatches, "a batch is split along its dim of samples"),
        overlap_p2p=settle(
            "pipeline_parallel.overlap_p2p",
            config.overlap_p2p,
            best=True,
            otherwise=False,
            because=f"{config.p2p_prefetch} receives are posted early in each direction, and no rank waits for a send",
            blockers=[(config.size == 1, "one rank sends nothing")],
            overlap=overlap,
        ),
        split_backward=_split(model) if schedule.splits_backward else None,
        defer_embedding_wgrad=_deferral(config, degrees, model, schedule, overlap=overlap),
        lanes=_lanes(config, degrees, facts, schedule, overlap=overlap),
        evaluation=Choice(config.evaluation, config.evaluation, EVALUATION[config.evaluation]),
        work=() if model is None else model.work,
        head_work=0 if model is None else model.head_work,
    )


def build_schedule(config: PipelineParallel, choices: PipelineChoices, microbatches: int) -> Schedule:
    """The schedule that the mode runs for a number of microbatches."""
    schedule = config.plan(microbatches)
    if choices.defer_embedding_wgrad.value:
        schedule = _deferred(config, choices.work, choices.head_work, schedule)
    return pair(schedule) if choices.lanes.value and not schedule.paired else schedule


def _deferred(config: PipelineParallel, work: tuple[int, ...], head_work: int, schedule: Schedule) -> Schedule:
    """Defers the head's gradients. A token's estimated cost is the number of elements it is multiplied by; in backward twice that.

    A schedule that splits backward is returned as it is: it computes the head's gradients in its ``W`` actions.
    """
    if schedule.splits_backward:
        return schedule
    return defer(schedule, work, [2 * each for each in work], head_work, config.deferral_limit)


def _split(model: PipelineFacts | None) -> Choice[bool]:
    """Describes which gradients a schedule that splits backward can defer."""
    if model is None:
        return Choice(True, None, "in linear layers; the model is not known yet")
    rest = f"; not in {', '.join(model.unsplit)}" if model.unsplit else ""
    return Choice(True, None, f"in linear layers: {model.split:.0%} of the blocks' trained parameters{rest}")


def _deferral(
    config: PipelineParallel, degrees: Degrees, model: PipelineFacts | None, schedule: Schedule, *, overlap: bool
) -> Choice[bool]:
    requested = config.defer_embedding_wgrad
    is_wanted = overlap and requested is not False
    if config.size > 1 and model is None and is_wanted:
        return Choice(False, requested, "the model is not known yet")
    has_head = config.size > 1 and model is not None and model.head_work > 0
    gain = _gain(config, model, schedule) if model is not None and has_head and is_wanted else 0.0
    limit = "" if schedule.splits_backward else f", for at most {config.deferral_limit or config.count} microbatches"
    return settle(
        "pipeline_parallel.defer_embedding_wgrad",
        requested,
        best=True,
        otherwise=False,
        because=f"the head's weight gradients are computed while its rank would wait{limit}: estimated gain {gain:.1%} of a step",
        blockers=[
            (config.size == 1, "one rank waits for no other"),
            (degrees.tensor > 1, "tensor_parallel computes the layers' gradients in its own order"),
            (config.size > 1 and not has_head, "there is no trained nn.Linear after the blocks"),
            (
                schedule.splits_backward and config.wgrad_deferral_limit > 0,
                f"the schedule {config.schedule_name} splits backward, and orders weights' gradients itself: remove "
                "wgrad_deferral_limit",
            ),
            (requested == "auto" and has_head and config.schedule_name not in SCHEDULES, "a schedule from a file is not changed"),
            (
                requested == "auto" and has_head and gain < LEAST_GAIN,
                f"estimated gain is only {gain:.1%} of a step (threshold {LEAST_GAIN:.0%})",
            ),
        ],
        overlap=overlap,
    )


def _lanes(config: PipelineParallel, degrees: Degrees, facts: Facts, schedule: Schedule, *, overlap: bool) -> Choice[bool]:
    waits = [f"{name}_parallel" for name in ("tensor", "context", "expert") if getattr(degrees, name) > 1]
    paired = pair(schedule) if waits and config.count > 1 and not schedule.paired else schedule
    simulation, count = simulate(paired), len(paired.paired)
    longer = simulation.seconds / simulate(schedule).seconds - 1
    because = (
        f"{count} of {schedule.stages * schedule.microbatches} forwards run beside another microbatch's backward: what "
        f"{' and '.join(waits)} would wait for travels meanwhile; peak activations by rank: {', '.join(map(str, simulation.peak))}"
    )
    return settle(
        "pipeline_parallel.lanes",
        config.lanes,
        best=True,
        otherwise=False,
        because=because,
        blockers=[
            (config.count == 1, "there is one microbatch: set microbatches, 4 for example"),
            (
                config.count > 1 and waits != [] and count == 0,
                f"schedule {config.schedule_name} has no forward beside a backward",
            ),
            (not waits, "there is nothing to hide: no rank waits inside a stage"),
            (facts.device != "cpu", "on CUDA two lanes would share one stream, and hide nothing"),
            (config.size > 1 and config.overlap_p2p is False, "overlap_p2p: false sends between two actions, and not in a pair"),
            (
                config.lanes == "auto" and config.size > 1 and count > 0,
                f"pairs start later, which makes the pipeline {longer:.0%} longer where nothing waits: set lanes: true and measure",
            ),
        ],
        overlap=overlap,
    )


def _gain(config: PipelineParallel, model: PipelineFacts, schedule: Schedule) -> float:
    """The estimated gain of deferring the head's gradients, as a part of a step."""
    forward, head = model.work, model.head_work
    backward = [2 * work for work in forward]
    at_once, later = ([*forward[:-1], forward[-1] - head], forward) if schedule.splits_backward else (forward, [*forward[:-1], head])
    before = simulate(schedule, forward=forward, backward=backward, weight=at_once).seconds
    after = simulate(_deferred(config, forward, head, schedule), forward=forward, backward=backward, weight=later).seconds
    return 1 - after / before


def _refuse_what_cannot_run(config: PipelineParallel, facts: Facts, *, splits_sharded_layers: bool) -> None:
    """Refuses what a pipeline does not support.

    Args:
        config: the mode's.
        facts: about the run.
        splits_sharded_layers: whether the schedule splits backward and tensor parallelism shards layers.

    Raises:
        ConfigError: there is a reason; with every reason.
    """
    optimizers = facts.optimizers or ()
    coupled = [o.name for o in optimizers if not o.independent and o.known]
    unknown = [o.reason for o in optimizers if not o.known]
    refuse(
        f"pipeline_parallel.size={config.size}",
        [
            (
                not facts.automatic_optimization,
                "manual optimization runs backward inside training_step: use automatic optimization",
            ),
            (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which this version does not support: use bf16-mixed"),
            (facts.compiled, "torch.compile is not tested with pipeline stages: train without it"),
            (
                bool(facts.unfreezers),
                f"{', '.join(facts.unfreezers)} adds parameters to the optimizer during the fit: freeze in configure_model",
            ),
            (
                bool(facts.averagers),
                f"{', '.join(facts.averagers)} averages all weights, but a rank has only its stages': save checkpoints and average "
                "those",
            ),
            (
                splits_sharded_layers,
                f"the schedule {config.schedule_name} splits backward, but tensor_parallel computes gradients in its own order: use "
                "interleaved or 1f1b",
            ),
            (bool(coupled), f"{', '.join(coupled)} needs all parameters, but a rank has only its stages'"),
            (
                bool(facts.clippers),
                f"{', '.join(facts.clippers)} clips by the norm of this rank's gradients only, which are its stages': use "
                "gradient_clip_val, or call self.clip_gradients(...) in configure_gradient_clipping",
            ),
            (bool(unknown), f"{'; '.join(unknown)}. A rank has only its stages' parameters: use an optimizer such as AdamW"),
        ],
    )


def schedule_of(config: PipelineParallel, choices: PipelineChoices | None) -> Schedule:
    """See :class:`lightning_overlap.modes.descriptor.Scheduled`."""
    return config.plan(config.count) if choices is None else build_schedule(config, choices, config.count)


def environment(config: PipelineParallel, capability: int | None) -> list[Setting]:
    """See :class:`lightning_overlap.modes.descriptor.Environment`."""
    if config.size == 1:
        return []
    why = "pipeline_parallel: receives that are posted early get their own hardware queue and do not block later kernels"
    return [Setting("CUDA_DEVICE_MAX_CONNECTIONS", "32", why)]


def alternatives(config: PipelineParallel, degrees: Degrees, facts: Facts, room: Room) -> Iterator[PipelineParallel]:
    """See :class:`lightning_overlap.modes.descriptor.Alternatives`."""
    for size in larger_sizes(config.size, degrees.data):
        yield replace(config, size=size)
    waits = degrees.tensor * degrees.context * degrees.expert > 1
    if config.size > 1 or waits:
        most = MOST if room.samples is None else room.samples
        counts = (config.count // 2, config.count * 2) if config.count > 1 else (2, 4)
        for count in counts:
            if config.size <= count <= most and config.microbatches == "auto":
                yield replace(config, microbatches=count)
    model = facts.of(PipelineFacts)
    if config.size == 1 or model is None:
        return
    if 2 * config.stages <= sum(model.blocks):
        yield replace(config, virtual_stages=2 * config.virtual_stages)
    if config.schedule == "auto":
        yield replace(config, schedule="zb_h1" if config.virtual_stages == 1 else "interleaved_zb")
    if waits and config.lanes == "auto":
        yield replace(config, lanes=True)
