"""Ranks as threads of one process: as exact as a world, and faster to start, which lets tests go through many cases."""

import queue
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.ranks.transfer import Pending, Transfer


class Wait:
    """The waiter of a transfer, which records that it was waited for."""

    def __init__(self, group: "ThreadGroup", label: str) -> None:
        self.group, self.label = group, label

    def arrived(self) -> bool:
        return False

    def wait(self) -> None:
        self.group.events.append(("wait", self.label))


class Mail:
    """What ranks send each other. Two threads that ask for a box first get the same one, which a defaultdict does not promise."""

    def __init__(self) -> None:
        self.boxes: dict[Any, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: Any) -> queue.SimpleQueue[Any]:
        with self._lock:
            return self.boxes.setdefault(key, queue.SimpleQueue())


class ThreadProcessGroup:
    """What a library that communicates itself gets in place of torch's process group."""

    def __init__(self, group: "ThreadGroup") -> None:
        self._group = group

    def rank(self) -> int:
        return self._group.rank

    def size(self) -> int:
        return self._group.size

    def gather_values(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        rank, mail = self._group.rank, self._group.mail
        for peer in range(self.size()):
            mail[rank, peer, "gather"].put(value)
        return [mail[peer, rank, "gather"].get(timeout=30) for peer in range(self.size())]


class ThreadGroup:
    """The verbs of a group that attention and experts need.

    Attributes:
        events: (``post`` or ``wait``, label) in the order of this rank.
        nbytes: bytes that this rank has sent.
    """

    def __init__(self, rank: int, size: int, mail: Mail) -> None:
        self.rank, self.size, self.mail = rank, size, mail
        self.events: list[tuple[str, str]] = []
        self.nbytes = 0
        self.process_group = ThreadProcessGroup(self)
        self.before_wait: Callable[[], None] | None = None

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        return self._exchange(x.split(list(send_sizes)), receive_sizes, key, label, torch.cat)

    def all_gather(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str) -> Pending:
        mine = x[bounds[self.rank] : bounds[self.rank + 1]]
        return self._exchange([mine] * self.size, [b - a for a, b in pairwise(bounds)], key, label, torch.cat)

    def reduce_scatter(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str, wire: torch.dtype | None) -> Pending:
        pieces = [x[a:b] for a, b in pairwise(bounds)]
        sent = [piece.to(wire or x.dtype) for piece in pieces]

        def total(parts: list[Tensor]) -> Tensor:
            others = [part.to(x.dtype) for rank, part in enumerate(parts) if rank != self.rank]
            return list(accumulate([pieces[self.rank], *others]))[-1]

        return self._exchange(sent, [len(pieces[self.rank])] * self.size, key, label, total)

    def note(self, label: str, nbytes: int) -> Transfer:
        self.events.append(("post", label))
        return Transfer(label, 0, nbytes, tuple(range(self.size)), 0.0)

    def _exchange(
        self, sent: Sequence[Tensor], sizes: Sequence[int], key: int, label: str, finish: Callable[[list[Tensor]], Tensor]
    ) -> Pending:
        nbytes = sum(part.nbytes for rank, part in enumerate(sent) if rank != self.rank)
        self.nbytes += nbytes
        transfer = self.note(label, nbytes)
        for rank, part in enumerate(sent):
            self.mail[self.rank, rank, key].put(part.clone())

        def receive() -> Tensor:
            parts = [self.mail[rank, self.rank, key].get(timeout=30) for rank in range(self.size)]
            assert [len(part) for part in parts] == list(sizes)
            return finish(parts)

        return Pending(transfer, Wait(self, label), receive)


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function with each rank's group, and returns the results by rank."""
    mail = Mail()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, size, mail), *arguments)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A rank whose peer has failed waits in vain: the peer's error comes first.
    for error in sorted((x for x in results if isinstance(x, BaseException)), key=lambda error: isinstance(error, queue.Empty)):
        raise error
    assert all(box.empty() for box in mail.boxes.values()), "something was sent that nobody has received"
    return results
