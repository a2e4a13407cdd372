"""The page of evidence says what the results say, for and against the paper."""

import random

import pytest

from evidence import report, studies

SCORES = ("overall_accuracy", "yes_no_accuracy", "open_accuracy", "CIDEr", "Bleu_4", "class_accuracy")
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
    found = {}
    for seed in range(3):
        for study in ("easy", "pairs"):
            for mode in MODES if study == "pairs" else MODES[:2]:
                found[f"{study}/{mode}/{seed}"] = run(causal if mode == "causal" else prefix, draw)
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


def written(found: dict, tmp_path) -> str:
    report.write(found, tmp_path / "EVIDENCE.md", 12.0, "python -m evidence")
    return (tmp_path / "EVIDENCE.md").read_text()


@pytest.mark.parametrize(
    ("prefix", "causal", "verdict"),
    [(60.0, 50.0, "holds here"), (50.0, 60.0, "the opposite holds here"), (50.0, 50.0, "no difference shown")],
)
def test_a_claim_that_does_not_hold_is_reported_so(prefix, causal, verdict, tmp_path):
    page = written(results(prefix, causal), tmp_path)
    for name in ("easy-VQA", "easy-VQA, two images", "UCM captions"):
        assert f"- {name}: **{verdict}**" in page
    assert f"- all four stages against one single stage: **{verdict}**" in page


def test_texts_and_noise_are_judged_by_their_own_numbers(tmp_path):
    page = written(results(60.0, 50.0, machine=0.5), tmp_path)
    assert "coco (neutral prose): higher" in page
    assert "human - machine -0.50" in page
    alone, everything = page.partition("- everything trained without noise")[::2]
    assert "**no difference shown**" in alone.partition("the projector alone trained without noise")[2]
    assert "**the short-cut appears**" in everything


def test_other_weights_under_the_same_mask_are_called_a_defect(tmp_path):
    found = results(60.0, 50.0)
    assert "the same bit for bit" in written(found, tmp_path)
    found["ucm/prefix_all_images/0"]["weights_sha256"] = "other"
    assert "which is a defect" in written(found, tmp_path)


def test_without_the_given_data_the_rest_is_written_and_said_so(tmp_path):
    found = {name: one for name, one in results(60.0, 50.0).items() if name.startswith(("easy", "pairs"))}
    page = written(found, tmp_path)
    assert "were not run" in page
    assert "UCM captions:" not in page
    assert sorted(path.name for path in (tmp_path / "evidence").iterdir()) == ["masks.png", "results.json"]
