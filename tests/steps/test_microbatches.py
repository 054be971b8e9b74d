"""Batches are split into microbatches, or refused if their samples are ambiguous."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.steps.microbatches import count_samples, refuse_other_dim, split_batch, unsplit_tensors

Pair = namedtuple("Pair", "ids name")


@dataclass
class Sample:
    ids: Any
    name: str


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers).view(-1, 1).expand(-1, 3)


def plain(value: Any) -> Any:
    """Returns the value with the first column in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return [int(row.flatten()[0]) for row in value] if value.dim() else value.item()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return vars(value) | {"ids": plain(value.ids)} if isinstance(value, Sample) else value


IDS = rows(0, 1, 2, 3)


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("abcd", "abcd"),
        (["a", "b", "c", "d"], ["a", "b"]),
        ([None] * 4, [None] * 2),
        ([None, 1, 2, 3], [None, 1]),
        ([[1, 2], [3], [], [4]], [[1, 2], [3]]),
        ([(1, 2, 3, 4)] * 4, [[1, 2, 3, 4]] * 2),
        ([{"label": rows(i)} for i in range(4)], [{"label": [0]}, {"label": [1]}]),
        ([rows(*[i] * (i + 1)) for i in range(4)], [[0], [1, 1]]),
        ([rows(5, 6), rows(7, 8)], [[5, 6], [7, 8]]),
        ((IDS, (IDS, None)), [[0, 1], [[0, 1], None]]),
        (Pair(IDS, "x"), [[0, 1], "x"]),
        (Sample(IDS, "x"), {"ids": [0, 1], "name": "x"}),
        (OrderedDict(a=IDS), {"a": [0, 1]}),
        (defaultdict(list, a=IDS), {"a": [0, 1]}),
        (torch.tensor(3), 3),
        (rows(0, 1, 2), [0, 1, 2]),
        (0.5, 0.5),
    ],
)
def test_the_first_half_of_a_batch(what, first):
    part, _ = split_batch({"ids": IDS, "what": what, "labels": IDS}, 2)
    assert plain(part) == {"ids": [0, 1], "what": first, "labels": [0, 1]}
    assert type(part["what"]) is type(what)


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_of_columns_has_any_number_of_them(size):
    x, y = rows(*range(size)), rows(*range(size))
    assert plain(split_batch([x, y], size)) == [[[i], [i]] for i in range(size)]
    assert plain(split_batch([x, {"y": y}], size)) == [[[i], {"y": [i]}] for i in range(size)]
    assert plain(split_batch({"z": rows(*range(size)), "several": [x, y, x, y]}, size)) == [
        {"z": [i], "several": [[i]] * 4} for i in range(size)
    ]
    columns = {"both.0": 0, "both.1": 0}
    assert plain(split_batch({"both": [x, y]}, size, columns)) == [{"both": [[i], [i]]} for i in range(size)]


def test_parts_differ_by_one_sample():
    assert [count_samples(part) for part in split_batch(rows(*range(8)), 3)] == [3, 3, 2]


def test_the_number_of_samples():
    assert count_samples({"scale": torch.tensor(1.0), "images": [rows(1), rows(1, 2)], "ids": IDS}) == 4
    assert count_samples(([IDS, IDS], [IDS])) == 4
    assert count_samples({"epoch": torch.tensor([3]), "ids": IDS}) == 4
    assert count_samples({"table": rows(1, 2), "ids": IDS, "labels": IDS}) == 4
    assert count_samples({"epoch": torch.tensor([3])}) == 1


X, MASK = rows(0, 1, 2), torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (["a"], "without a tensor"),
        (([rows(1), rows(1, 2)], ["a", "b"]), r"lengths \[1, 2\]"),
        ({"x": X, "mask": MASK}, "ambiguous, x has 3, mask has 4: name the dim of samples"),
        ({"x": [X, X]}, "x may be a list with an item for each sample"),
        ({"ids": X, "x": [X, X, X]}, "x has as many items as the batch has samples, 3, and so has each of its items"),
    ],
)
def test_ambiguous_batches_are_refused_by_name(batch, said):
    with pytest.raises(ConfigError, match=said):
        split_batch(batch, 2)


def test_dims_that_the_user_names():
    turned = torch.arange(12).view(4, 3)  # four tokens of three samples
    batch = {"x": turned, "mask": MASK, "ids": X, "table": rows(5, 6, 7)}
    first, second = split_batch(batch, 2, {"x": 1, "mask": None, "table": None})
    assert torch.equal(first["x"], turned[:, :2])
    assert torch.equal(second["x"], turned[:, 2:])
    assert torch.equal(first["mask"], MASK)
    assert plain([first["ids"], second["table"]]) == [[0, 1], [5, 6, 7]]
    assert plain(split_batch({"x": [X, X]}, 2, {"x": 0})) == [{"x": [[0, 1, 2]]}] * 2
    assert plain(split_batch((X, {"table": X}), 3, {"1.table": None})[0]) == [[0], {"table": [0, 1, 2]}]
    for dims, said in (({"y": 0}, "names 'y', but the batch has x, mask, ids, table"), ({"x": 0, "ids": 0}, "x has 4, ids has 3")):
        with pytest.raises(ConfigError, match=said):
            split_batch(batch, 2, dims)


def test_unsplit_tensors_are_listed():
    batch = {"x": X, "ids": X, "mask": MASK, "scale": torch.tensor(1.0), "epoch": torch.tensor([3])}
    assert unsplit_tensors(batch) == {"mask": (4, 4)}
    assert unsplit_tensors(batch, {"mask": None}) == {}


@pytest.mark.parametrize("shape", [(9, 8), (5, 8)])
def test_samples_along_another_dim_are_refused(shape: tuple[int, ...]) -> None:
    batch = {"ids": torch.zeros(shape)}
    with pytest.raises(ConfigError, match=r"samples seem to be along dim 1.*'ids': 1"):
        refuse_other_dim(batch, count_samples(batch), 8, {})


@pytest.mark.parametrize(
    ("batch", "batch_size", "dims"),
    [
        (torch.zeros(8, 9), 8, {}),
        (torch.zeros(16, 8), 8, {}),  # two rows a sample
        (torch.zeros(9, 7), 8, {}),  # nothing looks like the samples
        (torch.zeros(9, 8), None, {}),
        ({"ids": torch.zeros(9, 8)}, 8, {"ids": 0}),  # the user knows
    ],
)
def test_other_batches_are_not_refused(batch: Any, batch_size: int | None, dims: dict[str, int | None]) -> None:
    refuse_other_dim(batch, count_samples(batch, dims), batch_size, dims)


def test_the_empty_path_names_a_batch_that_is_a_tensor() -> None:
    assert [part.shape for part in split_batch(torch.zeros(3, 4), 2, {"": 1})] == [(3, 2), (3, 2)]
