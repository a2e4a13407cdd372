"""torchrun trains a recipe in two processes."""

import os
import subprocess
import sys

import pytest
import yaml
from small_recipe import SMALL


@pytest.mark.slow
def test_a_recipe_runs_in_two_processes(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "out")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "prefixvlm", "train", str(path), "--stages", "0,1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = sorted((tmp_path / "out").glob("stage-*"))
    assert [folder.name for folder in folders] == ["stage-0", "stage-1"]
    for folder in folders:
        names = {file.name for file in folder.iterdir()}
        assert {"model.safetensors", "history.json", "loss.png", "modeling_prefix_vlm.py", "tokenizer.json"} <= names
