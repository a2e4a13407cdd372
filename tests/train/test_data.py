"""Sources: what they make of their rows, and how they refuse bad ones."""

import json

import pytest
from PIL import Image

from prefixvlm.train import data, easy_vqa


def test_easy_vqa_is_whole():
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        samples = data.load("easy_vqa_conversations", split=split)
        assert len(samples) == images
        assert sum(len(sample.turns) for sample in samples) == 2 * questions


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("what color is the circle?", "red")], ("red", "circle")),
        ([("is there a teal shape?", "yes")], ("teal", None)),
        ([("is there a teal shape?", "no")], (None, None)),
        ([("is there not a teal shape?", "no")], ("teal", None)),
        ([("is no triangle present?", "yes")], (None, None)),
        ([("is there a circle?", "no"), ("what is the blue shape?", "rectangle")], ("blue", "rectangle")),
    ],
)
def test_facts(questions, expected):
    assert easy_vqa.facts(questions) == expected


def test_facts_agree_with_the_pictures():
    # the colour of a caption is the colour of the picture's rarer pixels
    names = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "yellow": (255, 255, 0), "black": (0, 0, 0)}
    checked = 0
    for sample in data.load("easy_vqa_captions", split="train")[:200]:
        color = sample.caption.split()[1]
        if color in names:
            counts = sorted(Image.open(sample.images[0]).convert("RGB").getcolors(4096))
            shape = counts[-2][1]
            nearest = min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(names[name], shape, strict=True)))
            checked += nearest == color
    assert checked > 60


def test_captions_name_known_facts_only():
    captions = {sample.caption for sample in data.load("easy_vqa_captions", split="train")}
    shapes, colors = set(easy_vqa.SHAPES), set(easy_vqa.COLORS)
    for caption in captions:
        words = caption.split()
        assert words[0] == "a"
        assert set(words[1:]) <= shapes | colors | {"shape"}
    # both, a colour, a shape, or neither where all that was asked was answered no
    assert len(captions) == 8 * 3 + 8 + 3 + 1


def write_llava(tmp_path, rows, name="data.json"):
    (tmp_path / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    return str(path)


ROW = {
    "id": "1",
    "image": "pictures/a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}],
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_rows(tmp_path, name):
    (sample,) = data.load("llava", path=write_llava(tmp_path, [ROW], name))
    assert sample.turns == [("user", "What?"), ("assistant", "A square.")]
    assert sample.caption == "A square."
    assert sample.images == [str(tmp_path / "pictures" / "a.png")]
    assert sample.name.endswith("row 1")


def test_llava_rows_without_an_image_and_from_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": (tmp_path / "x").write_bytes(b"") or b"no image", "path": "in.png"}
    rows = [{"id": "1", "image": image, "conversations": ROW["conversations"]}] * 2
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    samples = data.load("llava", path=str(folder))
    assert len(samples) == 2
    assert samples[1].images[0]["bytes"] == b"no image"
    text_only = {"conversations": ROW["conversations"]}
    assert data.load("llava", path=write_llava(tmp_path, [text_only]))[0].images == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "conversations": None}], "row 1: `conversations`"),
        ([ROW, {**ROW, "conversations": [{"from": "robot", "value": "x"}]}], "row 2: `conversations`"),
        ([{**ROW, "image": "../outside.png"}], "row 1: the image ../outside.png lies outside"),
        ([{**ROW, "image": "/etc/passwd"}], "lies outside"),
        (["text"], "row 1: it is not a JSON object"),
        ({"a": 1}, "expected a list of objects"),
    ],
)
def test_bad_llava_rows_are_named(tmp_path, rows, message):
    path = write_llava(tmp_path, rows)
    with pytest.raises(ValueError, match=r"data\.json") as caught:
        list(data.load("llava", path=path))
    assert message in str(caught.value)


def test_bad_sources(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for options, message in (
        ({"source": "coco"}, "no data source 'coco'"),
        ({"source": "llava"}, "wrong options"),
        ({"source": "llava", "path": "nowhere.json"}, "there is no such file"),
        ({"source": "llava", "path": str(tmp_path / "bad.json")}, "is not valid JSON"),
        ({"source": "llava", "path": write_llava(tmp_path, [])}, "has no rows"),
        ({"source": "easy_vqa_captions", "split": "val"}, "no split 'val'"),
    ):
        with pytest.raises(ValueError, match=r"\w") as caught:
            data.load(**options)
        assert message in str(caught.value)
