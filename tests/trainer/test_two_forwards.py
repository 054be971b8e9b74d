"""Two forwards under way at once, in two threads that take turns: the bits are those of one after the other."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.nn import functional as F

from lightning_overlap import OverlapStrategy, TensorParallel
from lightning_overlap.steps.forward import Forward
from tests.helpers.sequences import QUIET
from tests.trainer.tensor.test_numbers import Net


class Turns:
    """Runs two functions in two threads, of which one runs at a time: each hands over at every block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lane = threading.local()
        self._turn = 0
        self._alive = [False, False]
        self.order: list[int] = []

    def run(self, *functions: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None, None]
        self._turn, self._alive = 0, [True, True]

        def lane(number: int) -> None:
            self._lane.number = number
            with self._changed:
                self._changed.wait_for(lambda: self._turn == number)
            try:
                results[number] = functions[number]()
            except BaseException as error:
                results[number] = error
            with self._changed:
                self._alive[number], self._turn = False, 1 - number
                self._changed.notify_all()

        threads = [threading.Thread(target=lane, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def hand_over(self, *_: Any) -> None:
        """A forward pre-hook of the blocks, which activation checkpoints call in backward, too."""
        number = getattr(self._lane, "number", None)
        if number is None:
            return
        with self._changed:
            self.order.append(number)
            if self._alive[1 - number]:
                self._turn = 1 - number
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._turn == number)


class Both(Callback):
    """Computes two microbatches of different lengths, before the first step: loss and gradients, in turns or one after the other."""

    def __init__(self, in_turns: bool) -> None:
        self.in_turns = in_turns
        self.turns = Turns()
        self.result: Any = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        mode: Any = trainer.strategy.modes[0]  # type: ignore[attr-defined]
        forwards = mode.setup.boundary.forwards
        batches = [torch.randint(0, 31, (2, length), generator=torch.Generator().manual_seed(length)) for length in (10, 6)]
        states = [Forward(), Forward()]

        def forward(number: int) -> torch.Tensor:
            with forwards.running(states[number]):
                logits = module(batches[number][:, :-1])
                return F.cross_entropy(logits.flatten(0, 1).float(), batches[number][:, 1:].flatten())

        def backward(number: int, loss: torch.Tensor) -> None:
            with forwards.backward(states[number]):
                mode.start_backward()
                loss.backward()
                mode.finish_backward()

        for block in module.blocks:
            block.register_forward_pre_hook(self.turns.hand_over)
        first = forward(0)
        if self.in_turns:
            _, second = self.turns.run(lambda: backward(0, first), lambda: forward(1))
        else:
            backward(0, first)
            second = forward(1)
        backward(1, second)
        self.result = [first.item(), second.item(), *(p.grad.clone() for p in module.parameters())]


def both(in_turns: bool, recompute: bool | None, sequence: bool) -> tuple[list[Any], list[int]]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    callback = Both(in_turns)
    parallel = TensorParallel(size=2, sequence_parallel=sequence)
    strategy = OverlapStrategy(tensor_parallel=parallel, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    given: Any = {"limit_train_batches": 1, "max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    Trainer(**QUIET, accelerator="cpu", devices=2, strategy=strategy, callbacks=[callback], **given).fit(Net(recompute=recompute))
    return callback.result, callback.turns.order


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_under_the_backward_of_another_has_the_same_bits(world: Any, recompute: bool, sequence: bool) -> None:
    plain = world(2).run(both, False, recompute, sequence)
    for (found, order), (reference, _) in zip(world(2).run(both, True, recompute, sequence), plain, strict=True):
        assert order[:6] == [0, 1] * 3, "the threads have taken turns"
        assert found[:2] == plain[0][0][:2]
        assert all(map(torch.equal, found[2:], reference[2:]))
