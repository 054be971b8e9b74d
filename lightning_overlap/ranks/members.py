"""The members of a group: their ranks, this rank's last transfers, and the error of a failed transfer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch.distributed as dist

from lightning_overlap.ranks.announcements import Announcements, TransferError
from lightning_overlap.ranks.transfer import Transfer

REMEMBERED_TRANSFERS = 256
"""Number of last transfers that are kept, of which an error lists the incomplete ones."""
LISTED_TRANSFERS = 8
"""Largest number of incomplete transfers that an error lists."""


class Members:
    """Ranks that transfer tensors to each other.

    Args:
        ranks: global ranks, in the order of their rank in the group.
        name: name of the group in errors.
        announcements: where ranks announce their errors.

    Attributes:
        size: number of members.
        rank: this process's rank in the group.
        recent: the last transfers that this rank has posted.
    """

    def __init__(self, ranks: Sequence[int], name: str, announcements: Announcements) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.name = name
        self.announcements = announcements
        self.recent: deque[Transfer] = deque(maxlen=REMEMBERED_TRANSFERS)

    def failure(self, label: str, peer: int, error: Exception, flight_record: str) -> Exception:
        """Makes the error of a failed transfer.

        Args:
            label: name of the transfer.
            peer: the peer's rank in the group; -1 if it is not known.
            error: what the backend raised.
            flight_record: a sentence on torch's last collectives, or an empty string.

        Returns:
            The error that a rank has announced, since it is the cause; without one, a TransferError with the transfer and the peer.
        """
        if (announced := self.announcements.announced()) is not None:
            return announced
        others = [r for r in self.ranks if r != self.ranks[self.rank]]
        who = f"rank {self.ranks[peer] if 0 <= peer < self.size else others[0] if len(others) == 1 else others}"
        incomplete = self.incomplete()
        posted = f" Incomplete transfers of this rank: {incomplete}." if incomplete else ""
        return TransferError(
            f"transfer {label!r} of group {self.name!r} between rank {self.ranks[self.rank]} and {who} failed: {error}. "
            "The peer has ended or cannot be reached. Look for its error, and resume from the last checkpoint."
            f"{posted}{flight_record}"
        )

    def incomplete(self) -> str:
        """Lists the last transfers of this rank that are not known to be complete; an empty string without any."""
        now = time.perf_counter()
        listed = [f"{t.label} ({now - t.posted:.1f} s ago)" for t in list(self.recent) if not t.complete]
        more = f" and {len(listed) - LISTED_TRANSFERS} more" if listed[LISTED_TRANSFERS:] else ""
        return ", ".join(listed[:LISTED_TRANSFERS]) + more
