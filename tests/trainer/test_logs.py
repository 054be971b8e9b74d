"""Where logs go while parts of a step run, also in two threads at once."""

import threading
from types import SimpleNamespace
from typing import Any

from lightning_overlap.strategy.seams import logs_go_to


class Results:
    def __init__(self) -> None:
        self.written: list[str] = []

    def log(self, name: str) -> None:
        self.written.append(name)


def test_two_threads_log_to_their_own_receivers() -> None:
    results = Results()
    trainer: Any = SimpleNamespace(_results=results)
    turns = [threading.Event(), threading.Event()]
    logs: list[list[str]] = [[], []]

    def step(number: int) -> None:
        turns[number].wait()
        with logs_go_to(trainer, logs[number].append):
            turns[1 - number].set()  # the other one starts while this one is inside, and ends before it
            if number == 0:
                other.join()
            results.log(f"loss {number}")

    other = threading.Thread(target=step, args=(1,))
    other.start()
    turns[0].set()
    step(0)
    assert logs == [["loss 0"], ["loss 1"]]
    assert results.written == []
    results.log("epoch")
    assert results.written == ["epoch"]
    assert "log" not in vars(results)


def test_a_step_inside_a_step_logs_nowhere() -> None:
    results = Results()
    trainer: Any = SimpleNamespace(_results=results)
    outer: list[str] = []
    with logs_go_to(trainer, outer.append):
        with logs_go_to(trainer, None):
            results.log("inner")
        results.log("outer")
    assert (outer, results.written) == (["outer"], [])
