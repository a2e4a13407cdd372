"""No sample is lost silently: rows read = rows trained on + rows reported, and bad data stops a run."""

import json
from collections import Counter
from dataclasses import replace
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
from prefixvlm.train.data.screening import Screened, Screening, screen

ROWS = 40
BAD = {  # row: what is wrong with it
    3: "no such image file",
    7: "cannot be read as an image",
    11: "lies outside",
    19: "`answer` is missing",
    23: "not valid JSON",
    31: "tokens, the limit is",
}
CUT = 7  # whose header is intact, so that only decoding shows it


@pytest.fixture
def rows(tmp_path) -> Path:
    Image.new("RGB", (40, 40), "green").save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])
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
    assert unseen.indices == [index for index in range(ROWS) if index + 1 not in BAD or index + 1 == CUT]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_bad_row_is_found_and_named(rows, workers):
    samples = sources.load("vqa", path=str(rows))
    screened = screen(samples, ConversationCollator(tiny_processor(), "conversation"), 300, workers)
    assert len(screened.indices) + len(screened.skipped) == len(samples) == ROWS
    assert {index + 1 for index in screened.indices} == set(range(1, ROWS + 1)) - set(BAD) | {CUT}
    for index, name, reason in screened.skipped:
        assert name == samples.name(index)
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
        samples = encoded(self, conversations)
        seen.update(one.turns[-1].text for one in conversations if not one.is_padding_sample)
        return samples

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


def test_nothing_is_decoded_or_tokenized_before_training(rows, monkeypatch):
    monkeypatch.setattr("prefixvlm.processing.images_prefix_vlm._to_rgb", lambda image: pytest.fail("decoded"))
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    monkeypatch.setattr(ConversationCollator, "lengths", lambda *_: pytest.fail("tokenized"))
    assert len(screen(samples, collator).indices) == ROWS - len(BAD) + 2  # nor are samples too long, with no limit


@pytest.mark.parametrize("text_format", ["caption", "conversation"])
def test_lengths_need_no_pixels(rows, text_format):
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), text_format)
    chosen = [samples[index] for index in (0, 1, 4)]
    expected = [(len(one), int((one.labels != -100).sum())) for one in collator.encoded(chosen)]
    gone = [one.with_images(["gone.jpg"]) for one in chosen]
    assert collator.lengths(gone) == expected


def test_a_sample_that_fails_in_training_becomes_a_padding_sample(rows):
    samples = sources.load("vqa", path=str(rows))
    strict, padding = (ConversationCollator(tiny_processor(), "conversation", pad_failures=pad) for pad in (False, True))
    chosen = [replace(samples[index], seed=f"0.0.{index}") for index in (CUT - 2, CUT - 1, CUT)]
    with pytest.raises(ValueError, match=r"cut.jpg cannot be read"):
        strict(chosen)
    batch = padding(chosen)
    ((seed, name, reason),) = batch.pop("failed")
    assert (seed, name) == (f"0.0.{CUT - 1}", samples.name(CUT - 1))
    assert "cut.jpg" in reason
    assert (batch["labels"][1] == -100).all()
    assert not (batch["input_ids"][1] == tiny_processor().image_token_id).any()
    others = strict([chosen[0], chosen[2]])
    assert batch["pixel_values"].equal(others["pixel_values"])
    for name in ("input_ids", "labels"):
        assert batch[name][[0, 2]].equal(others[name])


def test_a_sample_beyond_the_decoders_context_is_found_by_its_size(rows, monkeypatch):
    samples = sources.load("vqa", path=str(rows))
    collator = ConversationCollator(tiny_processor(), "conversation", context=300)
    measured, lengths = [], ConversationCollator.lengths

    def counting(self, conversations):
        measured.extend(conversations)
        return lengths(self, conversations)

    monkeypatch.setattr(ConversationCollator, "lengths", counting)
    screened = screen(samples, collator)
    (reason,) = (reason for index, _, reason in screened.skipped if index == 30)
    assert "tokens, the decoder reads at most 300" in reason
    assert len(measured) == 1
    assert not screened.lengths
    assert screen(samples, collator, 10_000).indices == screened.indices


def test_a_size_that_deceives_is_found_in_training(rows, monkeypatch):
    monkeypatch.setattr(ConversationCollator, "may_be_too_long", lambda *_: False)
    samples = sources.load("vqa", path=str(rows))
    collator = ConversationCollator(tiny_processor(), "conversation", context=300, pad_failures=True)
    assert 30 in screen(samples, collator).indices
    batch = collator([samples[29], samples[30]])
    assert "the decoder reads at most 300" in batch["failed"][0][2]
    assert batch["input_ids"].shape[1] < 300


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_knows_the_decoders_context(rows, streaming):
    changes = ["stages.3.max_length=null", "model.text.max_position_embeddings=300"]
    assert main(["train", recipe(rows, streaming, max_skipped=0.5), *changes]) == 0
    assert "the decoder reads at most 300" in reported(rows.parent / "out" / "stage-3")[31]


def test_a_run_knows_the_decoders_sliding_window(rows, capsys):
    changes = ["stages.3.max_length=null", "model.text.use_sliding_window=true", "model.text.sliding_window=300"]
    command = ["train", recipe(rows, max_skipped=0.5), *changes, "model.text.max_window_layers=0"]
    assert main([*command, "stages.3.max_tokens_per_row=400"]) == 2
    assert "max_tokens_per_row is 400, more than the sliding window of 300 tokens" in capsys.readouterr().err
    assert main([*command, "stages.3.max_tokens_per_row=300"]) == 0
    assert "the decoder reads at most 300" in reported(rows.parent / "out" / "stage-3")[31]


def test_one_failing_sample_in_every_epoch_counts_once(rows):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0], lines[CUT - 1], *lines[7:10]]) + "\n")
    assert main(["train", recipe(rows, max_skipped=0.2), "stages.3.epochs=3", "stages.3.batch_size=2"]) == 0
    lines = [json.loads(line) for line in (rows.parent / "out" / "stage-3" / "skipped.jsonl").read_text().splitlines()]
    assert [line["sample"].rpartition("row ")[2] for line in lines] == ["2"] * 3
    assert len({line["occurrence"] for line in lines}) == 3
    record = json.loads((rows.parent / "out" / "stage-3" / "run.json").read_text())
    assert record["samples"] == {"read": 5, "used": 4, "skipped": 1}


def test_failures_in_training_count_towards_max_skipped(rows, capsys):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[7:10], lines[CUT - 1]]) + "\n")
    assert main(["train", recipe(rows, max_skipped=0.2), "stages.3.epochs=2", "logging_steps=1"]) == 2
    assert "1 of 4 samples cannot be used, more than the 20.00% that max_skipped allows" in capsys.readouterr().err


def test_shares_of_processes_make_the_whole(rows):
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    whole = screen(samples, collator, 300)
    shares = [screen(samples, collator, 300, state=Process(rank)) for rank in range(3)]
    assert {len(share.indices) + len(share.skipped) for share in shares} == {13, 14}
    assert Screened.joined(shares) == whole


def test_processes_meet_while_they_screen(rows, monkeypatch):
    monkeypatch.setattr(screening, "BARRIER_EVERY", 5)
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    monkeypatch.setattr(screening, "BATCH", 4)
    met = []
    for rank in range(3):
        process = Process(rank)
        screen(samples, collator, state=process)
        met.append(process.met)
    assert met == [ROWS // 15] * 3  # each as often as the others, or one would wait forever


def test_a_verdict_is_kept_for_resume_alone(rows, tmp_path, monkeypatch):
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    first = Screening(tmp_path / "kept").verdict(samples, collator, 300, False)
    calls = []
    monkeypatch.setattr(screening, "screen", lambda *_: calls.append(1) or first)
    resumed = Screening(tmp_path / "kept", resume=True)
    assert resumed.verdict(samples, collator, 300, False) == first
    assert not calls
    resumed.verdict(samples, collator, 200, False)  # another question
    Screening(tmp_path / "kept").verdict(samples, collator, 300, False)  # another run, whose images may be others
    assert len(calls) == 2


def test_a_verdict_that_stops_the_run_is_not_kept(rows, tmp_path):
    samples, collator = sources.load("vqa", path=str(rows)), ConversationCollator(tiny_processor(), "conversation")
    Screening(tmp_path / "kept", limit=0.01).verdict(samples, collator, 300, False)
    assert not (tmp_path / "kept").exists()


class Process:
    """One of three processes, as accelerate tells it."""

    num_processes = 3

    def __init__(self, rank: int):
        self.process_index, self.met = rank, 0

    def wait_for_everyone(self) -> None:
        self.met += 1
