"""What a microbatch gets of a batch."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.microbatches import cut, samples

Pair = namedtuple("Pair", "ids name")


@dataclass
class Sample:
    ids: Any
    name: str


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers).view(-1, 1).expand(-1, 3)


def plain(value: Any) -> Any:
    """Of tensors, the first column."""
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
def test_what_the_first_half_of_a_batch_gets(what, first):
    part, _ = cut({"ids": IDS, "what": what}, 2)
    assert plain(part) == {"ids": [0, 1], "what": first}
    assert type(part["what"]) is type(what)


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_of_columns_has_any_number_of_them(size):
    x, y = rows(*range(size)), rows(*range(size))
    assert plain(cut([x, y], size)) == [[[i], [i]] for i in range(size)]
    assert plain(cut([x, {"y": y}], size)) == [[[i], {"y": [i]}] for i in range(size)]
    assert plain(cut({"both": [x, y]}, size)) == [{"both": [[i], [i]]} for i in range(size)]


def test_parts_differ_by_one_sample():
    assert [samples(part) for part in cut(rows(*range(8)), 3)] == [3, 3, 2]


def test_how_many_samples_there_are():
    assert samples({"scale": torch.tensor(1.0), "images": [rows(1), rows(1, 2)], "ids": IDS}) == 4
    assert samples(([IDS, IDS], [IDS])) == 4
    for batch, said in ((["a"], "without a tensor"), (([rows(1), rows(1, 2)], ["a", "b"]), r"lengths \[1, 2\]")):
        with pytest.raises(ConfigError, match=said):
            samples(batch)
