"""Two processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_recipe import SMALL

SCRIPT = Path(__file__).with_name("two_processes.py")


def torchrun(processes, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2] / "helpers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def history(tmp_path, processes, device_batch):
    output = tmp_path / str(processes)
    output.mkdir()
    torchrun(processes, str(SCRIPT), "steps", str(output), str(device_batch))
    entries = json.loads((output / "history.json").read_text())
    return [(entry["loss"], entry["grad_norm"]) for entry in entries]


def test_two_processes_equal_one(tmp_path):
    one, two = history(tmp_path, 1, 4), history(tmp_path, 2, 2)
    assert len(one) == 3
    for (loss, norm), (other_loss, other_norm) in zip(one, two, strict=True):
        assert other_loss == pytest.approx(loss, rel=2e-5)
        assert other_norm == pytest.approx(norm, rel=2e-5)


def test_a_recipe_runs_in_two_processes(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "out")}))
    torchrun(2, "-m", "prefixvlm", "train", str(path), "--stages", "0,1")
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["stage-0", "stage-1"]
    for folder in (tmp_path / "out").iterdir():
        names = {file.name for file in folder.iterdir()}
        assert {"model.safetensors", "history.json", "loss.png", "modeling_prefix_vlm.py", "tokenizer.json"} <= names
