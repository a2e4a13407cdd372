"""`prefixvlm inspect`: what it says of a data set is what training would make of it."""

import json

import pytest
from PIL import Image
from tiny import tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.data import sources
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.screening import screen

ROWS = [
    {
        "image": ["a.png", "a.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "Not this.", "loss": False},
            {"from": "human", "value": "And <image>"},
            {"from": "gpt", "value": "A <b>red</b> square."},
        ],
        "note": "of the hand",
    },
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "x"}]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
]


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path / "rows.json"


def inspected(capsys, *arguments) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_contract(data, capsys):
    found = inspected(capsys, data, "--limit", "1", "--tokenizer", data.parent / "tokenizer")
    assert {name: found[name] for name in ("format", "rows", "used", "reported", "images", "turns", "unread")} == {
        "format": "llava",
        "rows": 3,
        "used": 2,
        "reported": 1,
        "images": 2,
        "turns": 6,
        "unread": ["note"],
    }
    assert found["keys"] == {"turns": "conversations", "image": "image"}
    (problem,) = found["problems"]
    assert problem["where"] == f"{data}, row 2"
    assert problem["why"].startswith("the user's turns have 2 <image>, but the row has 1")
    (sample,) = found["samples"]
    image = {"type": "image", "image": str(data.parent / "a.png")}
    assert [turn["content"] for turn in sample["turns"]] == [
        [image, {"type": "text", "text": "What?"}],
        [{"type": "text", "text": "Not this."}],
        [{"type": "text", "text": "And"}, image],
        [{"type": "text", "text": "A <b>red</b> square."}],
    ]
    assert sample["images"] == [image["image"]] * 2
    assert sample["text"].startswith("<|image_pad|><|im_start|>user\nWhat?<|im_end|>")
    assert "And<|image_pad|><|im_end|>" in sample["text"]
    assert sample["supervised"] == ["A <b>red</b> square.<|im_end|>"]


def test_it_counts_what_training_counts(data, capsys):
    found = inspected(capsys, data, "--limit", "9", "--tokenizer", data.parent / "tokenizer")
    collator = ConversationCollator(tiny_processor(), "conversation")
    verdict = screen(sources.load("auto", path=str(data)), collator, measure=True)
    assert found["conversations"] == len(verdict.indices) == len(found["samples"])
    assert found["images"] == sum(verdict.images)
    text_only = found["samples"][1]  # the other's images have more tokens than the tiny model's
    assert text_only["tokens"] == verdict.lengths[1]


def test_a_page_of_text_marks_what_is_learnt(data, capsys):
    assert main(["inspect", str(data)]) == 0
    out = capsys.readouterr().out
    assert "Format llava; keys read: conversations (turns), image; not read: note" in out
    assert "3 rows: 2 used, 1 reported; 2 samples, 2 images, 6 turns" in out
    assert "\n⟦A <b>red</b> square.<|im_end|>⟧" in out
    assert "⟦Not" not in out


def test_a_page_of_text_shows_the_first_problems_and_counts_the_others(data, capsys):
    data.write_text(json.dumps([{"question": "?", "answer": "x"}] * 23))
    assert main(["inspect", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.count("there is no image") == 20
    assert "and 3 more, which --json lists" in out


def test_a_page_with_pictures(data, capsys):
    page = data.parent / "page.html"
    assert main(["inspect", str(data), "--html", str(page)]) == 0
    content = page.read_text(encoding="utf-8")
    assert content.count('<img alt="" src="data:image/png;base64,') == 2
    assert "<mark>A &lt;b&gt;red&lt;/b&gt; square.&lt;|im_end|&gt;</mark>" in content


def test_options_of_the_source(data, capsys):
    rows = [{"photo": "a.png", "ask": "What?", "say": "Red."}, {"ask": "2+2?", "say": "4"}]
    data.write_text(json.dumps(rows))
    keys = ("--source", "vqa", "--key", "image=photo", "--key", "question=ask", "--key", "answer=say")
    assert inspected(capsys, data, *keys)["used"] == 1
    assert inspected(capsys, data, *keys, "--key", "allow_text_only=true")["used"] == 2


def test_captions_are_learnt_whole(data, capsys):
    data.write_text(json.dumps([{"image": "a.png", "captions": ["One.", "Two."]}]))
    found = inspected(capsys, data)
    assert (found["format"], found["rows"], found["conversations"], found["images"]) == ("captions", 1, 2, 1)
    assert [sample["supervised"] for sample in found["samples"]] == [["One.<|endoftext|>"], ["Two.<|endoftext|>"]]


def test_nothing_predicts_the_first_token_of_a_text_alone(data, capsys):
    data.write_text(json.dumps([{"captions": ["One."]}]))
    (sample,) = inspected(capsys, data, "--key", "allow_text_only=true")["samples"]
    assert sample["text"] == "One.<|endoftext|>"
    assert sample["supervised"] == ["ne.<|endoftext|>"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.json"], "there is no such file"),
        (["rows.json", "--source", "lava"], "did you mean 'llava'?"),
        (["rows.json", "--key", "photo=a"], "photo"),
        (["rows.json", "--key", "photo"], "must have the form"),
        (["rows.json", "--limit", "-1"], "--limit is -1"),
        (["rows.json", "--tokenizer", "gone"], "gone"),
        (["rows.json", "--images", "gone"], "there is no such folder"),
        (["rows.json", "--html", "gone/page.html"], "gone"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert main(["inspect", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefixvlm ")]
    assert len(lines) == 1
    assert says in lines[0]
