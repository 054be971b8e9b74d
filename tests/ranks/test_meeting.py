"""Ranks meet within a time limit, or an error names the missing ranks."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from lightning_overlap import ConfigError
from lightning_overlap.ranks import meeting
from lightning_overlap.ranks.announcements import TransferError

SHORT = timedelta(seconds=1)


def meet(ranks):
    """Returns the outcome for each process that says it is (rank, ranks)."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def come(rank, size):
        store = TCPStore("127.0.0.1", kept.port, is_master=False, wait_for_workers=False)
        try:
            meeting.meet_in(store, rank, size, SHORT)
        except (ConfigError, TransferError) as error:
            return f"{type(error).__name__}: {error}"
        return "met"

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda each: come(*each), ranks))


def test_ranks_that_all_come_have_met():
    assert meet([(0, 3), (1, 3), (2, 3)]) == ["met"] * 3


def test_ranks_that_do_not_come_are_named():
    answers = meet([(0, 4), (2, 4)])
    assert all(answer.startswith("TransferError: ranks [1, 3] of 4 have not come within 0:00:01") for answer in answers)


def test_ranks_that_disagree_about_their_number_all_hear_of_it():
    answers = meet([(0, 2), (1, 3)])
    assert all(answer.startswith("ConfigError: ranks disagree about WORLD_SIZE: {'rank 0': '2', 'rank 1': '3'}") for answer in answers)


def test_two_processes_of_one_rank_all_hear_of_it(monkeypatch):
    processes = iter(range(100))
    monkeypatch.setattr(meeting.os, "getpid", lambda: next(processes))
    answers = meet([(0, 3), (1, 3), (1, 3)])
    assert all(answer.startswith("ConfigError: two processes are rank 1: ") for answer in answers)


def test_a_store_that_nobody_opens_is_given_up_at_the_limit():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TransferError, match=rf"rank 0 has not opened .*=127.0.0.1:{port} within 0:00:01"):
        meeting.open_store("127.0.0.1", port, 1, 2, SHORT)


def test_a_port_that_another_program_uses_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"another program uses this port\. Set MASTER_PORT"):
            meeting.open_store("127.0.0.1", taken.getsockname()[1], 0, 2, SHORT)


def test_a_port_of_another_program_is_given_up_at_the_limit():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TransferError, match=r"rank 1 finds no store at .* \(another program may use this port\) within 0:00:01"):
            meeting.open_store("127.0.0.1", silent.getsockname()[1], 1, 2, SHORT)
