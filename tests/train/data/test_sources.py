"""Sources: what they make of their rows, indexed and streamed, and how they refuse bad ones."""

import io
import json

import pytest
from PIL import Image

from prefixvlm.processing.images_prefix_vlm import load_image
from prefixvlm.train.data import easy_vqa, sources

datasets = pytest.importorskip("datasets")

LLAVA_ROW = {
    "id": "1",
    "image": "pictures/a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}],
}
TEXT_TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A square."}]
VQA_ROW = {"image": "pictures/a.png", "question": "Where?", "answer": "Left lung"}
CAPTIONS_ROW = {"image": "pictures/a.png", "texts": ["One.", "Two."]}
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {"filename": "a.png", "split": "train", "sentences": [{"raw": "A dog runs."}, {"raw": "Dog."}], "sentids": [0, 1]},
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "A cat."}], "sentids": [2]},
        {"filename": "a.png", "filepath": "deep", "split": "restval", "sentences": [{"raw": "Deep."}], "sentids": [3]},
    ],
}


def png(color="red", size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for place in ("pictures", "pictures/deep"):
        (tmp_path / place).mkdir()
        for name in "ab":
            (tmp_path / place / f"{name}.png").write_bytes(png())
    return tmp_path


def write_rows(folder, rows, name="data.json") -> str:
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return str(folder / name)


def write_parquet(path, rows, image_column="image") -> None:
    path.parent.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if image_column in table.column_names:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    table.to_parquet(path)


def everything(samples) -> list:
    """The conversations of a source, streamed or not."""
    if sources.is_stream(samples):
        return [make() for _, make in samples.epoch("0")]
    return [samples[index] for index in range(len(samples))]


def texts(samples) -> list[str]:
    return sorted(sample.caption for sample in everything(samples))


def test_easy_vqa_is_whole():
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        samples = sources.load("easy_vqa_conversations", split=split)
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
    for sample in sources.load("easy_vqa_captions", split="train")[:200]:
        color = sample.caption.split()[1]
        if color in names:
            counts = sorted(Image.open(sample.images[0]).convert("RGB").getcolors(4096))
            shape = counts[-2][1]
            nearest = min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(names[name], shape, strict=True)))
            checked += nearest == color
    assert checked > 60


def test_captions_name_known_facts_only():
    captions = {sample.caption for sample in sources.load("easy_vqa_captions", split="train")}
    shapes, colors = set(easy_vqa.SHAPES), set(easy_vqa.COLORS)
    for caption in captions:
        words = caption.split()
        assert words[0] == "a"
        assert set(words[1:]) <= shapes | colors | {"shape"}
    # both, a colour, a shape, or neither where all that was asked was answered no
    assert len(captions) == 8 * 3 + 8 + 3 + 1


def test_questions_that_need_the_picture_come_first():
    for sample in sources.load("easy_vqa_conversations", split="train")[:200]:
        verdicts = [text in ("yes", "no") for role, text in sample.said if role == "assistant"]
        assert verdicts == sorted(verdicts, reverse=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_rows(folder, name, streaming):
    path = write_rows(folder, [LLAVA_ROW, {"id": 7, "conversations": TEXT_TURNS}], name)
    first, second = sorted(
        everything(sources.load("llava", path=path, streaming=streaming)), key=lambda sample: sample.name
    )
    assert first.said == [("user", "What?"), ("assistant", "A square.")]
    assert first.images == [str(folder / "pictures" / "a.png")]
    assert first.name.endswith("row 1")
    assert second.images == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("spelling", ["folder", "glob", "file"])
def test_parquet_rows_with_and_without_images(folder, spelling, streaming):
    image = {"bytes": png("blue"), "path": "in.png"}
    rows = [{**LLAVA_ROW, "image": image}, {"id": "2", "image": None, "conversations": TEXT_TURNS}]
    write_parquet(folder / "set" / "train-00000-of-00001.parquet", rows)
    paths = {"folder": "set", "glob": "set/*.parquet", "file": "set/train-00000-of-00001.parquet"}
    samples = everything(sources.load("llava", path=str(folder / paths[spelling]), streaming=streaming))
    assert sorted(len(sample.images) for sample in samples) == [0, 1]
    (picture,) = next(sample.images for sample in samples if sample.images)
    assert load_image(picture).getpixel((0, 0)) == (0, 0, 255)


def test_the_split_of_a_folder_is_told_by_file_names(folder):
    for split in ("train", "test"):
        row = {**VQA_ROW, "answer": split, "image": {"bytes": png(), "path": None}}
        write_parquet(folder / "set" / f"{split}-00000-of-00001.parquet", [row])
    assert texts(sources.load("vqa", path=str(folder / "set"), split="test")) == ["test"]
    assert texts(sources.load("vqa", path=str(folder / "set"), split="train+test")) == ["test", "train"]
    with pytest.raises(ValueError, match="no split 'val'"):
        sources.load("vqa", path=str(folder / "set"), split="val")


@pytest.mark.parametrize("streaming", [False, True])
def test_vqa_rows(folder, streaming):
    rows = [{**VQA_ROW, "split": "train"}, {**VQA_ROW, "answer": "No", "split": "test"}, {**VQA_ROW, "answer": "none"}]
    path = write_rows(folder, rows, "qa.jsonl")
    assert texts(sources.load("vqa", path=path, streaming=streaming)) == ["Left lung", "none"]
    assert texts(sources.load("vqa", path=str(folder), split="test", streaming=streaming)) == ["No", "none"]
    other = write_rows(folder, [{"image": "pictures/a.png", "q": "What?", "a": "That"}], "other.jsonl")
    (sample,) = everything(sources.load("vqa", path=other, question="q", answer="a", streaming=streaming))
    assert sample.said == [("user", "What?"), ("assistant", "That")]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_text_is_a_sample(folder, streaming):
    path = write_rows(folder, [CAPTIONS_ROW, {"image": "pictures/b.png", "texts": "Three."}], "captions.jsonl")
    samples = everything(sources.load("captions", path=path, streaming=streaming))
    assert sorted(sample.caption for sample in samples) == ["One.", "Three.", "Two."]
    assert {sample.name for sample in samples} == {f"{path}, row {r}, text {t}" for r, t in ((1, 1), (1, 2), (2, 1))}


def test_karpathy_splits(folder):
    path = write_rows(folder, KARPATHY, "dataset_flickr8k.json")
    options = {"path": path, "images": str(folder / "pictures")}
    assert texts(sources.load("karpathy", **options)) == ["A dog runs.", "Dog."]
    assert texts(sources.load("karpathy", split="train+restval", **options)) == ["A dog runs.", "Deep.", "Dog."]
    (deep,) = everything(sources.load("karpathy", split="restval", **options))
    assert deep.images == [str(folder / "pictures" / "deep" / "a.png")]
    for sample in everything(sources.load("karpathy", split="test", **options)):
        load_image(sample.images[0])


def test_lines_end_at_newlines_only(folder):
    # a line separator inside a JSON text is no end of a line
    text = "one\u2028two\u0085three\x0b"
    (folder / "x.jsonl").write_text(json.dumps({"image": "pictures/a.png", "texts": [text]}, ensure_ascii=False) + "\n\n")
    assert texts(sources.load("captions", path=str(folder / "x.jsonl"))) == [text.strip()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("llava", {**LLAVA_ROW, "conversations": None}, "`conversations` is missing"),
        ("llava", {**LLAVA_ROW, "conversations": [{"from": "robot", "value": "x"}]}, "a turn is by 'robot'"),
        ("llava", {**LLAVA_ROW, "conversations": [{"from": "gpt", "value": {}}]}, "a text was expected"),
        ("llava", {**LLAVA_ROW, "conversations": [{"from": "human", "value": "x"}]}, "there is no text to learn"),
        ("llava", {**LLAVA_ROW, "image": ""}, "`image` is empty"),
        ("llava", {**LLAVA_ROW, "image": "../outside.png"}, "../outside.png lies outside"),
        ("llava", {**LLAVA_ROW, "image": "/etc/passwd"}, "/etc/passwd lies outside"),
        ("llava", {**LLAVA_ROW, "image": "pictures/../../x.png"}, "lies outside"),
        ("llava", {**LLAVA_ROW, "image": "C:\\x.png"}, "lies outside"),
        ("llava", {**LLAVA_ROW, "image": {"bytes": None, "path": "/etc/passwd"}}, "lies outside"),
        ("llava", {**LLAVA_ROW, "images": ["pictures/a.png", "../b.png"], "image": None}, "lies outside"),
        ("vqa", {**VQA_ROW, "answer": None}, "`answer` is missing"),
        ("vqa", {"image": "pictures/a.png", "answer": "x"}, "`question` is missing"),
        ("vqa", {**VQA_ROW, "answer": "  "}, "there is no text to learn"),
        ("captions", {"image": "pictures/a.png"}, "`texts` is missing"),
        ("captions", {"image": "pictures/a.png", "texts": []}, "`texts` is empty"),
        ("captions", {"image": "pictures/a.png", "texts": [{}]}, "a text was expected"),
        ("vqa", ["no object"], "not a JSON object"),
    ],
)
def test_bad_rows_are_named_and_leave_the_others(folder, source, row, message, streaming):
    good = {"llava": LLAVA_ROW, "vqa": VQA_ROW, "captions": CAPTIONS_ROW}[source]
    path = write_rows(folder, [good, row, good], "rows.jsonl")
    samples = sources.load(source, path=path, streaming=streaming)
    if streaming:
        makers = dict(samples.epoch("0"))
    else:
        makers = {samples.name(index): (lambda index=index: samples[index]) for index in range(len(samples))}
    bad = [name for name in makers if "row 2" in name]
    assert len(bad) == 1
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2") as caught:
        makers[bad[0]]()
    assert message in str(caught.value)
    for name in set(makers) - set(bad):
        assert makers[name]().caption


@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_that_is_no_json_is_one_bad_row(folder, streaming):
    path = folder / "x.jsonl"
    path.write_text(json.dumps(VQA_ROW) + '\n{"image": \n' + json.dumps(VQA_ROW) + "\n")
    samples = sources.load("vqa", path=str(path), streaming=streaming)
    outcomes = [make for _, make in samples.epoch("0")] if streaming else [lambda i=i: samples[i] for i in range(3)]
    problems = []
    for make in outcomes:
        try:
            make()
        except ValueError as error:
            problems.append(str(error))
    assert len(problems) == 1
    assert "row 2: it is not valid JSON" in problems[0]


def test_mixture_keeps_weights_and_loses_nothing(folder):
    small = write_rows(folder, [{**VQA_ROW, "answer": f"s{i}"} for i in range(10)], "small.jsonl")
    large = write_rows(folder, [{**VQA_ROW, "answer": f"l{i}"} for i in range(100)], "large.jsonl")
    parts = [{"source": "vqa", "path": small, "weight": 1}, {"source": "vqa", "path": large, "weight": 3}]
    answers = texts(sources.load("mixture", parts=parts))
    assert set(answers) == {f"s{i}" for i in range(10)} | {f"l{i}" for i in range(100)}
    share = sum(answer.startswith("s") for answer in answers) / len(answers)
    assert share == pytest.approx(1 / 4, abs=0.01)
    counts = [answers.count(f"s{i}") for i in range(10)]
    assert max(counts) - min(counts) <= 1
    mixed = sources.load("mixture", parts=parts)
    assert mixed.name(0) == f"{small}, row 1"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_of_a_mixture_follows_its_weights(folder, streaming):
    paths = [write_rows(folder, [VQA_ROW] * 4, name) for name in ("a.jsonl", "b.jsonl")]

    def fingerprint(*weights):
        parts = [
            {"source": "vqa", "path": path, "weight": weight, "streaming": streaming}
            for path, weight in zip(paths, weights, strict=True)
        ]
        return sources.load("mixture", parts=parts).fingerprint

    # as many samples in each case
    assert fingerprint(1, 3) == fingerprint(1, 3) != fingerprint(3, 1)


def test_mixture_of_streams_keeps_weights(folder):
    paths = {n: write_rows(folder, [{**VQA_ROW, "answer": n}] * 300, f"{n}.jsonl") for n in "ab"}
    parts = [{"source": "vqa", "path": paths[n], "weight": w, "streaming": True} for n, w in (("a", 1), ("b", 4))]
    answers = texts(sources.load("mixture", parts=parts))
    assert answers.count("a") >= 300
    assert answers.count("b") / len(answers) == pytest.approx(0.8, abs=0.05)


def test_a_stream_is_reshuffled_each_epoch_and_loses_nothing(folder):
    path = write_rows(folder, [{**VQA_ROW, "answer": str(i)} for i in range(50)], "x.jsonl")
    stream = sources.load("vqa", path=path, streaming=True, shuffle_buffer=10)
    first, again, other = ([make().caption for _, make in stream.epoch(seed)] for seed in ("0", "0", "1"))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(map(str, range(50)))
    unshuffled = sources.load("vqa", path=path, streaming=True, shuffle_buffer=1)
    assert [make().caption for _, make in unshuffled.epoch("0")] == [str(i) for i in range(50)]


def test_the_fingerprint_follows_the_rows(folder):
    prints = [
        sources.load("vqa", path=write_rows(folder, rows, name)).fingerprint
        for rows, name in (([VQA_ROW], "a.jsonl"), ([VQA_ROW], "b.json"), ([VQA_ROW] * 2, "a.jsonl"))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_bad_sources(folder):
    (folder / "bad.json").write_text("{")
    (folder / "empty").mkdir()
    good = write_rows(folder, [VQA_ROW], "good.jsonl")
    part = {"source": "vqa", "path": good}
    for options, message in (
        ({"source": "coco"}, "no data source 'coco'"),
        ({"source": "llava"}, "wrong options"),
        ({"source": "llaba"}, "no data source 'llaba'; did you mean 'llava'?"),
        ({"source": "llava", "path": good, "imges": "."}, "unknown key imges; did you mean 'images'?"),
        ({"source": "karpathy", "path": good, "question": "q"}, "unknown key question"),
        ({"source": "llava", "path": "nowhere.json"}, "there is no such file"),
        ({"source": "llava", "path": str(folder / "bad.json")}, "is not valid JSON"),
        (
            {"source": "llava", "path": write_rows(folder, {"a": 1}, "object.json")},
            "an object with the keys a; expected a list of rows",
        ),
        ({"source": "llava", "path": write_rows(folder, [], "none.json")}, "has no rows"),
        ({"source": "vqa", "path": str(folder / "*.parquet")}, "no file matches"),
        ({"source": "vqa", "path": str(folder / "empty")}, "has no .parquet"),
        ({"source": "vqa", "path": good, "images": str(folder / "nowhere")}, "no such folder of images"),
        ({"source": "vqa", "path": good, "shuffle_buffer": 3}, "is for streaming"),
        ({"source": "karpathy", "path": good, "images": str(folder)}, "`sentences` is missing"),
        ({"source": "mixture", "parts": []}, "must be a list"),
        ({"source": "mixture", "parts": [{"images": good}]}, "must be a list"),
        ({"source": "mixture", "parts": [{**part, "weight": 0}]}, "must be positive"),
        ({"source": "mixture", "parts": [part, {**part, "streaming": True}]}, "as a whole"),
        ({"source": "easy_vqa_captions", "split": "val"}, "no split 'val'"),
    ):
        with pytest.raises(ValueError, match=r"\w") as caught:
            everything(sources.load(**options))
        assert message in str(caught.value)
