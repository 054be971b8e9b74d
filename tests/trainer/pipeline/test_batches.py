"""What microbatches count for, what stages hold, and what training_step draws: a pipeline trains what one process trains."""

from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.trainer.pipeline.test_carry import WIDTH, Net, by_hand, pipelined


def same(world: Any, ranks: int, kind: type[Net], pipeline: dict[str, Any], microbatches: int = 4) -> None:
    weights, loss, validation = by_hand(kind, microbatches)
    for answer in world(ranks).run(pipelined, kind, pipeline):
        assert not isinstance(answer, str), answer
        found, metrics = answer
        for name, expected in weights.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["val_loss"] == pytest.approx(validation, rel=1e-5)


class Temperature(Net):
    """A parameter of the module itself, that the loss uses, and one that is used before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(WIDTH))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(self.through(self.into(batch) + self.shift)).square().mean() * self.log_scale.exp()


LAYOUTS = [(2, {}), (2, {"schedule": "zb_v", "virtual_stages": 2}), (4, {})]


@pytest.mark.parametrize(("ranks", "pipeline"), LAYOUTS)
def test_a_parameter_of_the_module_itself_is_held_by_both_ends(world, ranks, pipeline):
    same(world, ranks, Temperature, pipeline)


class NormFirst(Net):
    """A norm is registered before the blocks and used after them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self._modules = {name: self._modules[name] for name in ("norm", *dict.fromkeys(self._modules))}

    def through(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().through(x))


def test_what_is_used_where_it_is_not_held_is_named_and_can_be_held(world):
    answers = world(2).run(pipelined, NormFirst, {})
    assert all("stage 1 computes with norm.weight, norm.bias, of another stage" in answer for answer in answers), answers
    same(world, 2, NormFirst, {"held_by_all": ("norm",)})
    same(world, 2, NormFirst, {"schedule": "zb_v", "virtual_stages": 2})  # the last stage's rank has the first one too


class NaNLater(Net):
    """The second of three batches has a NaN."""

    @staticmethod
    def data() -> DataLoader:
        batches = torch.randn(24, 4, generator=torch.Generator().manual_seed(2))
        batches[9, 0] = float("nan")
        return DataLoader(batches, 8)  # type: ignore[arg-type]


class NaNAtOnce(NaNLater):
    @staticmethod
    def data() -> DataLoader:
        return DataLoader(NaNLater.data().dataset, 8, sampler=range(8, 24))  # type: ignore[arg-type]


def unproven(kind: type[Net], pipeline: dict[str, Any]) -> Any:
    return pipelined(kind, pipeline, verify_first_step=False)


@pytest.mark.parametrize("train", [pipelined, unproven])
def test_a_nan_of_a_later_step_is_no_fault_of_the_cut(world, train):
    """As in one process: training goes on, and the loss tells."""
    for answer in world(2).run(train, NaNLater, {}):
        assert not isinstance(answer, str), answer
        assert answer[1]["loss"] != answer[1]["loss"]


def test_a_nan_of_the_first_step_may_be_one(world):
    first, second = world(2).run(unproven, NaNAtOnce, {})
    assert "tie a head by" in second, (first, second)


class Labelled(Net):
    """The loss is a mean over labels that count, of which samples have other numbers, and the third microbatch none."""

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.through(self.into(batch["x"])).flatten(0, 1), batch["labels"].flatten())

    @staticmethod
    def data() -> DataLoader:
        draw = torch.Generator().manual_seed(2)
        labels = torch.randint(0, WIDTH, (24, 3), generator=draw)
        labels[torch.rand(24, 3, generator=draw) < 0.4] = -100
        labels[4:6] = -100
        return DataLoader([{"x": torch.randn(3, 4, generator=draw), "labels": row} for row in labels], 8)  # type: ignore[arg-type]


class Causal(Labelled):
    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss({"x": batch["x"][:, :-1], "labels": batch["labels"][:, 1:]})


class WeighsItself(Labelled):
    def microbatch_weight(self, batch: Any) -> torch.Tensor:
        return (batch["labels"] >= 0).sum()


class Summed(Labelled):
    """As with num_items_in_batch of the whole batch."""

    def loss(self, batch: Any) -> torch.Tensor:
        logits = self.through(self.into(batch["x"])).flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / 10


@pytest.mark.parametrize(
    ("kind", "weight"), [(Labelled, "labels"), (Causal, "causal_labels"), (WeighsItself, "samples"), (Summed, "sum")]
)
def test_a_batch_counts_as_in_one_process(world, kind, weight):
    same(world, 2, kind, {"microbatch_weight": weight}, microbatches=1)


def test_a_microbatch_without_labels_says_what_to_set(world):
    for answer in world(2).run(pipelined, Labelled, {}):
        assert "no counted label. Set pipeline_parallel.microbatch_weight" in answer


class Draws(Net):
    """Noise of NumPy's, by a generator of the module's own and by the common one."""

    def __init__(self) -> None:
        super().__init__()
        self.own = numpy.random.default_rng(1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        drawn = float(self.own.random() + numpy.random.rand())
        x = self.into(batch) * drawn
        loss = self.out(self.through(x)).square().mean() / drawn
        self.log("drawn", drawn)
        return loss


def drawn_alike() -> Any:
    return [pipelined(Draws, pipeline) for pipeline in ({"schedule": "gpipe"}, {"schedule": "zb_v", "virtual_stages": 2})]


def test_all_stages_draw_the_same_numbers(world):
    (one, other), (again, _) = world(2).run(drawn_alike)
    assert one[1] == again[1] == other[1]
    for name, weight in one[0].items():
        assert torch.equal(weight, again[0][name])
        torch.testing.assert_close(weight, other[0][name], rtol=1e-5, atol=1e-6)


class Leaves(Net):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.latest = super().training_step(batch, index)
        return self.latest

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        assert self.latest is not None


def test_a_hook_that_reads_an_attribute_of_the_last_stage_says_so(world):
    first, second = world(2).run(pipelined, Leaves, {})
    assert first.startswith("ConfigError: on_train_batch_end failed on a rank without the last stage (AttributeError: ")
    assert "training_step stops inside the model call, so what it stores on self later does not exist there" in first
    assert isinstance(second, str)  # in the first batches it may be in a blocking transfer, and learns only that the other one is gone
