"""Runs cases of the zoo in a world that is made anew when a run has left it in disorder."""

from __future__ import annotations

from collections.abc import Iterator

from tests.helpers.world import World
from tests.zoo.case import HAVE_OTHER_SAMPLES, LAYOUTS
from tests.zoo.models import MODELS
from tests.zoo.table import TABLE
from tests.zoo.training import run
from tests.zoo.verdict import WHOLE, Expected, Verdict, expected_of, judge, references

Case = tuple[str, str, str]
LIMIT = 40.0
"""Seconds after which a run hangs: the strategy's own limit of a transfer is below."""


def cases() -> Iterator[Case]:
    """All (model, data, layout) of the zoo."""
    for name, model in MODELS.items():
        for data in model.data:
            for layout in LAYOUTS:
                if layout != "ep" or model.has_experts:
                    yield name, data, layout


def expectation(name: str, data: str, layout: str) -> Expected:
    return expected_of(TABLE.get(name, {}), layout, data)


class Keeper:
    """Gives verdicts of cases, one after the other."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._used = False
        self.worlds = 0

    def run(self, name: str, data: str, layout: str) -> Verdict:
        model = MODELS[name]
        verdict = self._once(name, data, layout, references(model, layout, expectation(name, data, layout)))
        if verdict.word in ("differs", "told") and not model.random:
            # Is it what is known to differ by nature?
            other = "DDP" if layout.startswith(HAVE_OTHER_SAMPLES) else "microbatches in one process"
            verdict = self._once(name, data, layout, [WHOLE, other])
        return verdict

    def _once(self, name: str, data: str, layout: str, kinds: list[str]) -> Verdict:
        if self._world is None:
            self._world, self._used, self.worlds = World(2), False, self.worlds + 1
        self._world.timeout = LIMIT
        used, self._used = self._used, True
        try:
            verdict = judge(MODELS[name], layout, self._world.run(run, name, data, layout, kinds))
        except TimeoutError as error:
            verdict = Verdict("hang", str(error))
        except AssertionError as error:
            verdict = Verdict("crash", str(error)[-1000:])
        if verdict.word in ("crash", "hang"):  # ranks have stopped at different places
            self.close()
        if verdict.word == "crash" and used:  # it may be what an earlier run has left behind
            return self._once(name, data, layout, kinds)
        return verdict

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None
