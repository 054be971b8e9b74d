"""The weights of microbatches in the loss."""

import pytest
import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.pipeline.weights import weigh

PARTS = [{"labels": torch.tensor([[1, 2, -100]])}, {"labels": torch.tensor([[-100, -100, 5]])}]


@pytest.mark.parametrize(
    ("by", "own", "loss", "logs"),
    [
        ("samples", None, (0.75, 0.25), (0.75, 0.25)),
        ("labels", None, (2 / 3, 1 / 3), (2 / 3, 1 / 3)),
        ("causal_labels", None, (0.5, 0.5), (0.5, 0.5)),
        ("sum", None, (1.0, 1.0), (0.75, 0.25)),
        ("sum", lambda part: (part["labels"] == 5).sum(), (0.0, 1.0), (0.0, 1.0)),
    ],
)
def test_what_a_microbatch_counts_for(by, own, loss, logs):
    found = weigh(PARTS, [3, 1], by, own)
    assert found.loss == pytest.approx(loss)
    assert found.logs == pytest.approx(logs)


def test_what_counts_for_nothing_is_refused():
    with pytest.raises(ConfigError, match="no tensor with the key 'labels'"):
        weigh([{"ids": torch.ones(2)}] * 2, [1, 1], "labels", None)
    with pytest.raises(ConfigError, match=r"the weights of the microbatches are \[0.0, 0.0\]: no weight"):
        weigh(PARTS, [1, 1], "samples", lambda part: 0.0)
    assert weigh([(1, {"more": PARTS[0]})] * 2, [1, 1], "labels", None).loss == (0.5, 0.5)
