"""Configuration and gates of pipeline parallelism. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_overlap.decision import MOST, ConfigError, Decision, check_count, settle
from lightning_overlap.steps.defer import defer
from lightning_overlap.steps.schedule import SCHEDULES, Schedule, build, parse, validate
from lightning_overlap.steps.simulate import simulate

if TYPE_CHECKING:
    from lightning_overlap.config import OverlapConfig
    from lightning_overlap.facts import Facts, PipelineFacts
    from lightning_overlap.plan import Plan

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

    def advice(self, kind: str) -> str:
        """What may help where a kind of transfer is exposed: ``forward``, ``backward``, ``tied``; ``bytes``: the link is too slow."""
        known = {
            "bytes": "fewer virtual_stages, which send less",
            "tied": "a head of its own instead of a tied one",
            "norm": "clipping by value, which waits for no norm",
        }
        return f"pipeline_parallel: {known.get(kind, 'a larger p2p_prefetch, or more microbatches')}"

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
            if getattr(self, name) not in (True, False, "auto"):
                raise ConfigError(f"pipeline_parallel.{name} must be true, false or auto, got {getattr(self, name)!r}")
        if self.evaluation not in ("replicate", "mirror"):
            raise ConfigError(f"pipeline_parallel.evaluation must be replicate or mirror, got {self.evaluation!r}")
        if self.microbatch_weight not in WEIGHTS:
            raise ConfigError(f"pipeline_parallel.microbatch_weight must be {', '.join(WEIGHTS)}, got {self.microbatch_weight!r}")
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


def decide(own: PipelineParallel, whole: OverlapConfig, facts: Facts) -> list[Decision]:
    """The home of this mode's gates."""
    if not own.runs:
        return [Decision("pipeline_parallel", "1", "off", "its size is 1")]
    schedule = own.plan(own.count)
    _refuse_what_cannot_run(own, facts, cut=whole.tensor_parallel.size > 1 and schedule.splits_backward)
    free = simulate(schedule)
    held = ", ".join(str(n) for n in free.peak)
    found = facts.pipeline
    blocks = "" if found is None else f"; {found.name or 'blocks'} by stage: {', '.join(map(str, found.blocks))}"
    return [
        Decision("pipeline_parallel", str(own.size), str(own.size), f"{own.stages} stages, {own.virtual_stages} a rank{blocks}"),
        Decision(
            "pipeline_parallel.schedule",
            own.schedule,
            own.chosen,
            f"bubble {free.bubble:.0%} with {own.count} microbatches if transfers are hidden; {held} activations held by rank",
        ),
        Decision("pipeline_parallel.microbatches", str(own.microbatches), str(own.count), "of one batch, cut along its first dim"),
        settle(
            "pipeline_parallel.overlap_p2p",
            False if whole.overlap == "off" else own.overlap_p2p,
            best="beside compute",
            because=f"{own.p2p_prefetch} receives are posted ahead in each direction, sends are never waited for",
            blockers=[(own.size == 1, "there is one rank, which sends nothing")],
        ),
        *([_split(found)] if schedule.splits_backward else []),
        _deferral(own, whole, facts, schedule),
        Decision("pipeline_parallel.evaluation", own.evaluation, own.evaluation, EVALUATION[own.evaluation]),
    ]


def scheduled(own: PipelineParallel, plan: Plan, microbatches: int) -> Schedule:
    """The schedule that is run, of so many microbatches."""
    schedule = own.plan(microbatches)
    if plan.choice("pipeline_parallel.defer_embedding_wgrad") == "off":
        return schedule
    return _deferred(own, plan.facts, schedule)


def _deferred(own: PipelineParallel, facts: Facts, schedule: Schedule) -> Schedule:
    """On paper a token costs what it is multiplied by, and backward twice that. Where backward is split the head's are in its W."""
    if schedule.splits_backward:
        return schedule
    work, head = _work(facts)
    return defer(schedule, work, [2 * each for each in work], head, own.kept)


def _work(facts: Facts) -> tuple[tuple[int, ...], int]:
    """Of the stages and of the head; none, if the model is not known."""
    return ((), 0) if facts.pipeline is None else (facts.pipeline.work, facts.pipeline.head_work)


def _split(found: PipelineFacts | None) -> Decision:
    """What a schedule that splits backward finds to split."""
    feature = "pipeline_parallel.split_backward"
    if found is None:
        return Decision(feature, "", "linear layers", "the model is not known yet")
    rest = f"; at once, as before: {', '.join(found.unsplit)}" if found.unsplit else ""
    return Decision(feature, "", "linear layers", f"of {found.split:.0%} of what the blocks train the gradients come later{rest}")


def _deferral(own: PipelineParallel, whole: OverlapConfig, facts: Facts, schedule: Schedule) -> Decision:
    feature, asked = "pipeline_parallel.defer_embedding_wgrad", own.defer_embedding_wgrad
    quiet = whole.overlap == "off" or asked is False
    if own.size > 1 and facts.pipeline is None and not quiet:
        return Decision(feature, "on" if asked is True else "auto", "off", "the model is not known yet")
    found = own.size > 1 and _work(facts)[1] > 0
    gain = _gain(own, facts, schedule) if found and not quiet else 0.0
    of = "" if schedule.splits_backward else f", of at most {own.kept or own.count} microbatches at once"
    return settle(
        feature,
        False if quiet else asked,
        best="in the bubble",
        because=f"the gradients of the head's weight are computed where its rank waits{of}: on paper {gain:.1%} of a step",
        blockers=[
            (own.size == 1, "there is one rank, which waits for nobody"),
            (whole.tensor_parallel.size > 1, "tensor_parallel has the layers' gradients computed in an order of its own"),
            (own.size > 1 and not found, "no linear layer that is trained comes after the blocks: nn.Linear, and no other class"),
            (
                schedule.splits_backward and own.wgrad_deferral_limit > 0,
                f"{own.chosen} splits backward and says itself where weights' gradients are computed: leave out wgrad_deferral_limit",
            ),
            (asked == "auto" and found and own.chosen not in SCHEDULES, "the schedule is a file's, and run as it stands"),
            (asked == "auto" and found and gain < WORTH_IT, f"on paper it wins {gain:.1%} of a step"),
        ],
    )


def _gain(own: PipelineParallel, facts: Facts, schedule: Schedule) -> float:
    """The part of a step that it wins on paper."""
    forward, head = _work(facts)
    backward = [2 * work for work in forward]
    at_once, later = ([*forward[:-1], forward[-1] - head], forward) if schedule.splits_backward else (forward, [*forward[:-1], head])
    before = simulate(schedule, forward=forward, backward=backward, weight=at_once).seconds
    return 1 - simulate(_deferred(own, facts, schedule), forward=forward, backward=backward, weight=later).seconds / before


def _refuse_what_cannot_run(own: PipelineParallel, facts: Facts, *, cut: bool) -> None:
    """Refuses, with every reason.

    Args:
        own: what was asked for.
        facts: about the run.
        cut: the schedule splits backward, and layers are cut.

    Raises:
        ConfigError: something is in the way.
    """
    optimizers = facts.optimizers or ()
    coupled = [o.name for o in optimizers if not o.independent and o.known]
    unknown = [o.reason for o in optimizers if not o.known]
    reasons = [
        (not facts.automatic_optimization, "manual optimization runs backward itself, in the middle of training_step: use automatic"),
        (facts.precision == "16-mixed", "precision 16-mixed scales the loss, which is not in this version: use bf16-mixed"),
        (facts.compiled, "torch.compile has not been tried with stages, which run blocks through stand-ins: train without it"),
        (bool(facts.unfreezers), f"{', '.join(facts.unfreezers)} gives the optimizer parameters later: freeze in configure_model"),
        (
            bool(facts.averagers),
            f"{', '.join(facts.averagers)} averages all weights, and a rank has its stages' only: save checkpoints and average those",
        ),
        (cut, f"{own.chosen} splits backward, and tensor_parallel computes gradients in an order of its own: use interleaved or 1f1b"),
        (bool(coupled), f"{', '.join(coupled)} looks at all parameters at once, and a rank has its stages' only"),
        (
            bool(facts.clippers),
            f"{', '.join(facts.clippers)} clips by a norm over the gradients that a rank has, its stages' only: use "
            "gradient_clip_val, or call self.clip_gradients(...) in configure_gradient_clipping",
        ),
        (bool(unknown), f"{'; '.join(unknown)}, and a rank has its stages' parameters only: use an optimizer such as AdamW"),
    ]
    if said := [reason for applies, reason in reasons if applies]:
        raise ConfigError(f"pipeline_parallel.size={own.size} cannot run here: {'; '.join(said)}")
