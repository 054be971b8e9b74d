"""What a rank says of an error that another rank has caused."""

from typing import Any

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks import announcements
from lightning_overlap.ranks.announcements import Announcements, TransferError


class LateAnnouncements(Announcements):
    """The other rank's error comes with the third look."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self._others, self.looks = error, 0

    def announced(self) -> Exception | None:
        self.looks += 1
        return self._others if self.looks > 2 else None


def test_the_cause_of_a_broken_transfer_may_be_announced_later() -> None:
    cause = ConfigError("the user's error")
    assert LateAnnouncements(cause).cause_of(TransferError("rank 1 has failed")) is cause


def test_an_error_of_this_rank_is_its_own_cause() -> None:
    error, told = ValueError("mine"), LateAnnouncements(ConfigError("another's"))
    assert told.cause_of(error) is error
    assert told.looks == 0


def test_nobody_waits_long_for_a_cause(monkeypatch: Any) -> None:
    monkeypatch.setattr(announcements, "CAUSE_FOLLOWS", 0.1)
    error = TransferError("the link is cut")
    assert LateAnnouncements(None).cause_of(error) is error
