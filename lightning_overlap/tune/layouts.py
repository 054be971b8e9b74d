"""Layouts: how ranks are divided among the modes, with which settings and batch, and the search for the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.facts import Room
from lightning_overlap.modes.descriptor import ModeDescriptor
from lightning_overlap.plan import Plan

LAYOUTS = 200
"""The most layouts that a search tries, however fast they are."""
SECONDS = 50.0
"""Seconds after which it tries no more: with the start of the processes, the command takes about a minute."""


@dataclass(frozen=True)
class Batch:
    """The batch of a step, which is the same under every layout: that of all ranks together, as configured.

    Where fewer ranks see different samples, each has a larger batch, or, if no ``batch_size`` is known, accumulates over more batches.

    Attributes:
        samples: a data rank's ``batch_size``, as configured; None if neither the data module nor the module has one.
        ranks: data ranks of the configured layout.
        accumulate: batches that a rank accumulates, as configured.
    """

    samples: int | None
    ranks: int
    accumulate: int

    def of(self, ranks: int) -> tuple[int | None, int]:
        """Returns a rank's ``batch_size`` (None: it stays), and the batches that it accumulates.

        Args:
            ranks: data ranks of the layout.

        Raises:
            ConfigError: the batch cannot be divided among them.
        """
        total, number = (self.accumulate * self.ranks, "batches") if self.samples is None else (self.samples * self.ranks, "samples")
        if total % ranks:
            raise ConfigError(f"{total} {number} do not divide over {ranks} data ranks")
        return (None, total // ranks) if self.samples is None else (total // ranks, self.accumulate)


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
        config: sizes and settings.
        plan: what was decided for it.
        batch_size: of a data rank; None: as configured.
        accumulate: batches that a rank accumulates.
        is_allowed: whether it keeps what the user has set.
    """

    config: OverlapConfig
    plan: Plan
    batch_size: int | None
    accumulate: int
    is_allowed: bool

    @property
    def name(self) -> str:
        """The sizes, then what differs from the defaults of the modes that run: ``pipeline 2 x data 4, virtual_stages 2``."""
        return ", ".join([self.sizes, *self.settings])

    @property
    def decisions(self) -> str:
        """All that was decided. Layouts with the same decisions train alike, whatever was asked for."""
        return repr([(name, choice.value) for name, choice in self.plan.features().items()])

    @property
    def sizes(self) -> str:
        """The sizes of the modes that run: ``pipeline 2 x data 4``."""
        return " x ".join(f"{mode.name} {self.plan.choices[mode.name].size.value}" for mode in self._running())

    @property
    def settings(self) -> list[str]:
        """What else differs from the defaults."""
        off = ["overlap off"] if self.config.overlap == "off" else []
        return off + [
            f"{name} {value}" for mode in self._running() for name, value in changes(self.config, mode).items() if name != "size"
        ]

    def _running(self) -> list[ModeDescriptor]:
        return [mode for mode in self.plan.modes if mode.name in self.plan.choices]


def changes(config: OverlapConfig, mode: ModeDescriptor) -> dict[str, Any]:
    """Returns the settings of a mode that differ from their defaults, by name."""
    settings = config.of(mode)
    defaults = type(settings)()
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}


class Space:
    """The layouts that are allowed: what the user has set to another value than its default stays as set.

    Args:
        user: the user's configuration.
        batch: of a step.
        ranks_per_host: ranks on each host.
        resolve: decides a configuration.
    """

    def __init__(self, user: OverlapConfig, batch: Batch, ranks_per_host: int, resolve: Callable[[OverlapConfig], Plan]) -> None:
        self._user, self._batch, self._ranks_per_host, self._resolve = user, batch, ranks_per_host, resolve

    def layout(self, config: OverlapConfig) -> Layout:
        """Returns the layout of a configuration.

        Raises:
            ConfigError: it is impossible.
        """
        plan = self._resolve(config)
        batch_size, accumulate = self._batch.of(plan.degrees.data)
        return Layout(config, plan, batch_size, accumulate, self._allows(config))

    def data_only(self) -> OverlapConfig:
        """Returns the defaults of all modes: data parallelism only. It is a reference, also where the user has set other sizes."""
        return replace(self._user, **{mode.section: type(self._user.of(mode))() for mode in self._user.modes})

    def neighbours(self, layout: Layout, *, in_size: bool) -> list[OverlapConfig]:
        """Returns configurations that differ from a layout's in a size by one factor (``in_size``), or in one other setting."""
        config, degrees, facts = layout.config, layout.plan.degrees, layout.plan.facts
        room = Room(self._ranks_per_host, layout.batch_size)
        changed = [
            replace(config, **{mode.section: settings})
            for mode in config.modes
            for settings in mode.alternatives(config.of(mode), degrees, facts, room)
            if (settings.size != config.of(mode).size) == in_size
        ]
        if config.overlap == "auto" and not in_size:
            changed.append(replace(config, overlap="off"))
        return [each for each in changed if self._allows(each)]

    def _allows(self, config: OverlapConfig) -> bool:
        return all(
            getattr(config.of(mode), name) == value for mode in config.modes for name, value in changes(self._user, mode).items()
        )


class Figures(Protocol):
    """What is known of a layout. The smallest :attr:`cost` is the best."""

    @property
    def cost(self) -> tuple[float, ...]: ...


F = TypeVar("F", bound=Figures)


@dataclass
class Candidate(Generic[F]):
    """A layout that was tried.

    Attributes:
        layout: the layout.
        figures: of it.
    """

    layout: Layout
    figures: F


class Search(Generic[F]):
    """A best-first search: the neighbours of the best layout are tried next, those with other sizes before those with other settings.

    So sizes and settings grow where they help, and no formula has to foresee which do.

    Args:
        space: the layouts.
        try_all: tries layouts; returns the figures of each, or why it cannot run.
        at_once: how many layouts are tried together.
        has_time: whether to try more layouts than those that the search starts with.

    Attributes:
        candidates: the layouts that run, in the order in which they were tried.
        refused: why the others do not, with the number of layouts.
        untried: names of the next layouts, which it would have tried with more time or a larger budget.
    """

    def __init__(
        self,
        space: Space,
        try_all: Callable[[Sequence[Layout]], Sequence[F | str]],
        at_once: int = 1,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        self.candidates: list[Candidate[F]] = []
        self.refused: dict[str, int] = {}
        self.untried: list[str] = []
        self._space, self._try_all, self._at_once, self._has_time = space, try_all, at_once, has_time
        self._seen: set[str] = set()

    def run(self, starts: Sequence[OverlapConfig], budget: int = LAYOUTS) -> list[Candidate[F]]:
        """Tries up to ``budget`` layouts, first ``starts``. Returns those that run, the best first."""
        first = self._new(starts)[:budget]
        self._try(first)
        left = budget - len(first)
        expanded: set[tuple[str, bool]] = set()
        while best := next(((c.layout, s) for c in self.ranked() for s in (True, False) if (c.layout.name, s) not in expanded), None):
            layout, in_size = best
            expanded.add((layout.name, in_size))
            layouts = self._new(self._space.neighbours(layout, in_size=in_size))
            while layouts:
                together, layouts = layouts[: min(self._at_once, left)], layouts[min(self._at_once, left) :]
                if not together or not self._has_time():
                    self.untried = [layout.name for layout in (*together, *layouts)]
                    return self.ranked()
                self._try(together)
                left -= len(together)
        return self.ranked()

    def ranked(self) -> list[Candidate[F]]:
        """Returns the layouts that run, the best first."""
        return sorted(self.candidates, key=lambda each: each.figures.cost)

    def _new(self, configs: Sequence[OverlapConfig]) -> list[Layout]:
        """Returns the layouts of configurations that are new to this search."""
        layouts: list[Layout] = []
        for config in configs:
            if repr(config) in self._seen:
                continue
            self._seen.add(repr(config))
            try:
                layout = self._space.layout(config)
            except ConfigError as error:
                self._refuse(str(error))
                continue
            if layout.decisions not in self._seen:
                self._seen.add(layout.decisions)
                layouts.append(layout)
        return layouts

    def _try(self, layouts: Sequence[Layout]) -> None:
        for layout, figures in zip(layouts, self._try_all(layouts), strict=True):
            if isinstance(figures, str):
                self._refuse(figures)
            else:
                self.candidates.append(Candidate(layout, figures))

    def _refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
