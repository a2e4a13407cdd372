"""Small data and halves in place of the real ones, and commands that only leave what they would."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from evidence.data import write_lines
from evidence.real import report, workspace
from evidence.real.__main__ import STAGES


def output_of(train: list[str]) -> Path:
    """The output of a `train` command: as a change to the recipe, or what the recipe says."""
    changed = [one.removeprefix("output=") for one in train if one.startswith("output=")]
    return Path(*changed or [yaml.safe_load(Path(train[1]).read_text())["output"]])


@pytest.fixture
def given(tmp_path, monkeypatch) -> Path:
    """Data of the layout that is asked for, the halves as if they had been converted, and a page to fill in."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "given"
    for name in ("ucm_captions", "vqa_rad"):
        (folder / name / "images").mkdir(parents=True)
    rows = []
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        image = f"images/{number}.jpg"
        Image.new("RGB", (8, 8)).save(folder / "ucm_captions" / image)
        rows.append({"image": image, "texts": [f"A river and {number} boats ."], "split": split, "class_by_index": "river"})
    write_lines(folder / workspace.CAPTIONS, rows)
    question = {"image": "images/0.jpg", "question": "Is it?", "answer": "no", "answer_type": "CLOSED"}
    write_lines(folder / workspace.ANSWERS, [question | {"split": split} for split in ("train", "test")])
    for name in workspace.HALVES:
        (workspace.BUILD / name).mkdir(parents=True)
        (workspace.BUILD / name / "conversion.json").write_text(json.dumps({"package": f"{name} 1"}))
    Path("REAL.md").write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands of `prefixvlm` that were run; they leave what the real ones would."""
    run: list[list[str]] = []

    def prefixvlm(arguments: list[str], log: Path) -> tuple[float, float]:
        run.append(arguments)
        options = dict(pairwise(arguments))
        if arguments[0] == "train":
            output = output_of(arguments)
            for number in STAGES:
                folder = output / f"stage-{number}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "history.json").write_text(json.dumps([{"step": 1, "loss": 2.0}]))
                (folder / "run.json").write_text(json.dumps({"steps": 1}))
        else:
            count = 2 if options["--task"] == "captions" else 1
            output = Path(options["--output"])
            output.mkdir(parents=True)
            write_lines(output / "predictions.jsonl", [{"prediction": "A river ."}] * count)
            scores = dict.fromkeys(report.SCORES, 0.5)
            (output / "metrics.json").write_text(json.dumps({"scores": scores, "intervals": {"CIDEr": [0.4, 0.6]}}))
        return 60.0, 1.5

    monkeypatch.setattr(workspace, "prefixvlm", prefixvlm)
    return run
