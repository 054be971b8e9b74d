"""A step that is only tried does not change the user's objects."""

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torchmetrics import SumMetric

from lightning_overlap.model.snapshots import preserve_attributes, reachable_objects


@dataclass
class Tracker:
    seen: int = 0
    losses: list[float] = field(default_factory=list)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.metrics = {"sum": SumMetric()}  # in no module list
        self.trackers = [Tracker()]
        self.itself = self.trackers
        self.count = Counter(a=1)
        self.by_name = defaultdict(list, a=[1])
        self.last = deque([1], maxlen=2)
        self.table = np.zeros(2)
        self.step = 0
        self.latest = torch.zeros(2)
        self.trackers.append(self)

    def forward(self, x):
        self.metrics["sum"].update(x.sum())
        self.trackers[0].seen += 1
        self.trackers[0].losses.append(1.0)
        self.count["a"] += 1
        self.by_name["b"].append(1)
        self.last.append(2)
        self.table += 1
        self.step += 1
        self.latest.add_(1)
        self.made_here = x
        self.register_forward_hook(lambda *_: None)
        return self.norm(x)

    def told(self):
        metric, tracker = self.metrics["sum"], self.trackers[0]
        counts = dict(self.count), dict(self.by_name), list(self.last), self.table.tolist(), self.step, self.latest.tolist()
        running = self.norm.running_mean.tolist(), int(self.norm.num_batches_tracked)
        counts = *counts, len(self._forward_hooks)
        return float(metric.sum_value), metric.update_called, tracker.seen, list(tracker.losses), *counts, *running


def test_all_that_a_step_writes_is_restored():
    module = Holds()
    module(torch.ones(3, 2))
    before = module.told()
    del module.made_here
    with preserve_attributes(reachable_objects(module)):
        module(torch.randn(3, 2))
        assert module.told() != before
    assert module.told() == before
    assert not hasattr(module, "made_here")
    assert module.count.__class__ is Counter
    assert module.last.maxlen == 2


def test_objects_of_libraries_are_not_reached():
    module = nn.Linear(2, 2)
    module.optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module.function = test_all_that_a_step_writes_is_restored
    module._trainer = Tracker()
    assert reachable_objects(module) == [module]
