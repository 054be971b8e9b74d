"""gloo worlds in worker processes that live for the whole session, since starting torch costs seconds."""

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from torch.distributed import TCPStore


def _serve(rank: int, size: int, store_port: int, environment: dict[str, str], pipe: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not environment:
        store = TCPStore("127.0.0.1", store_port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    gc.freeze()  # torch, which is not looked at again each time
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        del call, function, arguments
        gc.collect()  # trainers, with their connections and the threads behind them


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class World:
    """``size`` ranks. ``run(function, *arguments)`` calls a top-level function on each and returns the results by rank.

    Args:
        size: ranks.
        one_device: each rank is a node of its own, all of them with the first device. They are not connected yet: the first fit
            does that, as in a run of users'.
    """

    timeout = 120.0
    context: Any = multiprocessing.get_context("forkserver")
    """Workers are forked from a process that has imported everything, so that a new one costs nothing."""
    context.set_forkserver_preload(["tests.helpers.warm"])

    def __init__(self, size: int, *, one_device: bool = False) -> None:
        context = self.context
        # As in a run of users'. A FileStore looks for a key every 10 ms, and a fit makes a dozen groups, each with several keys.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = str(_free_port()) if one_device else ""
        self.pipes, self.workers = [], []
        for rank in range(size):
            here, there = context.Pipe()
            # NCCL refuses two ranks on one device of a host, and takes hosts with other names for others.
            node = {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "NCCL_HOSTID": f"host{rank}"}
            environment = {**node, "MASTER_PORT": port} if one_device else {}
            worker = context.Process(target=_serve, args=(rank, size, self.store.port, environment, there), daemon=True)
            worker.start()
            there.close()
            self.pipes.append(here)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        until = time.monotonic() + self.timeout
        while len(answers) < len(self.pipes):
            # whoever answers first: a rank that fails leaves the others waiting for it
            open_ = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait(open_, max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                told = [f"rank {rank}: {result}" for rank, (fine, result) in answers.items() if not fine]
                silent = f"ranks {list(open_.values())} gave no answer to {function.__name__}{arguments} in {self.timeout:.0f} s"
                raise TimeoutError("\n".join([silent, *told]))
            for pipe in ready:
                try:
                    answers[open_[pipe]] = pipe.recv()
                except (EOFError, OSError):
                    answers[open_[pipe]] = (False, "the worker died")
        if errors := [f"rank {rank}: {answers[rank][1]}" for rank in sorted(answers) if not answers[rank][0]]:
            raise AssertionError("\n".join(errors))
        return [answers[rank][1] for rank in range(len(self.pipes))]

    def first(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the first rank answers; the others may never do."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        assert self.pipes[0].poll(self.timeout), f"rank 0 gave no answer in {self.timeout:.0f} s"
        fine, result = self.pipes[0].recv()
        assert fine, result
        return result

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
