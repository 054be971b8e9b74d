"""The links between the ranks of the tests' worlds: which there are, and that all ranks have the same figures."""

from datetime import timedelta

import torch

from lightning_overlap.tune.link import measure_links


def measured(ranks_per_host):
    return measure_links(ranks_per_host, torch.device("cpu"), timedelta(minutes=1), seconds=0.01)


def test_links_inside_and_between_hosts(world):
    answers = world(2).run(measured, 1)
    inside, between = answers[0]
    assert inside is None
    assert answers[1] == (None, between), "the same on all ranks, since they decide alike"
    assert between.bandwidth > 0
    assert between.latency > 0
    assert 0 <= between.load <= 1
    assert between.overhead >= 0
    inside, between = world(2).run(measured, 2)[0]
    assert inside is not None
    assert between is None
    inside, between = world(4).run(measured, 2)[3]
    assert inside is not None
    assert between is not None
