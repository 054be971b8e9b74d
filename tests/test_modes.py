"""A mode costs a folder and one line: one from outside of the package takes part in everything, and nobody else names a mode."""

import ast
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

import lightning_overlap
from lightning_overlap import (
    ConfigError,
    ContextParallel,
    DataParallel,
    ExpertParallel,
    OverlapConfig,
    OverlapProfiler,
    OverlapStrategy,
    PipelineParallel,
    TensorParallel,
    verify,
)
from lightning_overlap.bench.advice import advise
from lightning_overlap.bench.measure import measure
from lightning_overlap.bench.rows import Row
from lightning_overlap.decision import Choice, Choices, Setting, check_count, settle
from lightning_overlap.environment import settings_for
from lightning_overlap.facts import Facts
from lightning_overlap.modes import MODES
from lightning_overlap.modes.base import Nesting, OverlapMode, Setup
from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.plan import resolve
from tests.helpers.training import Net

# -- a mode from outside of the package: counts the ranks of the world after each backward, under the next forward -----------------


@dataclass(frozen=True, kw_only=True)
class Toy:
    size: int = 1
    overlap: bool | Literal["auto"] = "auto"
    checked: bool = True

    def __post_init__(self) -> None:
        check_count("toy.size", self.size)


@dataclass(frozen=True)
class ToyFacts:
    layers: int


@dataclass(frozen=True, kw_only=True)
class ToyChoices(Choices):
    overlap: Choice[bool]


def decide(config: Toy, degrees: Any, facts: Facts, *, overlap: bool) -> ToyChoices | None:
    if config.size == 1:
        return None
    model = facts.of(ToyFacts)
    return ToyChoices(
        size=Choice(config.size, config.size, "" if model is None else f"{model.layers} layers are watched"),
        overlap=settle("toy.overlap", config.overlap, best=True, otherwise=False, because="under the next forward", overlap=overlap),
    )


class ToyMode(OverlapMode):
    name = "toy"
    nesting = Nesting.PARAMETERS
    remark = "toys are late when children are"
    choices: ToyChoices

    def __init__(self, config: Toy, choices: ToyChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self.group = self.mesh.group("world", self.timeout, "toy")
        self.pending: Any = None
        self.counts: list[float] = []

    @property
    def groups(self) -> Any:
        return (self.group,)

    def finish_backward(self) -> None:
        self.pending = self.group.all_reduce(torch.ones(1000), label="toy.count")
        if not self.choices.overlap.value:
            self.sync_parameters()

    def start_forward(self) -> None:
        self.sync_parameters()

    def sync_parameters(self) -> None:
        if self.pending is not None:
            self.counts.append(float(self.pending.wait()[0]))
            self.pending = None

    def release(self, *, complete: bool = True) -> None:
        if complete:
            self.sync_parameters()


TOY = ModeDescriptor(
    name="toy",
    section="toy",
    decide=decide,
    mode_type=ToyMode,
    look=lambda model, config, roles: ToyFacts(len(list(model.modules()))) if config.size > 1 else None,
    environment=lambda config, capability: [Setting("TOYS", "1", "toy: toys are wanted")] if config.size > 1 else [],
    advice={"count": "count less"},
    unchecked={"checked": False},
)


@dataclass(frozen=True, kw_only=True)
class ConfigWithToy(OverlapConfig):
    modes = (*MODES, TOY)
    toy: Toy = field(default_factory=Toy)


class StrategyWithToy(OverlapStrategy):
    def __init__(self, toy: int = 1, **given: Any) -> None:
        super().__init__(**given)
        config = {each.name: getattr(self.config, each.name) for each in fields(self.config)}
        self.config = ConfigWithToy(**config, toy=Toy(size=toy))


def made(toy: int = 2) -> tuple[StrategyWithToy, dict[str, Any]]:
    warnings.simplefilter("ignore")
    ranks = dist.get_world_size()
    strategy = StrategyWithToy(toy, data_parallel=DataParallel(bucket_size=500), cluster_environment=TorchElasticEnvironment())
    strategy.parallel_devices = [torch.device("cpu")] * ranks
    return strategy, {"accelerator": "cpu", "devices": ranks, "plugins": [TorchElasticEnvironment()]}


def trained(toy: int) -> tuple[list[float], list[float], str, str]:
    strategy, trainer = made(toy)
    seed_everything(5, verbose=False)
    model, profiler = Net(), OverlapProfiler(every_n_steps=1, warmup=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(**{**trainer, **quiet, "plugins": None}, strategy=strategy, max_steps=4, limit_val_batches=0, callbacks=[profiler])
    run.fit(model)
    counts = [count for mode in strategy.modes if isinstance(mode, ToyMode) for count in mode.counts]
    return model.losses, counts, strategy.plan.explain(), ",".join(profiler.summary.names)


def test_it_trains(world: Any) -> None:
    for (losses, counts, plan, labels), (without, *_) in zip(world(2).run(trained, 2), world(2).run(trained, 1), strict=True):
        assert losses == without
        assert counts == [2.0] * 4, "waited for under the next forward, and at the end"
        assert "data 2 x toy 2" in plan
        assert re.search(r"\n  overlap +auto +on +under the next forward", plan)
        assert "layers are watched" in plan
        if labels:  # on the first rank
            assert "toy" in labels.split(",")


def measured_and_verified() -> tuple[list[str], str, list[str]]:
    strategy, trainer = made()
    model = Net()
    del model.unused
    figures = measure(model, None, strategy, trainer, steps=2, warmup=1, repeats=1, with_peers=True)
    verdicts = verify(model, None, strategy, trainer, steps=3)
    return sorted(figures.modes), figures.table(), list(map(str, verdicts))


def test_it_is_measured_and_verified(world: Any) -> None:
    for modes, table, verdicts in world(2).run(measured_and_verified):
        assert modes == ["data", "toy"]
        assert "toy" in table
        assert len(verdicts) == 1
        assert "bit by bit: equal" in verdicts[0]


def test_it_is_in_the_plan_the_environment_and_the_advice() -> None:
    config = ConfigWithToy(toy=Toy(size=2))
    assert "toy" in resolve(config, Facts(world_size=2)).choices
    assert "off, with a size of 1: " in resolve(ConfigWithToy(), Facts(world_size=2)).explain()
    assert [setting.variable for setting in settings_for(config, None)] == ["TOYS"]
    assert settings_for(ConfigWithToy(toy=Toy(size=2), overlap="off"), None) == []
    rows = {
        name: Row(name, [seconds]) for name, seconds in {"overlapped": 1, "plain": 2, "compute": 0.9, "communication": 0.5}.items()
    }
    rows["overlapped"].exposed = [{"toy.count": 0.5}]
    assert "toy.count is exposed most, 500 of 1000 ms; try toy: count less" in advise(rows, config)


@pytest.mark.parametrize("kind", [ContextParallel, DataParallel, ExpertParallel, PipelineParallel, TensorParallel, Toy])
@pytest.mark.parametrize("size", [True, 2.0, "2", 0, -1, None])
def test_what_is_no_size_is_one_clear_error_in_every_mode(kind: Any, size: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\.size must be an integer of at least 1, got {re.escape(repr(size))}$"):
        kind(size=size)


@pytest.mark.parametrize("name", ["data", "tensor", "pipeline", "context", "expert"])
@pytest.mark.parametrize("size", [True, 2.0, "2"])
def test_the_strategy_gives_the_same_error(name: str, size: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}_parallel\.size must be an integer of at least 1, got {re.escape(repr(size))}$"):
        OverlapStrategy(**{f"{name}_parallel": size})


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DataParallel, "overlap_grad_reduce"), (TensorParallel, "overlap"), (PipelineParallel, "overlap_p2p")],
)
@pytest.mark.parametrize("value", [1, 0, 1.0, "on", None])
def test_what_is_no_switch_is_an_error(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be true, false or auto, got {re.escape(repr(value))}$"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DataParallel, "check_for_nan_in_grad"),
        (TensorParallel, "keep_gathered_input"),
        (ContextParallel, "verify_blocks"),
        (ExpertParallel, "log_expert_load"),
    ],
)
@pytest.mark.parametrize("value", [1, "false", "auto", None])
def test_what_is_no_flag_is_an_error(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"_parallel\.{name} must be true or false, got {re.escape(repr(value))}$"):
        kind(**{name: value})


def test_an_unknown_feature_is_an_error() -> None:
    choices: Any = resolve(OverlapConfig(), Facts(world_size=2)).choices
    with pytest.raises(AttributeError):
        _ = choices["data"].overlap_grad_reduction
    with pytest.raises(KeyError):
        _ = choices["tensors"]


# -- who names a mode --------------------------------------------------------------------------------------------------------------

NAMES = re.compile(r"\b(data|tensor|pipeline|context|expert)_parallel\b|\b(Data|Tensor|Pipeline|Context|Expert)(Parallel|Mode)\b")
KEYS = {"data", "tensor", "pipeline", "context", "expert"}
PUBLIC = {"__init__.py", "config.py", "modes/__init__.py", "strategy/strategy.py"}
"""The public surface: names that are exported, fields of the configuration, arguments of the strategy, the list of all modes."""
RANKS = {"ranks/mesh.py", "ranks/degrees.py"}
"""Groups and sizes have the names of what they are for."""
SETTINGS_IN_ERRORS = {
    "model/expert_layers.py",
    "model/sharded_tokens.py",
    "steps/microbatches.py",
    "strategy/batches.py",
    "strategy/evaluation.py",
    "strategy/first_step.py",
    "strategy/seams.py",
}
"""Their errors advise a setting, which has a mode's name. They read nothing of a mode."""


def named(file: Path, *, sentences: bool) -> set[str]:
    """What a file names modes by, outside of comments and docstrings: identifiers, whole strings and, if asked for, sentences."""
    tree = ast.parse(file.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        words = [getattr(node, name, None) for name in ("id", "attr", "arg", "name", "module")]
        found |= {word for word in words if isinstance(word, str) and (NAMES.search(word) or re.search(r"modes\.(\w+)\.", word))}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            sentence = " " in node.value
            if node.value in KEYS or ((sentences or not sentence) and NAMES.search(node.value)):
                found.add(node.value)
    return found


def test_no_mode_is_named_outside_of_its_folder_but_in_the_public_surface() -> None:
    root = Path(lightning_overlap.__file__).parent
    broken = {}
    for file in root.rglob("*.py"):
        path = str(file.relative_to(root))
        inside = re.match(r"modes/(\w+)/|bench/peers/(data|tensor|pipeline|context|expert)", path)
        if not inside and path not in PUBLIC | RANKS and (words := named(file, sentences=path not in SETTINGS_IN_ERRORS)):
            broken[path] = words
    assert not broken
