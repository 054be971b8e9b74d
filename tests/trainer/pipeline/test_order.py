"""What is computed, reduced and gathered when."""

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_overlap import DataParallel, OverlapStrategy, PipelineParallel
from lightning_overlap.modes.pipeline.stage import Stages
from tests.helpers.pipelined import QUIET, Net, by_hand, loader, pipelined


@pytest.mark.parametrize(("schedule", "virtual", "limit"), [("gpipe", 1, 0), ("1f1b", 1, 1), ("interleaved", 2, 2), ("zb_v", 2, 0)])
def test_the_heads_gradients_come_later_and_are_the_same(world, schedule, virtual, limit):
    how = {"schedule": schedule, "virtual_stages": virtual, "wgrad_deferral_limit": limit}
    for rank in world(2).run(pipelined, {"size": 2, "microbatches": 4, "defer_embedding_wgrad": True, **how}):
        assert torch.equal(rank["weights"], by_hand(4, {}))
        assert "while its rank would wait" in rank["plan"]


class Shares(Net):
    """A norm and the head's weight are used on the first stage, too."""

    def __init__(self) -> None:
        super().__init__(blocks=4, tied=True)
        self.norm = self.blocks[0].norm  # type: ignore[assignment]


def order(kind: type[Net], pipeline: dict[str, Any]) -> tuple[list[str], str]:
    """What one step's backward does, and the schedule's row that it follows."""
    warnings.simplefilter("ignore")
    events: list[str] = []

    def listen(own: Any, verb: str, said: str, heard: Any = None) -> None:
        act = getattr(own, verb)

        def says(*arguments: Any, **how: Any) -> Any:
            events.append(said)
            result = act(*arguments, **how)
            if heard is not None:
                heard(result)
            return result

        setattr(own, verb, says)

    class Listens(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            mode: Any = trainer.strategy.modes[0]  # type: ignore[attr-defined]
            listen(mode._weight_gradients, "run", "weights")
            listen(mode.runs.channels["B", False, 1], "send", "sent")
            for group in mode._tied.groups.values():
                listen(group, "all_reduce", "sum", lambda pending: listen(pending, "wait", "wait"))
            if module.head.weight.requires_grad:
                module.head.weight.register_post_accumulate_grad_hook(lambda _: events.append("head"))

        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            ((runner, _),) = trainer.strategy.modes[0].runs.by_count.values()  # type: ignore[attr-defined]
            events.append(" ".join(map(str, runner.actions)))

    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    own = PipelineParallel(size=2, microbatches=4, **pipeline)
    strategy = OverlapStrategy(pipeline_parallel=own, verify_first_step=False, **env)  # type: ignore[arg-type]
    given: Any = {"limit_val_batches": 0, "max_steps": 1, "callbacks": [Listens()], "use_distributed_sampler": False}
    Trainer(**QUIET, accelerator="cpu", devices=2, strategy=strategy, **given).fit(kind(), loader(8))
    return events[:-1], events[-1]


def test_shared_gradients_are_summed_under_what_is_left_of_backward(world):
    for events, row in world(2).run(order, Shares, {"schedule": "zb_h1", "defer_embedding_wgrad": False}):
        told = [event for event in events if event in ("weights", "sum", "wait")]
        after = row.rpartition("I")[2].count("W")
        assert after > 0
        assert told == ["weights"] * (4 - after) + ["sum"] * 3 + ["weights"] * after + ["wait"] * 3


def test_the_heads_gradients_come_after_what_the_stage_before_waits_for(world):
    events, row = world(2).run(order, Net, {"schedule": "1f1b", "defer_embedding_wgrad": True, "wgrad_deferral_limit": 1})[1]
    assert row == "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 F1.3 I1.3 W1.2 W1.3"
    for action in row.split():
        expected = {"F": [], "I": ["sent"], "W": ["weights", "head"]}[action[0]]
        assert events[: len(expected)] == expected
        del events[: len(expected)]
    assert not events


def gathered(aligned: bool) -> tuple[list[list[str]], dict[int, set[int]], torch.Tensor]:
    """Actions and data transfers of each step in their order, the stages of each bucket's parameters, and the weights."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    steps: list[list[str]] = []
    stages_of: dict[int, set[int]] = {}

    def heard(act: Any, said: Any) -> Any:
        def says(*arguments: Any, **how: Any) -> Any:
            steps[-1].append(said(*arguments, **how))
            return act(*arguments, **how)

        return says

    class Listens(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            pipeline, data = trainer.strategy.modes  # type: ignore[attr-defined]
            for bucket in data.buckets.live:
                stages_of[bucket.key] = {stage for name in bucket.names for stage in pipeline.partition.users[name]}
            for verb, said in (("reduce_scatter", "reduce"), ("all_gather", "gather")):
                setattr(data.groups[0], verb, heard(getattr(data.groups[0], verb), lambda *_, key, said=said, **__: f"{said} {key}"))

        def on_train_batch_start(self, *_: Any) -> None:
            steps.append([])

    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    own = PipelineParallel(size=2, virtual_stages=2, microbatches=4)
    data = DataParallel(bucket_size=1000, align_param_gather=aligned)  # type: ignore[arg-type]
    strategy = OverlapStrategy(data, pipeline_parallel=own, verify_first_step=False, **env)
    given: Any = {"max_steps": 3, "limit_val_batches": 0, "callbacks": [Listens()], "use_distributed_sampler": False}
    module = Net(blocks=8)
    with (
        mock.patch.object(Stages, "forward", heard(Stages.forward, lambda _, stage, microbatch, *__: f"F{stage}.{microbatch}")),
        mock.patch.object(Stages, "backward", heard(Stages.backward, lambda _, action, *__: str(action))),
    ):
        Trainer(**QUIET, accelerator="cpu", devices=4, strategy=strategy, **given).fit(module, loader(4))
    return steps, stages_of, torch.cat([p.detach().flatten() for p in module.parameters()])


def test_each_stage_is_reduced_in_its_last_backward_and_gathered_before_its_next_forward(world):
    """In its backward, or, aligned, after all of them, and then in the order of forward."""
    found = {aligned: world(4).run(gathered, aligned) for aligned in (False, True)}
    for aligned, ranks in found.items():
        for rank, (steps, stages_of, _) in enumerate(ranks):
            assert set.union(*stages_of.values()) == {rank // 2, rank // 2 + 2}
            for events in steps:
                actions = [n for n, event in enumerate(events) if event[0] in "FB"]
                for key, stages in stages_of.items():
                    (stage,) = stages  # a bucket of two would wait for the other
                    last = actions.index(events.index(f"B{stage}.3"))
                    during = range(actions[last], [*actions, len(events)][last + 1])
                    assert events.index(f"reduce {key}") in during
                    assert events.index(f"gather {key}") > (actions[-1] if aligned else during[0])
                gathers = [stages_of[int(event.split()[1])] for event in events if event.startswith("gather")]
                assert len(gathers) == len(stages_of)
                if aligned:
                    assert gathers == sorted(gathers, key=min)
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.equal(one[2], other[2])
