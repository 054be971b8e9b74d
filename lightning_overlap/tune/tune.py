"""The command ``tune``: finds the fastest layout for a module, its data and a machine."""

from __future__ import annotations

import gc
import statistics
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.messages import log_on_rank_zero
from lightning_overlap.plan import Plan
from lightning_overlap.ranks.world import agree, all_gather_objects, rank, world_size
from lightning_overlap.tables import WIDTH, as_text
from lightning_overlap.tune.layouts import LAYOUTS, SECONDS, Candidate, Layout, Search, Space
from lightning_overlap.tune.machine import Machine
from lightning_overlap.tune.network import Network
from lightning_overlap.tune.predict import Prediction, predict
from lightning_overlap.tune.training import Training

LEGEND = "plain: without overlap. exposed: milliseconds for which a rank waits, by mode. Runs of one layout differ by some percent."
SHOWN = 10
"""Layouts that are printed."""
FAR_OFF = 0.3
"""Error of a prediction about which the table says a word."""
REPEATS = 3
"""Runs of a measured layout, of which the median is printed."""


@dataclass
class Comparison:
    """The layouts that were compared.

    Attributes:
        machine: the ranks.
        network: their links.
        ranked: all layouts, the best first.
        notes: by name of a layout, what it is: the configured one, or data parallelism alone.
        refused: why layouts cannot run, and how many.
        untried: names of the next layouts that the search would have tried.
        measured: by name of a layout, the measured seconds of a step.
    """

    machine: Machine
    network: Network
    ranked: list[Candidate[Prediction]]
    notes: dict[str, str]
    refused: dict[str, int]
    untried: list[str]
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Layout:
        """The layout with the shortest measured step, or, if none was measured, predicted step, of those that fit the memory.

        Raises:
            ConfigError: none fits.
        """
        measured = [
            candidate.layout for candidate in self.ranked if candidate.layout.name in self.measured and candidate.layout.is_allowed
        ]
        if measured:
            return min(measured, key=lambda layout: self.measured[layout.name])
        first = next(candidate for candidate in self.ranked if candidate.layout.is_allowed)
        if not first.figures.fits:
            needed, limit = first.figures.memory / 1e9, first.figures.limit / 1e9
            raise ConfigError(f"no layout fits: the smallest needs {needed:.1f} GB a rank, which has {limit:.1f} GB. Use more ranks")
        return first.layout

    def table(self) -> str:
        """Formats the best layouts and the references, with a sentence on each; times in milliseconds."""
        fitting = [candidate for candidate in self.ranked if candidate.figures.fits]
        named = {*self.notes, *self.measured}
        numbered = [(i, candidate) for i, candidate in enumerate(fitting, 1) if i <= SHOWN or candidate.layout.name in named]
        head = ["", "ms a step", "plain", "exposed", "MB a rank", *(["measured", "error"] if self.measured else [])]
        table = as_text(head, [self._cells(number, candidate) for number, candidate in numbered], numbers=True)
        lines = []
        if len(self.ranked) == 1:
            lines.append("nothing was compared: one layout was rehearsed")
        if any(abs(error) > FAR_OFF for error in self._errors()):
            lines.append(
                "predictions are far off: other programs use the machine, or its links changed meanwhile; take what was measured"
            )
        for number, candidate in numbered:
            notes = [self.notes[candidate.layout.name]] if candidate.layout.name in self.notes else []
            words = f" ({', '.join(notes + candidate.layout.settings)})" if notes or candidate.layout.settings else ""
            lines.append(f"{number}{words}: {candidate.figures.reason(candidate.layout.config)}")
        if large := len(self.ranked) - len(fitting):
            lines.append(f"left out: {large} layouts need more than {self.ranked[0].figures.limit / 1e9:.1f} GB a rank")
        lines += [f"left out: {count}, since {reason}" for reason, count in self.refused.items()]
        if self.untried:
            names = "; ".join(self.untried)
            lines.append(f"not tried before the search ended (--seconds 300 tries more): {names}; and what differs from these")
        return "\n".join([_wrapped(self._about()), table, _wrapped(LEGEND), *map(_wrapped, lines)])

    def _about(self) -> str:
        known = {"between hosts": self.network.inter_host, "inside a host": self.network.intra_host}
        links = [f"{name}: {link}" for name, link in known.items() if link is not None]
        hosts = "1 host" if self.machine.hosts == 1 else f"{self.machine.hosts} hosts"
        ranks = f"{self.machine.ranks} ranks on {hosts}{'' if self.machine.is_there else ', on paper'}"
        rehearsed = f"{len(self.ranked)} {'layout' if len(self.ranked) == 1 else 'layouts'} rehearsed"
        return f"{ranks}; {rehearsed}; {'; '.join(links)}"

    def _errors(self) -> list[float]:
        """How far the predictions are off, of the layouts that were measured."""
        figures = {candidate.layout.name: candidate.figures for candidate in self.ranked}
        return [figures[name].overlapped.seconds / seconds - 1 for name, seconds in self.measured.items()]

    def _cells(self, number: int, candidate: Candidate[Prediction]) -> list[str]:
        figures, seconds = candidate.figures, candidate.figures.overlapped.seconds
        plain = "" if candidate.layout.config.overlap == "off" else f"{figures.plain.seconds * 1e3:.0f}"
        cells = [
            f"{number}  {candidate.layout.sizes}",
            f"{seconds * 1e3:.0f}",
            plain,
            figures.exposed_in_words(),
            f"{figures.memory / 1e6:.0f}",
        ]
        if self.measured:
            measured = self.measured.get(candidate.layout.name)
            cells += ["", ""] if measured is None else [f"{measured * 1e3:.0f}", f"{seconds / measured - 1:+.0%}"]
        return cells


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="    ")


def _notes(space: Space, config: OverlapConfig) -> dict[str, str]:
    """Returns what the layouts with which a search starts are, by name, if they can be."""
    notes = {}
    for start, note in ((space.data_only(), "data parallelism alone"), (config, "configured")):
        with suppress(ConfigError):
            notes[space.layout(start).name] = note
    return notes


def tune(
    training: Training,
    config: OverlapConfig,
    resolve: Callable[[OverlapConfig], Plan],
    machine: Machine,
    network: Network,
    memory: int,
    *,
    layouts: int = LAYOUTS,
    seconds: float = SECONDS,
    measure: int = 0,
) -> Comparison:
    """Compares layouts. Collective over the ranks that are there, which share the rehearsals.

    Args:
        training: the user's.
        config: the user's; what it sets stays as set.
        resolve: decides a configuration for the ranks of the machine.
        machine: the ranks.
        network: their links.
        memory: bytes that a rank has.
        layouts: how many are rehearsed at most.
        seconds: after which no more are rehearsed.
        measure: how many of the best are also measured.

    Raises:
        ConfigError: no layout can run, the training cannot be rehearsed, or layouts are to be measured on ranks that are not there.
    """
    if measure and not machine.is_there:
        raise ConfigError("--measure needs the ranks: without them, leave it out; or leave --devices out, and start the ranks")
    batch = training.batch(resolve(config).degrees.data)
    training.start(batch)
    space = Space(config, batch, machine.ranks_per_host, resolve)

    def foresee(layout: Layout) -> Prediction | str:
        try:
            return predict(training.rehearse(layout, machine), network, memory)
        except Exception as error:  # of any kind: the other ranks wait for this one's predictions
            return str(error).splitlines()[0] if str(error) else repr(error)

    def try_all(untried: Sequence[Layout]) -> list[Prediction | str]:
        shares = all_gather_objects([foresee(layout) for layout in untried[rank() :: world_size()]])
        answers = [shares[i % len(shares)][i // len(shares)] for i in range(len(untried))]
        for layout, answer in zip(untried, answers, strict=True):
            log_on_rank_zero(
                f"{layout.name}: {answer if isinstance(answer, str) else f'{answer.overlapped.seconds * 1e3:.0f} ms a step'}"
            )
        return answers

    until = time.monotonic() + seconds
    search = Search(space, try_all, world_size(), lambda: agree(time.monotonic() < until, by_all=True))
    try:
        ranked = search.run([config, space.data_only()], layouts)
    finally:
        training.close()
    comparison = Comparison(machine, network, ranked, _notes(space, config), search.refused, search.untried)
    _measure(training, comparison, measure)
    if not any(candidate.layout.is_allowed for candidate in comparison.ranked):
        raise ConfigError(f"no layout can run: {'; '.join(comparison.refused)}")
    return comparison


def _measure(training: Training, comparison: Comparison, number: int) -> None:
    """Measures so many of the fastest layouts, interleaved. One that cannot run leaves the comparison. Collective over the world."""
    fastest = [candidate for candidate in comparison.ranked if candidate.figures.fits][:number]
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        for candidate in tuple(fastest):
            name = candidate.layout.name
            try:
                times[name].append(training.measure(candidate.layout))
            except ConfigError as error:  # the same on all ranks
                comparison.refused[f"{name} fails where it is measured: {error}"] = 1
                comparison.ranked.remove(candidate)
                fastest.remove(candidate)
            gc.collect()  # what a run that has failed holds
    comparison.measured |= {candidate.layout.name: statistics.median(times[candidate.layout.name]) for candidate in fastest}
