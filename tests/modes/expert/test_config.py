"""Decisions of expert parallelism: what is on, off or refused, and why."""

from typing import Any

import pytest

from lightning_overlap import ConfigError, ExpertParallel
from lightning_overlap.facts import Facts
from lightning_overlap.modes.expert.config import ExpertChoices, ExpertFacts, decide
from lightning_overlap.ranks.degrees import Degrees


def choose(facts: ExpertFacts | None = None, *, overlap: bool = True, **settings: Any) -> ExpertChoices:
    size = settings.pop("size", 2)
    about = Facts(world_size=size, of_modes=() if facts is None else (facts,))
    choices = decide(ExpertParallel(size=size, **settings), Degrees(data=size, expert=size), about, overlap=overlap)
    assert choices is not None
    return choices


def test_everything_is_on_where_nothing_prevents_it() -> None:
    choices = choose(ExpertFacts("4 layers of 8 experts", 8, ""))
    assert choices.size.why == "4 layers of 8 experts"
    assert (choices.overlap_dispatch.value, choices.overlap_shared_experts.value) == (True, True)
    assert (choices.split.value, choices.parts.value) == ("experts+local", 4)


def test_weight_gradients_wait_where_nothing_else_hides_the_last_transfers() -> None:
    eight = ExpertFacts("", 8, "")
    assert choose(eight, split="experts").delay_wgrad.value
    assert not choose(eight).delay_wgrad.value
    assert choose(eight, delay_wgrad=True).delay_wgrad.value
    assert not choose(eight, split="experts", overlap=False).delay_wgrad.value


def test_few_experts_are_split_by_tokens_unless_asked() -> None:
    few = ExpertFacts("", 3, "")
    assert (choose(few).split.value, choose(few).split.why) == ("tokens", "a part is some tokens of each expert")
    assert (choose(few, split="experts", parts=1).split.value, choose(few, parts=3).parts.value) == ("experts", 3)
    assert (choose().split.value, choose().parts.value) == ("auto", "auto"), "the model is not known"


def test_gathered_tokens_are_split() -> None:
    assert choose(ExpertFacts("", 8, ""), dispatcher="allgather").split.value == "tokens"


def test_overlap_off_keeps_the_layout() -> None:
    model = ExpertFacts("", 8, "")
    choices = choose(model, overlap=False)
    assert (choices.overlap_dispatch.value, choices.overlap_shared_experts.value, choices.delay_wgrad.value) == (False, False, False)
    assert (choices.parts.value, choices.split.value, choices.size.value) == (4, "experts+local", 2), "so that all bits are equal"
    assert (choose(model, overlap_dispatch=False).parts.value, choose(model, overlap_dispatch=False, parts=4).parts.value) == (1, 4)


def test_shared_experts_tell_why_they_wait() -> None:
    without = ExpertFacts("", 8, "the model has no shared experts")
    assert choose(without).overlap_shared_experts.why == "the model has no shared experts"
    with pytest.raises(ConfigError, match="overlap_shared_experts: true cannot run here: the model has no shared experts"):
        choose(without, overlap_shared_experts=True)
    choices = decide(ExpertParallel(size=2), Degrees(tensor=2, expert=2), Facts(world_size=2), overlap=True)
    assert choices is not None
    assert not choices.overlap_shared_experts.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "expert_parallel.size must be an integer of at least 1"),
        ({"size": True}, "expert_parallel.size must be an integer"),
        ({"dispatcher": "ring"}, "expert_parallel.dispatcher must be alltoall, allgather or flex, got 'ring'"),
        ({"dispatcher": "allgather", "split": "experts"}, "split: experts cannot be used with dispatcher: allgather"),
        ({"dispatcher": "flex", "split": "experts+local"}, r"split: experts\+local cannot be used with dispatcher: flex"),
        ({"split": "layers"}, "expert_parallel.split must be auto, experts, experts\\+local or tokens"),
        ({"parts": 1.5}, "expert_parallel.parts must be an integer"),
        ({"delay_wgrad": 1}, "expert_parallel.delay_wgrad must be true, false or auto"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertParallel(**settings)


@pytest.mark.parametrize("settings", [{"dispatcher": "allgather"}, {"parts": 2}, {"split": "tokens"}, {"overlap_dispatch": True}])
def test_a_setting_of_one_rank_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"expert_parallel.{next(iter(settings))}: .* needs expert_parallel.size of at least 2"):
        decide(ExpertParallel(**settings), Degrees(), Facts(world_size=1), overlap=True)
