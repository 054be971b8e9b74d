"""Layouts: the batch, what the user has set, and the search, with made-up figures in place of rehearsals."""

from dataclasses import dataclass, replace

import pytest

from lightning_overlap import (
    ConfigError,
    ContextParallel,
    DataParallel,
    ExpertParallel,
    OverlapConfig,
    PipelineParallel,
    TensorParallel,
)
from lightning_overlap.facts import Facts, Room
from lightning_overlap.modes.context import CONTEXT
from lightning_overlap.modes.expert import EXPERT
from lightning_overlap.modes.expert.config import ExpertFacts
from lightning_overlap.modes.pipeline import PIPELINE
from lightning_overlap.modes.pipeline.config import PipelineFacts
from lightning_overlap.modes.tensor import TENSOR
from lightning_overlap.plan import resolve
from lightning_overlap.ranks.degrees import Degrees, larger_sizes
from lightning_overlap.tune.layouts import Batch, Search, Space


def test_the_batch_of_all_ranks_stays():
    assert Batch(samples=4, ranks=8, accumulate=3).of(8) == (4, 3)
    assert Batch(samples=4, ranks=8, accumulate=3).of(2) == (16, 3)
    assert Batch(samples=4, ranks=2, accumulate=1).of(8) == (1, 1)
    assert Batch(samples=None, ranks=8, accumulate=3).of(2) == (None, 12)
    with pytest.raises(ConfigError, match="8 samples do not divide over 3 data ranks"):
        Batch(samples=4, ranks=2, accumulate=1).of(3)
    with pytest.raises(ConfigError, match="2 batches do not divide over 4 data ranks"):
        Batch(samples=None, ranks=2, accumulate=1).of(4)


def space(user=None, *, ranks=8, per_host=4, batch=None, model=()):
    def decide(config):
        return resolve(config, Facts(world_size=ranks, parameters=10_000_000, of_modes=model))

    return Space(user or OverlapConfig(), batch or Batch(4, ranks, 1), per_host, decide)


@dataclass
class Made:
    cost: tuple[float, ...]


def search(given, figures, *, budget=100, user=None):
    """Searches with figures that are computed from the degrees of parallelism, or are the reason why a layout cannot run."""
    tried = []

    def try_all(layouts):
        tried.extend(layout.name for layout in layouts)
        made = [figures(layout.config, layout.plan.degrees) for layout in layouts]
        return [each if isinstance(each, str) else Made((each,)) for each in made]

    made = Search(given, try_all)
    ranked = made.run([user or OverlapConfig(), given.data_only()], budget)
    return ranked, tried, made.refused


def test_the_search_follows_what_helps_and_keeps_to_its_budget():
    def seconds(config, degrees):
        if degrees.context > 1:
            return "there is no attention"
        return 10 - degrees.tensor - (3 if degrees.pipeline == 2 else 0) - (1 if config.overlap == "off" else 0)

    ranked, tried, refused = search(space(), seconds)
    assert ranked[0].layout.name.startswith("pipeline 2 x tensor 4, overlap off")
    assert len(tried) == len(set(tried)), "each layout is tried once"
    assert tried[0] == "data 8"
    assert refused["there is no attention"] > 1
    assert [each.figures.cost for each in ranked] == sorted(each.figures.cost for each in ranked)
    few, tried, refused = search(space(), seconds, budget=7)
    assert len(tried) == 7 == len(few) + sum(refused.values())


def test_sizes_come_first_and_what_is_not_tried_is_named():
    answers = iter([True, True, False])
    made = Search(space(), lambda layouts: [Made((1.0,)) for _ in layouts], has_time=lambda: next(answers))
    made.run([OverlapConfig()])
    assert [each.layout.name for each in made.candidates] == ["data 8", "pipeline 2 x data 4", "context 2 x data 4"]
    assert made.untried == ["tensor 2 x data 4"]

    def slower_with_tensor(layouts):
        return [Made((1.0 + layout.plan.degrees.tensor - layout.plan.degrees.pipeline,)) for layout in layouts]

    followed = Search(space(), slower_with_tensor)
    followed.run([OverlapConfig()], budget=6)
    names = [each.layout.name for each in followed.candidates]
    assert names[1:4] == ["pipeline 2 x data 4", "context 2 x data 4", "tensor 2 x data 4"]
    assert all(name.startswith("pipeline") for name in names[4:]), "the best one's neighbours, before the settings of the first one"
    finished = Search(space(), lambda layouts: ["there is no room" for _ in layouts])
    finished.run([OverlapConfig()])
    assert finished.untried == []


def test_what_the_user_has_set_stays():
    user = OverlapConfig(pipeline_parallel=PipelineParallel(size=2, schedule="1f1b"), data_parallel=DataParallel(bucket_size=1000))
    ranked, _, _ = search(space(user), lambda config, degrees: 1 / degrees.tensor, user=user)
    allowed = [each.layout for each in ranked if each.layout.is_allowed]
    assert max(layout.plan.degrees.tensor for layout in allowed) == 4
    assert all(layout.config.pipeline_parallel.size == 2 for layout in allowed)
    assert {layout.config.pipeline_parallel.schedule for layout in allowed} == {"1f1b"}
    assert {layout.config.data_parallel.bucket_size for layout in allowed} == {1000}
    assert len({layout.config.pipeline_parallel.microbatches for layout in allowed}) > 1, "the other settings do not"
    (reference,) = [each.layout for each in ranked if not each.layout.is_allowed]
    assert reference.name == "data 8"


def test_a_layout_has_the_batch_of_its_data_ranks():
    layout = space().layout(OverlapConfig(tensor_parallel=TensorParallel(size=4)))
    assert (layout.batch_size, layout.accumulate) == (16, 1)
    assert layout.name == "tensor 4 x data 2"
    with pytest.raises(ConfigError, match="tensor_parallel=3 needs a multiple of 3 ranks"):
        space().layout(OverlapConfig(tensor_parallel=TensorParallel(size=3)))


def alternatives(mode, settings, degrees, *, model=(), per_host=4, samples=32):
    facts = Facts(world_size=degrees.world, parameters=10_000_000, of_modes=model)
    return list(mode.alternatives(settings, degrees, facts, Room(per_host, samples)))


def test_modes_list_what_may_be_better():
    assert larger_sizes(2, 12) == [4, 6]
    assert larger_sizes(2, 1) == []
    # tensor ranks stay inside a host, if it has several
    sizes = [each.size for each in alternatives(TENSOR, TensorParallel(size=4), Degrees(tensor=4, data=6), per_host=8)]
    assert sizes == [8, 4], "8 fits a host, 12 does not; and the same size with another setting"
    sizes = [each.size for each in alternatives(TENSOR, TensorParallel(), Degrees(data=6), per_host=1)]
    assert sizes == [2, 3]
    # a pipeline has no more stages than blocks, and no more microbatches than samples
    settings = PipelineParallel(size=2)
    made = alternatives(PIPELINE, settings, Degrees(pipeline=2, data=2), model=(PipelineFacts("b", (3, 3), (1, 1), 0),), samples=8)
    assert made == [
        replace(settings, size=4),
        replace(settings, microbatches=4),
        replace(settings, virtual_stages=2),
        replace(settings, schedule="zb_h1"),
    ]
    # microbatches without a pipeline are for lanes
    assert [each.microbatches for each in alternatives(PIPELINE, PipelineParallel(), Degrees(tensor=2))] == [2, 4]
    assert alternatives(PIPELINE, PipelineParallel(), Degrees()) == []
    # experts are spread over ranks that others have, if there are experts
    made = alternatives(EXPERT, ExpertParallel(), Degrees(tensor=2, data=4), model=(ExpertFacts("", 4, ""),))
    assert [each.size for each in made] == [2]
    assert alternatives(EXPERT, ExpertParallel(), Degrees(data=4)) == []
    assert [
        mode.name for mode in OverlapConfig.modes if not alternatives(mode, type(OverlapConfig().of(mode))(), Degrees(data=4))
    ] == ["expert"], "every other mode has an alternative"
    methods = [each.method for each in alternatives(CONTEXT, ContextParallel(size=2), Degrees(context=2))]
    assert methods == ["p2p", "a2a", "all_gather"]
