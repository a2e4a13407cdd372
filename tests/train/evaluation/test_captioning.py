"""`prefixvlm caption`: a row for each picture, in order, whatever happens on the way."""

import csv
import json

import datasets
import pytest
from PIL import Image
from tiny import save_tiny

from prefixvlm.cli import main
from prefixvlm.inference.asking import caption_inputs, generate_texts, prompt_inputs, user_messages
from prefixvlm.inference.loading import load
from prefixvlm.train.evaluation import captioning

TOKENS = 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five pictures in folders, and a sixth that is none."""
    folder = tmp_path / "photos"
    for number in range(5):
        path = folder / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 50 + number).convert("RGB").save(path)
    (folder / "1" / "5.jpg").write_bytes(b"no picture")
    (folder / "notes.md").write_text("of a walk")
    return folder


def caption(saved, data, output, *further) -> int:
    arguments = ["--output", str(output), "--max-new-tokens", str(TOKENS), "--batch-size", "2", "--dtype", "float32"]
    return main(["caption", str(saved), str(data), *arguments, *further])


def expected(saved, paths, prompt=None) -> list[str]:
    """The captions of pictures, each by itself."""
    model, processor = load(str(saved))
    inputs = [
        prompt_inputs(processor, [user_messages([path], prompt)]) if prompt else caption_inputs(processor, [[path]])
        for path in map(str, paths)
    ]
    return [generate_texts(model, processor, one, max_new_tokens=TOKENS)[0].strip() for one in inputs]


def rows_of(table) -> list[dict]:
    if table.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(table), keep_in_memory=True).to_list()
    if table.suffix == ".jsonl":
        return [json.loads(line) for line in table.read_text().splitlines()]
    with table.open(newline="") as file:
        return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("suffix", captioning.SUFFIXES)
def test_a_folder_of_pictures(saved, photos, tmp_path, suffix, capsys):
    table = tmp_path / f"captions{suffix}"
    assert caption(saved, photos, table) == 0
    assert f"Saved 6 rows to {table}; 1 pictures cannot be used" in capsys.readouterr().out
    rows = rows_of(table)
    names = ["0/0.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png", "1/5.jpg"]
    assert [row["image"] for row in rows] == names
    assert [row["caption"] or "" for row in rows[:5]] == expected(saved, [photos / name for name in names[:5]])
    assert rows[5]["caption"] is None
    assert "cannot" in rows[5]["error"]
    assert all(row["error"] is None for row in rows[:5])
    assert sorted(path.name for path in tmp_path.iterdir()) == [table.name, "photos"]


def test_rows_that_name_pictures_and_a_question(saved, photos, tmp_path):
    rows = tmp_path / "rows.jsonl"
    given = [
        {"shot": "0/0.png"},
        {"shot": "gone.png"},
        {"shot": None},
        {"shot": "1/1.png"},
        {"shot": ["0/2.png", "0/4.png"]},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    table = tmp_path / "said.jsonl"
    options = ["--images", str(photos), "--image", "shot", "--prompt", "what?"]
    assert caption(saved, rows, table, *options) == 0
    found = rows_of(table)
    assert [row["image"] for row in found] == ["0/0.png", "gone.png", f"{rows}, row 3", "1/1.png", f"{rows}, row 5"]
    assert [found[0]["caption"], found[3]["caption"]] == expected(saved, [photos / "0/0.png", photos / "1/1.png"], "what?")
    assert [row["error"] is None for row in found] == [True, False, False, True, True]


def test_a_run_that_was_interrupted_goes_on(saved, photos, tmp_path, monkeypatch, capsys):
    table, whole = tmp_path / "captions.jsonl", tmp_path / "whole.jsonl"
    assert caption(saved, photos, whole) == 0
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_texts(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(captioning, "generate_texts", interrupted)
        assert caption(saved, photos, table) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "prefixvlm: stopped; the same command goes on from there."
    assert not table.exists()
    assert caption(saved, photos, table, "--prompt", "what?") == 2
    assert "other settings of prompt" in capsys.readouterr().err
    asked = []

    def counted(model, processor, inputs, **options):
        asked.append(len(inputs["input_ids"]))
        return generate_texts(model, processor, inputs, **options)

    monkeypatch.setattr(captioning, "generate_texts", counted)
    assert caption(saved, photos, table) == 0
    assert sum(asked) == 3  # two of five were done
    assert table.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("data", "output", "further", "sentence"),
    [
        ("photos", "captions.txt", [], "must end in .parquet, .jsonl or .csv"),
        ("photos", "there.csv", [], "is there already"),
        ("nothing", "a.csv", [], "nothing"),
        ("photos", "a.csv", ["--image", "image"], "leave --image and --images out"),
        ("photos", "a.csv", ["--num-beams", "0"], "--num-beams is 0; it must be at least 1"),
        ("empty", "a.csv", [], "has no pictures"),
    ],
)
def test_what_cannot_be_used_is_one_line(saved, photos, tmp_path, data, output, further, sentence, capsys):
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "empty").mkdir()
    assert caption(saved, tmp_path / data, tmp_path / output, *further) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert sentence in line
    assert (tmp_path / "there.csv").read_text() == ""
