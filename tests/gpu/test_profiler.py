"""On a device: the profiler's figures and trace come from events of the streams, and looking changes no number."""

import json
import os

import pytest
import torch

from lightning_overlap import OverlapProfiler, PipelineParallel, TensorParallel
from tests.gpu.test_numbers import DATA
from tests.gpu.training import fit

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "data": DATA,
    "tensor": {"tensor_parallel": TensorParallel(size=2)},
    "pipeline": {"pipeline_parallel": PipelineParallel(size=2, virtual_stages=2, microbatches=4)},
}


def profiled(device, layout, path):
    profiler = OverlapProfiler(every_n_steps=1, warmup=1, trace=path)
    answer = fit(device, layout, {}, {"callbacks": [profiler], "log_every_n_steps": 1})
    summary = profiler.summary
    if os.environ["RANK"] != "0":
        return answer["weights"], None
    spent = summary.mean()
    return answer["weights"], {"names": summary.names, "steps": summary.steps, "seconds": spent.communication, "bytes": spent.nbytes}


@pytest.mark.parametrize("mode", LAYOUTS)
def test_transfers_are_seen(hosts, device, tmp_path, mode):
    path = str(tmp_path / "trace.json")
    (weights, told), _ = hosts(2).run(profiled, device, LAYOUTS[mode], path)
    assert told["names"] == [mode]
    assert told["steps"] == 5
    assert told["seconds"] > 0
    assert told["bytes"] > 0
    assert torch.equal(weights, hosts(2).run(fit, device, LAYOUTS[mode], {}, {})[0]["weights"])
    with open(path) as file:
        assert {event["pid"] for event in json.load(file)["traceEvents"]} == {0, 1}
