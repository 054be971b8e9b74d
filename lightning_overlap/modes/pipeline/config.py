"""Configuration and gates of pipeline parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
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
from lightning_overlap.facts import Facts
from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.steps.defer import defer
from lightning_overlap.steps.schedule import SCHEDULES, Schedule, build, parse, validate
from lightning_overlap.steps.simulate import simulate

ADVICE = {
    "bytes": "fewer virtual_stages, which send less",
    "tied": "a head of its own instead of a tied one",
    "norm": "clipping by value, which waits for no norm",
    "": "a larger p2p_prefetch, or more microbatches",
}
"""By kind of transfer, what may help where it is exposed."""
WEIGHTS = ("samples", "labels", "causal_labels", "sum")
"""What a microbatch counts for in the batch's loss."""
WORTH_IT = 0.01
"""The part of a step that deferring the head's gradients must win on paper: for less, nobody's memory is taken."""


EVALUATION = {
    "replicate": "the last hidden states go to all ranks, which all go on to the loss",
    "mirror": "the last stage goes on to the loss, and tells the others what it logs and returns",
}
"""What each does in a validation inside fit."""


@dataclass(frozen=True, kw_only=True)
class PipelineParallel:
    """Pipeline parallelism: ranks hold consecutive blocks, and a batch passes them in microbatches."""

    size: int = 1
    """Ranks along the axis."""
    virtual_stages: int = 1
    """Stages on a rank. More make the bubble smaller and send more."""
    microbatches: int | Literal["auto"] = "auto"
    """Parts of a batch; ``auto``: four for each rank. A batch with fewer samples has as many parts as samples."""
    batch_dims: dict[str, int | None] = field(default_factory=dict)
    """What in a batch is cut into microbatches, where that does not show in the shapes: by place (``mask``, or ``1.mask`` in a tuple)
    the dim of the samples; null: each microbatch has all of it. By default what has as many rows as the batch has samples is cut."""
    microbatch_weight: Literal["samples", "labels", "causal_labels", "sum"] = "samples"
    """What a microbatch's loss counts for. ``samples``: the loss is a mean over samples. ``labels``: it is a mean over the entries of
    the batch's ``labels`` that are not -100; ``causal_labels``: over those but the first of each sequence, as Hugging Face's causal
    models have it. ``sum``: it is a sum, or divided by something of the whole batch, and microbatches' losses add up. A method
    ``microbatch_weight(batch)`` of the module, which gives a number for a microbatch, goes before."""
    schedule: str = "auto"
    """``1f1b``, ``eager_1f1b`` (holds more activations, and hides transfers under them), ``interleaved``, ``gpipe``, ``zb_h1``,
    ``interleaved_zb``, ``zb_v``, ``dualpipev``, or a schedule's file; ``auto``: ``interleaved`` with virtual stages, else
    ``eager_1f1b``."""
    microbatch_group: int | None = None
    """Microbatches that an interleaved schedule runs of one stage before the next one on the rank; by default ``size``."""
    layers_per_stage: tuple[int, ...] | None = None
    """Blocks of each stage; by default stages have about the same number of parameters."""
    layout: str | None = None
    """Stages as a string, ``Et*3|(tt|)*5,tL`` say: E the embedding, t a block, L head and loss, | between stages."""
    held_by_all: tuple[str, ...] = ()
    """Modules and parameters, by name, that every stage holds: what is used before the blocks and after them, or beside them. Their
    gradients are summed over the stages, as those of a tied embedding are."""
    overlap_p2p: bool | Literal["auto"] = "auto"
    """Transfers between stages run beside compute: receives are posted ahead and nobody waits for a send."""
    p2p_prefetch: int = 2
    """Receives that are posted ahead, for each direction."""
    defer_embedding_wgrad: bool | Literal["auto"] = "auto"
    """The gradients of the head's weight, of linear layers after the blocks, are computed where the last stage's rank waits, and
    what it sends goes out sooner. Takes the memory of a microbatch's logits for each microbatch that is left."""
    wgrad_deferral_limit: int = 0
    """Microbatches of which the head's gradients are left at once. 0: any number; where ``auto`` has turned it on, ``size``."""
    evaluation: Literal["replicate", "mirror"] = "replicate"
    """A validation inside fit: ``replicate`` gives the last hidden states to all ranks, each of which goes on to the loss;
    ``mirror`` has the last stage alone go on, and tells the others what it logs, its metrics and the numbers that it returns. It
    sends less, and no rank holds the weights of another; what ``validation_step`` collects on ``self`` is then on the last
    stage only."""

    def __post_init__(self) -> None:
        unset = {"microbatches": "auto", "microbatch_group": None}
        for name in ("size", "virtual_stages", "microbatches", "microbatch_group", "p2p_prefetch"):
            if name not in unset or getattr(self, name) != unset[name]:
                check_count(f"pipeline_parallel.{name}", getattr(self, name))
        if type(self.wgrad_deferral_limit) is not int or self.wgrad_deferral_limit < 0:
            raise ConfigError(
                "pipeline_parallel.wgrad_deferral_limit must be a number of microbatches, or 0 for any, "
                f"got {self.wgrad_deferral_limit!r}"
            )
        if self.wgrad_deferral_limit and self.defer_embedding_wgrad is False:
            raise ConfigError("pipeline_parallel.wgrad_deferral_limit limits nothing with defer_embedding_wgrad: false: leave one out")
        if self.microbatch_group is not None and self.microbatch_group < self.size:
            raise ConfigError(
                f"pipeline_parallel.microbatch_group={self.microbatch_group} is below size={self.size}: a rank would wait for its own "
                f"microbatches to come round; set {self.size} or more, or leave it out"
            )
        for name in ("overlap_p2p", "defer_embedding_wgrad"):
            check_switch(f"pipeline_parallel.{name}", getattr(self, name))
        check_word("pipeline_parallel.evaluation", self.evaluation, tuple(EVALUATION))
        check_word("pipeline_parallel.microbatch_weight", self.microbatch_weight, WEIGHTS)
        if odd := [dim for dim in self.batch_dims.values() if not (dim is None or (isinstance(dim, int) and dim >= 0))]:
            raise ConfigError(f"pipeline_parallel.batch_dims has a dim of 0 or more, or null, for each place, got {odd[0]!r}")
        if self.layout is not None and self.layers_per_stage is not None:
            raise ConfigError("pipeline_parallel has both layout and layers_per_stage, which say the same: give one")
        if (self.size > 1 or self.microbatches != "auto") and self.stages * self.count <= MOST:  # a larger one when there is a world
            self.plan(self.count)  # a schedule that cannot be built is refused where it is asked for

    @property
    def runs(self) -> bool:
        """Whether there is anything to do; microbatches in one process are the reference for more."""
        return self.size > 1 or self.count > 1

    @property
    def count(self) -> int:
        """Microbatches of a batch that has at least as many samples."""
        if self.microbatches == "auto":
            return 4 * self.size if self.size > 1 else 1
        return self.microbatches

    @property
    def chosen(self) -> str:
        """The schedule's name, or its file's."""
        if self.schedule == "auto":
            if self.virtual_stages > 1:
                return "interleaved" if self.size > 1 else "gpipe"
            return "1f1b" if self.overlap_p2p is False else "eager_1f1b"
        return self.schedule

    @property
    def kept(self) -> int:
        """Microbatches of which the head's gradients may be left at once, where they are deferred; 0: any number."""
        return self.wgrad_deferral_limit or (self.size if self.defer_embedding_wgrad == "auto" else 0)

    @property
    def stages(self) -> int:
        """Of all ranks."""
        return self.size * self.virtual_stages

    def plan(self, microbatches: int) -> Schedule:
        """The schedule for so many microbatches.

        Raises:
            ConfigError: there is no such schedule.
        """
        if self.chosen in SCHEDULES:
            return build(self.chosen, self.size, self.virtual_stages, microbatches, group=self.microbatch_group)
        path = Path(self.chosen)
        if not path.is_file():
            raise ConfigError(
                f"pipeline_parallel.schedule={self.schedule!r} is neither one of {', '.join(SCHEDULES)} nor a file with a schedule"
            )
        made = parse(path.read_text())
        validate(made)
        if (made.ranks, made.stages) != (self.size, self.stages):
            raise ConfigError(
                f"the schedule in {path} is for {made.ranks} ranks and {made.stages} stages, and pipeline_parallel has "
                f"{self.size} and {self.stages}: change size and virtual_stages, or the file"
            )
        if made.microbatches != microbatches:
            raise ConfigError(
                f"the schedule in {path} is for {made.microbatches} microbatches, and there are {microbatches}: set "
                f"microbatches: {made.microbatches}, with batches of at least as many samples (drop_last=True)"
            )
        return made


@dataclass(frozen=True)
class PipelineFacts:
    """What the stages of a pipeline hold.

    Attributes:
        name: of the list of blocks.
        blocks: number of blocks, by stage.
        work: elements of the matrices that a token is multiplied by, by stage.
        head_work: those of the last stage's linear layers after the blocks, whose weights' gradients can come later.
        split: the fraction of the blocks' trained elements whose gradients a split backward leaves for later.
        unsplit: classes of the modules with matrices whose gradients it cannot leave.
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
        microbatches: of a batch that has at least as many samples.
        overlap_p2p: receives are posted ahead, and nobody waits for a send.
        split_backward: gradients of weights are computed apart from those of inputs; None where the schedule does not.
        defer_embedding_wgrad: the gradients of the head's weight are computed where its rank waits.
        evaluation: how a validation inside fit reaches the loss.
        work: as in :class:`PipelineFacts`; empty if the model is not known.
        head_work: as in :class:`PipelineFacts`; 0 if the model is not known.
    """

    schedule: Choice[str]
    microbatches: Choice[int]
    overlap_p2p: Choice[bool]
    split_backward: Choice[bool] | None
    defer_embedding_wgrad: Choice[bool]
    evaluation: Choice[str]
    work: tuple[int, ...]
    head_work: int


def decide(config: PipelineParallel, degrees: Degrees, facts: Facts, *, overlap: bool) -> PipelineChoices | None:
    """The home of this mode's gates; see :class:`lightning_overlap.modes.descriptor.Decide`."""
    if not config.runs:
        return None
    schedule = config.plan(config.count)
    _refuse_what_cannot_run(config, facts, cut=degrees.tensor > 1 and schedule.splits_backward)
    timing = simulate(schedule)
    activations = ", ".join(map(str, timing.peak))
    model = facts.of(PipelineFacts)
    blocks = "" if model is None else f"; blocks by stage: {', '.join(map(str, model.blocks))} ({model.name or 'the model'})"
    a_rank = "one a rank" if config.virtual_stages == 1 else f"{config.virtual_stages} a rank"
    return PipelineChoices(
        size=Choice(config.size, config.size, f"{config.stages} stages, {a_rank}{blocks}"),
        schedule=Choice(
            config.chosen,
            config.schedule,
            f"bubble {timing.bubble:.0%} with {config.count} microbatches if transfers are hidden; "
            f"activations of at most {activations} microbatches are held, by rank",
        ),
        microbatches=Choice(config.count, config.microbatches, "a batch is cut along its first dim"),
        overlap_p2p=settle(
            "pipeline_parallel.overlap_p2p",
            config.overlap_p2p,
            best=True,
            otherwise=False,
            because=f"{config.p2p_prefetch} receives are posted ahead in each direction, and nobody waits for a send",
            blockers=[(config.size == 1, "there is one rank, which sends nothing")],
            overlap=overlap,
        ),
        split_backward=_split(model) if schedule.splits_backward else None,
        defer_embedding_wgrad=_deferral(config, degrees, model, schedule, overlap=overlap),
        evaluation=Choice(config.evaluation, config.evaluation, EVALUATION[config.evaluation]),
        work=() if model is None else model.work,
        head_work=0 if model is None else model.head_work,
    )


def scheduled(config: PipelineParallel, choices: PipelineChoices, microbatches: int) -> Schedule:
    """The schedule that is run, of so many microbatches."""
    schedule = config.plan(microbatches)
    if not choices.defer_embedding_wgrad.value:
        return schedule
    return _deferred(config, choices.work, choices.head_work, schedule)


def _deferred(config: PipelineParallel, work: tuple[int, ...], head_work: int, schedule: Schedule) -> Schedule:
    """On paper a token costs what it is multiplied by, and backward twice that. Where backward is split the head's are in its W."""
    if schedule.splits_backward:
        return schedule
    return defer(schedule, work, [2 * each for each in work], head_work, config.kept)


def _split(model: PipelineFacts | None) -> Choice[bool]:
    """What a schedule that splits backward finds to split."""
    if model is None:
        return Choice(True, None, "in linear layers; the model is not known yet")
    rest = f"; not in {', '.join(model.unsplit)}" if model.unsplit else ""
    return Choice(True, None, f"in linear layers, which have {model.split:.0%} of the parameters that the blocks train{rest}")


def _deferral(
    config: PipelineParallel, degrees: Degrees, model: PipelineFacts | None, schedule: Schedule, *, overlap: bool
) -> Choice[bool]:
    asked = config.defer_embedding_wgrad
    wanted = overlap and asked is not False
    if config.size > 1 and model is None and wanted:
        return Choice(False, asked, "the model is not known yet")
    has_head = config.size > 1 and model is not None and model.head_work > 0
    gain = _gain(config, model, schedule) if model is not None and has_head and wanted else 0.0
    limit = "" if schedule.splits_backward else f", of at most {config.kept or config.count} microbatches at once"
    return settle(
        "pipeline_parallel.defer_embedding_wgrad",
        asked,
        best=True,
        otherwise=False,
        because=f"the gradients of the head's weight are computed where its rank waits{limit}: on paper {gain:.1%} of a step",
        blockers=[
            (config.size == 1, "there is one rank, which waits for nobody"),
            (degrees.tensor > 1, "tensor_parallel has the layers' gradients computed in an order of its own"),
            (config.size > 1 and not has_head, "no linear layer that is trained comes after the blocks (nn.Linear only)"),
            (
                schedule.splits_backward and config.wgrad_deferral_limit > 0,
                f"{config.chosen} splits backward and says itself where weights' gradients are computed: leave out "
                "wgrad_deferral_limit",
            ),
            (asked == "auto" and has_head and config.chosen not in SCHEDULES, "a schedule's file is run as it stands"),
            (asked == "auto" and has_head and gain < WORTH_IT, f"on paper it wins {gain:.1%} of a step"),
        ],
        overlap=overlap,
    )


def _gain(config: PipelineParallel, model: PipelineFacts, schedule: Schedule) -> float:
    """The part of a step that it wins on paper."""
    forward, head = model.work, model.head_work
    backward = [2 * work for work in forward]
    at_once, later = ([*forward[:-1], forward[-1] - head], forward) if schedule.splits_backward else (forward, [*forward[:-1], head])
    before = simulate(schedule, forward=forward, backward=backward, weight=at_once).seconds
    after = simulate(_deferred(config, forward, head, schedule), forward=forward, backward=backward, weight=later).seconds
    return 1 - after / before


def _refuse_what_cannot_run(config: PipelineParallel, facts: Facts, *, cut: bool) -> None:
    """Refuses, with every reason.

    Args:
        config: what was asked for.
        facts: about the run.
        cut: the schedule splits backward, and layers are cut.

    Raises:
        ConfigError: something is in the way.
    """
    optimizers = facts.optimizers or ()
    coupled = [o.name for o in optimizers if not o.independent and o.known]
    unknown = [o.reason for o in optimizers if not o.known]
    refuse(
        f"pipeline_parallel.size={config.size}",
        [
            (
                not facts.automatic_optimization,
                "manual optimization runs backward itself, in the middle of training_step: use automatic",
            ),
            (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which is not in this version: use bf16-mixed"),
            (facts.compiled, "torch.compile has not been tried with stages, which run blocks through stand-ins: train without it"),
            (bool(facts.unfreezers), f"{', '.join(facts.unfreezers)} gives the optimizer parameters later: freeze in configure_model"),
            (
                bool(facts.averagers),
                f"{', '.join(facts.averagers)} averages all weights, and a rank has its stages' only: save checkpoints and average "
                "those",
            ),
            (
                cut,
                f"{config.chosen} splits backward, and tensor_parallel computes gradients in an order of its own: use interleaved or "
                "1f1b",
            ),
            (bool(coupled), f"{', '.join(coupled)} looks at all parameters at once, and a rank has its stages' only"),
            (
                bool(facts.clippers),
                f"{', '.join(facts.clippers)} clips by a norm over the gradients that a rank has, its stages' only: use "
                "gradient_clip_val, or call self.clip_gradients(...) in configure_gradient_clipping",
            ),
            (bool(unknown), f"{'; '.join(unknown)}, and a rank has its stages' parameters only: use an optimizer such as AdamW"),
        ],
    )


def schedule_of(config: PipelineParallel, choices: PipelineChoices | None) -> Schedule:
    """See :class:`lightning_overlap.modes.descriptor.Scheduled`."""
    return config.plan(config.count) if choices is None else scheduled(config, choices, config.count)


def environment(config: PipelineParallel, capability: int | None) -> list[Setting]:
    """See :class:`lightning_overlap.modes.descriptor.Environment`."""
    if config.size == 1:
        return []
    why = "pipeline_parallel: a receive that is posted ahead has a queue to itself, where no kernel waits behind it"
    return [Setting("CUDA_DEVICE_MAX_CONNECTIONS", "32", why)]
