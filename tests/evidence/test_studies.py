"""Every kind of job of `make evidence` runs, on a handful of rows and for a step or two, and measures what it says."""

import json

import pytest
from PIL import Image

from evidence import backbones, studies
from evidence.studies import Workspace
from prefixvlm.train.data import easy_vqa

TWO_STEPS = {0: 1, 1: 1, 2: 1, 3: 2}
ARMS = {"prefix": ("prefix", TWO_STEPS), "causal": ("causal", TWO_STEPS), "single-stage": ("prefix", {3: 2})}


def write(folder, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures(folder, count: int) -> list[str]:
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((20, 20), 60).convert("RGB").save(folder / "images" / f"{number}.png")
    return [f"images/{number}.png" for number in range(count)]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    """Data of the forms that the studies read, of a few rows each, and studies of a few steps."""
    given = tmp_path / "given"
    said = ["There is a piece of farmland .", "Many houses stand near a road ."]
    rows = [
        {"image": image, "texts": said, "class_by_index": "forest", "split": "test" if number > 5 else "train"}
        for number, image in enumerate(pictures(given / "ucm_captions", 8))
    ]
    write(given / "ucm_captions", "captions.jsonl", rows)
    rows = [
        {"image": image, "texts": said, "machine_texts": {"a": "a road", "b": "a house"}, "split": "val2017"}
        for image in pictures(given / "coco_photos", 4)
    ]
    write(given / "coco_photos", "captions.jsonl", rows)
    rows = [{"human": said, "machine": {"a": "a road", "b": ""}} for _ in range(8)]
    write(given / "human_vs_machine_text", "coco_captions_paired.jsonl", rows)
    for name in studies.TEXT_SETS[1:]:
        write(given / "human_vs_machine_text", f"{name}.jsonl", [{"human": said[0] * 9, "ai": said[1]}] * 3)
    asked = [("Is it normal?", "Yes", "CLOSED"), ("Where?", "left lung", "OPEN")]
    rows = [
        {
            "image": image,
            "organ": ("HEAD", "CHEST", "ABD")[number % 3],
            "question": question,
            "answer": reply,
            "answer_type": kind,
        }
        for number, image in enumerate(pictures(given / "vqa_rad", 16))
        for question, reply, kind in asked
    ]
    write(given / "vqa_rad", "qa.jsonl", rows)
    real = easy_vqa.questions_by_image
    monkeypatch.setattr(easy_vqa, "questions_by_image", lambda split: dict(list(real(split).items())[:12]))
    for module, name, value in (
        (studies, "UCM_ARMS", ARMS),
        (studies, "EASY_STEPS", TWO_STEPS),
        (studies, "EASY_QUESTIONS", 60),
        (studies, "PAIR_STEPS", 3),
        (studies, "TALK_STEPS", {1: 1, 3: 3}),
        (studies.data, "TALKS", {"train": 24, "test": 12}),
        (studies, "NOISE_STEPS", 2),
        (studies, "COCO_STEPS", {1: 5, 2: 5}),
        (studies.data, "TWO_IMAGE_QUESTIONS", 240),
        (studies, "BATCH", 4),
        (backbones, "BATCH", 4),
    ):
        monkeypatch.setattr(module, name, value)
    train_encoder, train_decoder = backbones.train_encoder, backbones.train_decoder

    def short_encoder(pairs, tokenizer, steps, *rest, **options):
        return train_encoder(pairs, tokenizer, 2, *rest, **options)

    def short_decoder(texts, tokenizer, steps, *rest, **options):
        return train_decoder(texts, tokenizer, 2, *rest, **options)

    monkeypatch.setattr(backbones, "train_encoder", short_encoder)
    monkeypatch.setattr(backbones, "train_decoder", short_decoder)
    found = Workspace(given, tmp_path / "out")
    studies.prepare(found)
    return found


@pytest.mark.slow
def test_every_study_runs(workspace):
    studies.ucm_backbones(workspace)
    studies.easy_backbones(workspace)
    for kind in studies.DECODERS:
        studies.text_decoder(workspace, kind)

    for arm in ARMS:
        result = studies.ucm(workspace, arm, seed=0)
        assert result["CIDEr"] >= 0
        assert result["teraflops"] > 0
        assert set(result["losses"]) == set(ARMS[arm][1])
    same = studies.ucm(workspace, "prefix", seed=0, mode="prefix_all_images")
    assert same["weights_sha256"] == studies.ucm(workspace, "prefix", seed=0)["weights_sha256"]
    assert same["weights_sha256"] != studies.ucm(workspace, "causal", seed=0)["weights_sha256"]

    for mode in ("prefix", "causal"):
        assert 0 <= studies.easy(workspace, mode, seed=0)["overall_accuracy"] <= 100
    pairs = [studies.pairs(workspace, mode, seed=0) for mode in ("prefix", "causal", "prefix_all_images")]
    assert len({one["weights_sha256"] for one in pairs}) == 3

    studies.rad_backbones(workspace)
    for name in ("easy", "rad"):
        talks = [studies.talks(workspace, name, mode, seed=0) for mode in ("prefix", "causal", "prefix_all_images")]
        assert len({one["weights_sha256"] for one in talks}) == 3
        assert all(0 <= one["second_overall"] <= 100 for one in talks)

    noised = studies.noise(workspace, 0.4, "projector", seed=0)
    assert noised["target_visible"] != noised["target_noised"]
    assert studies.noise(workspace, 0.0, "everything", seed=0)["prefix_mask"] > 0
    assert studies.coco(workspace, "machine", seed=0)["last_loss"] < studies.coco(workspace, "human", seed=0)["first_loss"]
    reports = studies.texts(workspace, "neutral")["reports"]
    assert set(reports) == set(studies.TEXT_SETS)
    assert reports["coco"]["pairs"][0]["rows"] == 4


@pytest.mark.parametrize("name", ["easy", "rad"])
def test_talks_ask_about_the_pictures_that_were_shown(workspace, name):
    seen = {}
    for split in ("train", "test"):
        rows = studies.data.lines(workspace.data / name / f"talks-{split}.jsonl")
        assert len(rows) == studies.data.TALKS[split]
        for row in rows:
            shown: list[str] = []
            for turn in row["messages"][::2]:
                *_, asked = turn["content"]
                shown += [part["image"] for part in turn["content"] if part["type"] == "image"]
                place, _, question = asked["text"].partition(": ")
                assert studies.data.PLACES.index(place) < len(shown)
                assert question
            assert len(set(shown)) == 3
            seen.setdefault(split, set()).update(shown)
    assert not seen["train"] & seen["test"]


def test_an_answer_of_a_talk_is_that_of_its_picture(workspace):
    rows = studies.data.lines(workspace.given / "vqa_rad" / "qa.jsonl")
    parts = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
    organs = {row["image"].partition("/")[2].removesuffix(".png"): parts[row["organ"]] for row in rows}
    checked = 0
    for row in studies.data.lines(workspace.data / "rad" / "talks-train.jsonl"):
        shown: list[str] = []
        for turn, reply in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            shown += [part["image"] for part in turn["content"] if part["type"] == "image"]
            place, _, question = turn["content"][-1]["text"].partition(": ")
            if question == studies.data.PART:
                image = shown[studies.data.PLACES.index(place)]
                assert reply["content"] == organs[image.removeprefix("train-").removesuffix(".png")]
                checked += 1
    assert checked > 10
