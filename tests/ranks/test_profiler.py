"""Transfers in torch's profiler, which nsys sees as well through ``emit_nvtx``."""

from datetime import timedelta

import torch
from torch.profiler import ProfilerActivity, profile

from lightning_overlap.ranks.world import make_group


def profiled():
    group = make_group([[0, 1]], "test", timedelta(seconds=30))
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            group.all_reduce(torch.ones(2), label="data.norm").wait()
            group.all_gather(torch.ones(2), [0, 1, 2], key=0, label="data.params[0]").wait()
        return [event.name for event in profiler.events() if " data." in event.name]
    finally:
        group.close()


def test_posts_and_waits_have_their_labels(world):
    labels = ["post data.norm", "wait for data.norm", "post data.params[0]", "wait for data.params[0]"]
    assert world(2).run(profiled) == [labels] * 2
