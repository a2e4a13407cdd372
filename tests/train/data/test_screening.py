"""No sample is lost silently: rows read = rows trained on + rows reported, and bad data stops a run."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_recipe import SMALL
from tiny import tiny_processor, tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.train.data import screening, sources
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.screening import screen

ROWS = 40
BAD = {  # row: what is wrong with it
    3: "no such image file",
    7: "cannot be read as an image",
    11: "lies outside",
    19: "`answer` must be a text",
    23: "not valid JSON",
    31: "tokens, the limit is",
}


@pytest.fixture
def rows(tmp_path) -> Path:
    Image.new("RGB", (40, 40), "green").save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    lines = []
    for number in range(1, ROWS + 1):
        row = {"image": "good.jpg", "question": f"Which number, {number}?", "answer": f"number {number}"}
        row |= {3: {"image": "gone.jpg"}, 7: {"image": "cut.jpg"}, 11: {"image": "../good.jpg"}}.get(number, {})
        row |= {19: {"answer": None}, 31: {"answer": "long " * 100}}.get(number, {})
        lines.append("{" if number == 23 else json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


def recipe(rows: Path, streaming: bool = False, **settings) -> str:
    tiny_tokenizer().save_pretrained(rows.parent / "tokenizer")
    source = {"source": "vqa", "path": str(rows), "streaming": streaming}
    stage = {"data": source, "batch_size": 4, "device_batch_size": 2, "max_length": 300, "vision_tower_lr": 1e-3}
    stage |= {"max_steps": 9} if streaming else {}
    values = {"model": {**SMALL["model"], "tokenizer": str(rows.parent / "tokenizer")}, "stages": {3: stage}}
    path = rows.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output": str(rows.parent / "out"), **settings}))
    return str(path)


def reported(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    return {int(line["sample"].rpartition("row ")[2]): line["reason"] for line in lines}


def test_a_progress_bar_switched_off_changes_nothing(rows, monkeypatch):
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    seen = screen(samples, collator, 300)
    # a bar that is switched off counts nothing, which once made each batch the first
    monkeypatch.setattr(screening, "tqdm", partial(screening.tqdm, disable=True))
    unseen = screen(samples, collator, 300)
    assert unseen == seen
    assert unseen.indices == [index for index in range(ROWS) if index + 1 not in BAD]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_bad_row_is_found_and_named(rows, workers):
    samples = sources.load("vqa", path=str(rows))
    screened = screen(samples, ConversationCollator(tiny_processor(), "conversation"), 300, workers)
    assert len(screened.indices) + len(screened.skipped) == len(samples) == ROWS
    assert [index + 1 for index in screened.indices] == [number for number in range(1, ROWS + 1) if number not in BAD]
    for name, reason in screened.skipped:
        assert BAD[int(name.rpartition("row ")[2])] in reason


def test_sizes_are_those_of_the_batch(rows):
    samples = sources.load("vqa", path=str(rows))
    collator = ConversationCollator(tiny_processor(), "conversation")
    screened = screen(samples, collator, 300)
    for place in (0, 9, -1):
        batch = collator([samples[screened.indices[place]]])
        assert screened.lengths[place] == batch["input_ids"].shape[1]
        assert screened.supervised[place] == (batch["labels"] != -100).sum()
        assert screened.images[place] == len(batch["pixel_values"])


def test_rows_in_are_rows_trained_and_rows_reported(rows, monkeypatch):
    seen = Counter()
    encoded = ConversationCollator.encoded

    def counting(self, conversations):
        # those of training have a seed, those of screening not
        seen.update(sample.turns[-1][1] for sample in conversations if sample.seed is not None)
        return encoded(self, conversations)

    monkeypatch.setattr(ConversationCollator, "encoded", counting)
    assert main(["train", recipe(rows, max_skipped=0.2)]) == 0
    folder = rows.parent / "out" / "stage-3"
    found = reported(folder)
    assert all(BAD[number] in found[number] for number in BAD)
    assert seen == Counter(f"number {number}" for number in range(1, ROWS + 1) if number not in found)
    record = json.loads((folder / "run.json").read_text())
    assert record["samples"] == {"read": ROWS, "used": ROWS - len(BAD), "skipped": len(BAD)}


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_bad_rows_stop_the_run(rows, streaming, capsys, monkeypatch):
    monkeypatch.setattr("prefixvlm.train.data.screening.FIRST_VERDICT", 10)
    assert main(["train", recipe(rows, streaming)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "samples cannot be used, more than the 1.00% that max_skipped allows" in error
    assert "skipped.jsonl" in error
    assert not (rows.parent / "out" / "stage-3").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_reports_its_bad_rows_and_goes_on(rows, workers):
    assert main(["train", recipe(rows, streaming=True, max_skipped=0.5, workers=workers)]) == 0
    found = reported(rows.parent / "out" / "stage-3")
    assert all(BAD[number] in found[number] for number in BAD)


def test_nothing_to_train_on(rows, capsys):
    rows.write_text("{\n{\n")
    assert main(["train", recipe(rows, max_skipped=1.0)]) == 2
    assert "has no sample to train on" in capsys.readouterr().err
