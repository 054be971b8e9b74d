"""However the processes are started, they train alike."""

import json
import subprocess
import sys

import pytest

from tests.helpers.training import train

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.parametrize(
    ("launcher", "start_method"),
    [(TORCHRUN, "popen"), ([], "popen"), ([], "spawn"), ([], "fork")],
    ids=["torchrun", "popen", "spawn", "fork"],
)
def test_every_launcher_trains_the_same(world, tmp_path, launcher, start_method):
    command = [sys.executable, "-m", *launcher, "tests.helpers.launched", start_method, str(tmp_path / "losses")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    expected = world(2).run(train)
    for rank in range(2):
        assert json.loads((tmp_path / f"losses.{rank}").read_text()) == expected[rank]["losses"]
