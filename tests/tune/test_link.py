"""The links between the ranks of the tests' worlds: which there are, and that all ranks have the same figures."""

from datetime import timedelta

import torch

from lightning_overlap.tune.link import measure_links
from lightning_overlap.tune.network import Link


def measured(ranks_per_host, given=(None, None)):
    return measure_links(ranks_per_host, torch.device("cpu"), timedelta(minutes=1), given, seconds=0.01)


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


def test_a_link_that_is_given_is_not_measured(world):
    given = Link(1e6, 0.001)
    for inside, between in world(4).run(measured, 2, (given, None)):
        assert inside == given
        assert between is not None
        assert between != given
    for inside, between in world(4).run(measured, 2, (None, given)):
        assert inside is not None
        assert between == given
