"""A launched function: its error reaches all ranks, and one runs at a time."""

import threading

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_overlap import ConfigError
from lightning_overlap.strategy.launching import Watched


class Strategy:
    launched = False

    def note_failure(self, trainer):
        pass


def asked_to_stop():
    raise SIGTERMException


def test_a_process_that_has_to_answer_and_is_asked_to_stop_does_not_end_well():
    with pytest.raises(SystemExit) as ended:
        Watched(Strategy(), None, asked_to_stop, answers=True)()
    assert ended.value.code == 143
    with pytest.raises(SIGTERMException):
        Watched(Strategy(), None, asked_to_stop)()


def test_two_trainers_at_once_in_one_process_are_refused():
    inside, over = threading.Event(), threading.Event()
    first = threading.Thread(target=Watched(Strategy(), None, lambda: (inside.set(), over.wait(10))))
    first.start()
    inside.wait(10)
    try:
        with pytest.raises(ConfigError, match="another thread of this process runs a Trainer"):
            Watched(Strategy(), None, lambda: None)()
    finally:
        over.set()
        first.join()
    assert Watched(Strategy(), None, lambda: "after it")() == "after it"
