"""Two processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


def history(tmp_path, processes, device_batch):
    output = tmp_path / str(processes)
    output.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(output), str(device_batch)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "history.json").read_text())


def test_two_processes_equal_one(tmp_path):
    one, two = history(tmp_path, 1, 4), history(tmp_path, 2, 2)
    assert len(one) == 3
    for (loss, norm), (other_loss, other_norm) in zip(one, two, strict=True):
        assert other_loss == pytest.approx(loss, rel=2e-5)
        assert other_norm == pytest.approx(norm, rel=2e-5)
