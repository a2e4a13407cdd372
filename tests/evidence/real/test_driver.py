"""`python -m evidence.real` runs what is not done, job by job, and refuses in a sentence what it cannot use."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from evidence.data import write_lines
from evidence.real import __main__ as driver
from evidence.real import report
from prefixvlm.train.recipes.schema import load_recipe
from prefixvlm.train.recipes.stages import PAPER_STAGES


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
    write_lines(folder / driver.CAPTIONS, rows)
    question = {"image": "images/0.jpg", "question": "Is it?", "answer": "no", "answer_type": "CLOSED"}
    write_lines(folder / driver.ANSWERS, [question | {"split": split} for split in ("train", "test")])
    for name in driver.HALVES:
        (driver.BUILD / name).mkdir(parents=True)
        (driver.BUILD / name / "conversion.json").write_text(json.dumps({"package": f"{name} 1"}))
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
            output = Path(next(one for one in arguments if one.startswith("output=")).removeprefix("output="))
            for number in driver.STAGES:
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

    monkeypatch.setattr(driver, "prefixvlm", prefixvlm)
    return run


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evidence.real", *map(str, arguments), "--report", "REAL.md"])
    return driver.main()


def test_finished_jobs_are_kept_and_the_page_is_filled(given, commands, monkeypatch):
    assert main(monkeypatch, "--data", given) == 0
    assert [command[0] for command in commands] == ["train"] + ["evaluate"] * 5
    commands.clear()
    assert main(monkeypatch, "--data", given, "--seeds", 2) == 0
    assert sum(command[0] == "train" for command in commands) == 1
    assert "seed=1" in commands[0]
    commands.clear()
    assert main(monkeypatch, "--data", given, "--seeds", 2) == 0
    assert not commands
    page = Path("REAL.md").read_text()
    assert '`make real REAL_DATA=folder REAL_ARGS="--seeds 2"`' in page
    assert str(given) not in page + Path("real/results.json").read_text()


def test_a_job_that_failed_is_tried_again_and_said_so(given, commands, monkeypatch, capsys):
    run = driver.prefixvlm

    def fails(arguments, log):
        if "vqa" in arguments:
            raise ValueError("it broke")
        return run(arguments, log)

    monkeypatch.setattr(driver, "prefixvlm", fails)
    assert main(monkeypatch, "--data", given) == 1
    assert capsys.readouterr().err == "python -m evidence.real: it broke\n"
    assert not driver.RESULTS.exists()


def test_arms_differ_by_their_image_tokens(given, commands, monkeypatch):
    assert main(monkeypatch, "--data", given, "--arms", "64", "256", "16", "--set", "stages.2.max_steps=5") == 0
    trained = [command for command in commands if command[0] == "train"]
    assert all(set(driver.ARMS[arm]) <= set(command) for arm, command in zip(("64", "256", "16"), trained, strict=True))
    assert all("stages.2.max_steps=5" in command for command in trained)
    assert len({command[-2] for command in trained}) == 3  # outputs


def test_a_result_of_another_recipe_is_refused(given, commands, monkeypatch, capsys):
    assert main(monkeypatch, "--data", given) == 0
    assert main(monkeypatch, "--data", given, "--set", "bf16=false") == 1
    assert "is of another recipe or other settings; remove it and build/real/runs/64/0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("given/vqa_rad/qa.jsonl", "has no vqa_rad/qa.jsonl; docs/REAL.md says"),
        ("build/real/smollm2/conversion.json", "There is no build/real/smollm2; `make real` converts it"),
        ("REAL.md", "There is no page REAL.md"),
    ],
)
def test_what_is_missing_is_said_before_any_work(gone, message, given, commands, monkeypatch, capsys):
    Path(gone).unlink()
    if "smollm2" in gone:
        Path(gone).parent.rmdir()
    assert main(monkeypatch, "--data", given) == 1
    assert message in capsys.readouterr().err
    assert not commands


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`prefixvlm train` failed \(prefixvlm train: There is no recipe no-such"):
        driver.prefixvlm(["train", "no-such"], tmp_path / "logs" / "train.log")


def test_a_command_is_measured(tmp_path):
    seconds, peak = driver.prefixvlm(["train", "--help"], tmp_path / "train.log")
    assert 0 < seconds < 600
    assert 0.005 < peak < 8  # GiB


def test_masks_noise_and_what_trains_are_the_papers():
    recipe = load_recipe(str(driver.RECIPE))
    assert list(recipe.stages) == list(PAPER_STAGES)
    for number, paper in PAPER_STAGES.items():
        stage = recipe.stages[number].stage
        for kept in ("attention_mode", "text_format", "noise", "trains"):
            assert getattr(stage, kept) == getattr(paper, kept)
    paths = [recipe.stages[number].data["path"] for number in (0, 1, 2)]
    paths += [part["path"] for part in recipe.stages[3].data["parts"]]
    captions, answers = (str(driver.GIVEN / name) for name in (driver.CAPTIONS, driver.ANSWERS))
    assert paths == [captions] * 3 + [str(driver.QUESTIONS), answers]
    for changes in driver.ARMS.values():
        load_recipe(str(driver.RECIPE), changes)
