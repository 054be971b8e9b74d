"""gloo worlds in worker processes that live for the whole session, since starting torch costs seconds."""

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class World:
    """``size`` ranks. ``run(function, *arguments)`` calls a top-level function on each and returns the results by rank."""

    timeout = 120.0

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes, self.workers = [], []
        for rank in range(size):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            worker.start()
            self.pipes.append(here)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.timeout):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer to {function.__name__}{arguments} in {self.timeout:.0f} s")
            fine, result = pipe.recv()
            (results if fine else errors).append(result)
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
