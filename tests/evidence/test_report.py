"""The page of evidence says what the results say, for and against the paper, and keeps what was written by hand."""

import json
import random
import re

import pytest

from evidence import backbones, report, studies
from evidence.page import PLACE
from evidence.results import Results

SCORES = ("overall_accuracy", "yes_no_accuracy", "open_accuracy", "CIDEr", "Bleu_4", "class_accuracy", *report.TALK_SCORES)
MODES = ("prefix", "causal", "prefix_all_images")


def run(level: float, draw: random.Random, stages=("0", "1", "2", "3")) -> dict:
    losses = [{"step": 5 * step, "loss": 3 / step, "loss_noised": 4 / step, "loss_clean": 2 / step} for step in (1, 2, 3)]
    return {
        **dict.fromkeys(SCORES, level + draw.random() / 100),
        "losses": dict.fromkeys(stages, losses),
        "teraflops": 3.0,
        "weights_sha256": "same",
        "job_seconds": 60.0,
    }


def results(prefix: float, causal: float, machine: float = -0.5) -> dict[str, dict]:
    draw = random.Random(0)
    made = {"command": "make", "minutes": 12.0, "cpu_minutes": 20.0, "machine": "2 cores", "versions": {"torch": "2.13.0"}}
    found = {"run": made}
    for seed in range(3):
        for study in ("easy", "pairs"):
            for mode in MODES if study == "pairs" else MODES[:2]:
                found[f"{study}/{mode}/{seed}"] = run(causal if mode == "causal" else prefix, draw)
        for mode in MODES:
            for name in ("easy", "rad"):
                found[f"talks/{name}/{mode}/{seed}"] = run(causal if mode == "causal" else prefix, draw)
        for arm in studies.UCM_ARMS:
            found[f"ucm/{arm}/{seed}"] = run(prefix if arm == "prefix" else causal, draw)
        for writer in ("human", "machine"):
            loss = 2.0 + draw.random() / 100 + (machine if writer == "machine" else 0.0)
            found[f"coco/{writer}/{seed}"] = run(1.0, draw) | {"first_loss": loss, "last_loss": loss}
        for trained in ("projector", "everything"):
            for noise in studies.NOISES:
                # only where everything trains without noise is a hidden target much dearer than one that can be seen
                gap = 3.0 if trained == "everything" and not noise else 0.1
                own = {"target_visible": 1.0, "target_noised": 1.0 + gap + draw.random() / 100, "prefix_mask": 1.5}
                found[f"noise/{trained}/{noise}/{seed}"] = run(1.0, draw) | own
    for study in ("easy", "ucm"):
        found[f"{study}/prefix_all_images/0"] = run(prefix, draw)
    sets = {w: {"loss": 2.0, "loss_per_character": 0.5, "loss_interval": [1.9, 2.1]} for w in ("human", "machine")}
    for decoder in studies.DECODERS:
        pair = {"rows": 9, "difference": machine, "difference_interval": [-1.0, 1.0], "p_value": 0.001, "share_lower": 0.7}
        found[f"texts/{decoder}"] = {"reports": {"coco": {"sets": sets, "pairs": [pair]}}}
    return found


DRAW = report.figures.draw


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with the committed one's prose; figures take seconds, and are drawn only where a test puts `DRAW` back."""
    monkeypatch.setattr(report.figures, "draw", lambda *given: None)
    page = tmp_path / "EVIDENCE.md"
    page.write_text(report.PAGE.read_text())
    return page


def cells(page, table: str) -> list[list[str]]:
    """The rows of one table, without its head."""
    body = page.read_text().partition(f"<!-- table: {table} -->")[2].partition("<!-- /table -->")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def prose(page) -> str:
    return PLACE.sub("", page.read_text())


@pytest.mark.parametrize(
    ("prefix", "causal", "verdict"),
    [(60.0, 50.0, "holds here"), (50.0, 60.0, "the opposite holds here"), (50.0, 50.0, "no difference shown")],
)
def test_a_claim_that_does_not_hold_is_reported_so(prefix, causal, verdict, page):
    report.write(results(prefix, causal), page)
    assert [row[-1] for row in cells(page, "masks")] == [f"**{verdict}**"] * 3
    assert cells(page, "stages")[-1][-1] == f"**{verdict}**"


def test_texts_and_noise_are_judged_by_their_own_numbers(page):
    report.write(results(60.0, 50.0, machine=0.5), page)
    assert cells(page, "texts")[0][7] == "**higher**"
    assert cells(page, "convergence")[-1][2].startswith("-0.50")
    assert [row[-1] for row in cells(page, "short-cut")] == ["**no difference shown**", "**the short-cut appears**"]


def test_other_weights_under_the_same_mask_are_called_a_defect(page):
    found = results(60.0, 50.0)
    report.write(found, page)
    assert [row[1] for row in cells(page, "same-weights")] == ["the same bit for bit"] * 2
    found["ucm/prefix_all_images/0"]["weights_sha256"] = "other"
    report.write(found, page)
    assert "which is a defect" in cells(page, "same-weights")[1][1]


def test_without_the_given_data_the_rest_is_written_and_said_so(page, monkeypatch):
    monkeypatch.setattr(report.figures, "draw", DRAW)
    found = {name: one for name, one in results(60.0, 50.0).items() if name.startswith(("easy", "pairs", "run"))}
    report.write(found, page)
    assert page.read_text().count("Not run") == 10
    assert "evidence/losses.png" not in page.read_text()
    assert sorted(path.name for path in (page.parent / "evidence").iterdir()) == ["masks.png", "results.json"]


def test_every_figure_on_the_page_is_drawn(page, monkeypatch):
    monkeypatch.setattr(report.figures, "draw", DRAW)
    report.write(results(60.0, 50.0), page)
    shown = re.findall(r"\(evidence/(\w+\.png)\)", page.read_text())
    assert sorted(shown) == sorted(path.name for path in (page.parent / "evidence").glob("*.png"))
    assert len(shown) == 6


def test_writing_twice_changes_nothing(page):
    report.write(results(60.0, 50.0), page)
    before = page.read_bytes(), (page.parent / "evidence" / "results.json").read_bytes()
    report.write(results(60.0, 50.0), page)
    assert before == (page.read_bytes(), (page.parent / "evidence" / "results.json").read_bytes())


def test_another_number_changes_its_table_and_leaves_the_prose_alone(page):
    words, found = prose(page), results(60.0, 50.0)
    report.write(found, page)
    before = {name: cells(page, name) for name in report.TABLES}
    for run in (found[f"noise/everything/0.4/{seed}"] for seed in range(3)):
        run["prefix_mask"] += 1
    report.write(found, page)
    assert {name for name in before if cells(page, name) != before[name]} == {"noise"}
    assert prose(page) == words


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- table: noise -->", "<!-- table: nose -->", "place for a table 'nose'; the tables are run, "),
        ("<!-- table: noise -->", "", "no place for the table 'noise'; give it one: <!-- table: noise -->"),
        ("<!-- table: noise -->", "<!-- table: run -->", "several places for the table 'run'"),
        ("<!-- /table -->\n\n## The same", "## The same", "the table 'short-cut' has no end"),
        ("<!-- /table -->", "", "the table 'run' has no end"),
    ],
)
def test_a_page_whose_places_are_not_those_of_the_tables_is_refused_untouched(old, new, message, page):
    page.write_text(page.read_text().replace(old, new, 1))
    before = page.read_bytes()
    with pytest.raises(ValueError, match=message):
        report.write(results(60.0, 50.0), page)
    assert page.read_bytes() == before
    assert not (page.parent / "evidence").exists()


def test_without_a_page_the_error_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"There is no page .*marks the tables' places"):
        report.check(tmp_path / "EVIDENCE.md")


def test_the_committed_page_says_what_the_committed_results_say(page):
    found = json.loads((report.PAGE.parent / "evidence" / "results.json").read_text())
    report.fill(page, Results(found))
    assert page.read_text() == report.PAGE.read_text()


def test_the_prose_names_the_sizes_of_the_studies(page):
    words = " ".join(prose(page).split())
    patches = (backbones.VISION["image_size"] // backbones.VISION["patch_size"]) ** 2
    for size in (
        f"stages, steps and {len(studies.SEEDS)} seeds",
        f"encoder of {backbones.VISION['num_hidden_layers']} layers on {patches} patches",
        f"decoder of {backbones.DECODER['num_hidden_layers']} layers, both of width {backbones.DECODER['hidden_size']}",
        f"one image ({studies.EASY_QUESTIONS:,} test questions",
        f"{studies.TWO_IMAGES:,} test questions)",
        f"{studies.NOISE_STEPS} steps on UCM captions, {len(studies.NOISE_SEEDS)} seeds",
    ):
        assert size in words


def test_a_study_run_by_itself_says_how_and_keeps_the_others(page):
    found = results(60.0, 50.0)
    report.write(found, page)
    before = {name: cells(page, name) for name in report.TABLES}
    alone = {name: one for name, one in results(70.0, 50.0).items() if name.startswith("talks/")}
    alone["run/talks"] = {**found["run"], "command": "python -m evidence --only talks"}
    report.write(report.kept(page) | alone, page, has_curves=False)
    assert cells(page, "talks-run")[0][0] == "`python -m evidence --only talks`"
    changed = {name for name in before if cells(page, name) != before[name]}
    assert changed == {"talks-run", "talks-easy", "talks-rad"}
