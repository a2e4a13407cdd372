"""Clean processes: transformers, torch and pillow, but not this package and not what only its training needs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

PROGRAM = Path(__file__).with_name("clean_process.py")
TRAINING_ONLY = ["prefixvlm", "datasets", "matplotlib", "accelerate", "peft", "tensorboard", "hypothesis", "pytest"]


@pytest.fixture(scope="session")
def measure():
    """What a model says of two questions; see clean_process.py."""
    return runpy.run_path(str(PROGRAM))["measure"]


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="session")
def run_clean(tmp_path_factory, photo):
    """Runs a job of clean_process.py in a process of its own, in an empty folder."""

    def run(job: dict, python: str = sys.executable) -> dict:
        folder = tmp_path_factory.mktemp("clean")
        (folder / "job.json").write_text(json.dumps({"blocked": TRAINING_ONLY, "image": photo, "folders": {}, **job}))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
        command = [python, str(PROGRAM), "job.json", "result.pt"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(folder / "result.pt")

    return run
