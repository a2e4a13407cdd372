"""Test sets are read whole or not at all, and what is wrong with one is said in a sentence."""

import json
from dataclasses import replace

import pytest

from prefixvlm.train.evaluation import tasks
from prefixvlm.train.evaluation.tasks import TASKS
from prefixvlm.train.recipes.evaluation import TASK_NAMES, EvaluationSettings


def load_examples(task, data=None, images=None, **settings):
    return tasks.load_examples(EvaluationSettings(task=task, data=data, images=images, **settings))


def test_the_schema_names_the_tasks():
    assert tuple(TASKS) == TASK_NAMES


def saved(folder, rows, name="rows.json"):
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def karpathy(tests=3, others=2):
    rows = [
        {
            "filename": f"{number}.jpg",
            "split": "test" if number < tests else "val",
            "sentences": [{"raw": f" said {number} "}],
        }
        for number in range(tests + others)
    ]
    return {"images": rows, "dataset": "flickr8k"}


def coco(captions=("a", "b")):
    annotations = [{"image_id": 7, "caption": caption} for caption in captions]
    return {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": annotations}


def asked(example):
    return example.question.images, example.question.said, example.references


@pytest.fixture
def small_splits(monkeypatch):
    for task in ("flickr8k", "coco"):
        monkeypatch.setitem(tasks.TASKS, task, replace(TASKS[task], rows=3))


@pytest.mark.parametrize(("task", "rows"), [("flickr8k", 1000), ("flickr30k", 1000), ("coco", 5000)])
def test_published_splits_have_their_published_size(task, rows, tmp_path):
    assert len(load_examples(task, saved(tmp_path, karpathy(rows)))) == rows
    with pytest.raises(ValueError, match=rf"{rows - 1:,} test images where Karpathy's test split of {task} has {rows:,}"):
        load_examples(task, saved(tmp_path, karpathy(rows - 1)))


def test_karpathys_test_split_alone_is_read_with_images_beside_it(small_splits, tmp_path):
    examples = load_examples("flickr8k", saved(tmp_path, karpathy()))
    assert [asked(one) for one in examples] == [
        ([str(tmp_path / f"{number}.jpg")], [("user", "")], [f"said {number}"]) for number in range(3)
    ]


def test_coco_images_lie_in_folders_of_their_own(small_splits, tmp_path):
    rows = karpathy()
    for row in rows["images"]:
        row["filepath"] = "val2014"
    (tmp_path / "pictures").mkdir()
    first, *_ = load_examples("coco", saved(tmp_path, rows), str(tmp_path / "pictures"))
    assert first.question.images == [str(tmp_path / "pictures" / "val2014" / "0.jpg")]


def test_another_split_has_another_size(small_splits, tmp_path):
    assert len(load_examples("flickr8k", saved(tmp_path, karpathy()), split="val")) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_captions_of_any_file(name, tmp_path):
    rows = [{"image": "a.png", "said": ["one", "two"]}, {"image": ["b.png", "c.png"], "said": "three"}]
    first, second = load_examples("captions", saved(tmp_path, rows, name), texts="said")
    assert asked(first) == ([str(tmp_path / "a.png")], [("user", "")], ["one", "two"])
    assert asked(second) == ([str(tmp_path / "b.png"), str(tmp_path / "c.png")], [("user", "")], ["three"])
    assert first.question.name == f"{tmp_path / name}, row 1"


def test_a_prompt_asks_for_captions(tmp_path):
    (example,) = load_examples("captions", saved(tmp_path, [{"image": "a.png", "texts": "one"}]), prompt="Describe it.")
    assert example.question.said == [("user", "Describe it.")]


def test_cocos_own_captions_file(tmp_path):
    (tmp_path / "val2014").mkdir()
    (example,) = load_examples("captions", saved(tmp_path, coco()), str(tmp_path / "val2014"))
    assert asked(example) == ([str(tmp_path / "val2014" / "7.jpg")], [("user", "")], ["a", "b"])
    assert example.image_id == 7


@pytest.mark.parametrize(
    ("answer", "references"),
    [
        ("yes", ["yes"]),
        (["left", "left lung"], ["left", "left lung"]),
        ([{"answer": str(person), "answer_id": person} for person in range(10)], [str(person) for person in range(10)]),
    ],
    ids=["one", "several", "of ten people"],
)
def test_answers_in_all_their_forms(answer, references, tmp_path):
    rows = [{"image": "a.png", "q": "<image>\nwhat?", "a": answer}]
    (example,) = load_examples("vqa", saved(tmp_path, rows), question="q", answer="a")
    assert asked(example) == ([str(tmp_path / "a.png")], [("user", "what?")], references)


def test_easy_vqa_is_asked_question_by_question():
    examples = load_examples("easy_vqa")
    assert len(examples) == 9673
    assert all(len(one.question.turns) == len(one.references) == 1 for one in examples)


GOOD = {"image": "a.png", "question": "what?", "answer": "that", "texts": ["one"]}


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("captions", {"texts": None}, "`texts` is missing"),
        ("captions", {"texts": []}, "`texts` is empty"),
        ("captions", {"texts": ["one", " "]}, "a caption is empty"),
        ("captions", {"texts": ["one", {}]}, "a text was expected, not {}"),
        ("captions", {"image": None}, "there is no image"),
        ("captions", {"image": "../a.png"}, "lies outside"),
        ("vqa", {"question": " "}, "`question` is empty"),
        ("vqa", {"question": "<image>"}, "`question` is empty"),
        ("vqa", {"question": None}, "`question` is missing"),
        ("vqa", {"answer": None}, "`answer` is missing"),
        ("vqa", {"answer": []}, "`answer` is empty"),
        ("vqa", {"answer": ["yes", ""]}, "`answer` has an empty answer"),
        ("vqa", {"answer": [{"said": "yes"}]}, "a text was expected, not None"),
        ("vqa", {"images": [], "image": None}, "there is no image"),
    ],
)
def test_a_bad_row_is_named(task, change, says, tmp_path):
    path = saved(tmp_path, [GOOD, GOOD | change])
    with pytest.raises(ValueError, match="a test set must be whole") as caught:
        load_examples(task, path)
    assert str(caught.value).startswith(f"{path}, row 2: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (coco(["a", " "]), "image 7: a caption is empty"),
        (coco([]), "`texts` is missing"),
        (coco() | {"images": []}, "has no image with the id 7"),
        (coco() | {"images": [{"id": 7}]}, "has no image with the id 7"),
        (coco() | {"images": [{"id": 7, "file_name": None}]}, "has no image with the id 7"),
        (coco() | {"images": [{"id": 7, "file_name": "../7.jpg"}]}, "image 7: the image ../7.jpg lies outside"),
        (coco() | {"images": [{"id": 8, "file_name": "8.jpg"}]}, "image 8: `texts` is empty"),
        (coco() | {"annotations": [{"image_id": 7, "caption": None}]}, "a text was expected, not None"),
    ],
)
def test_a_bad_file_of_cocos_form_is_named(content, says, tmp_path):
    path = saved(tmp_path, content)
    with pytest.raises(ValueError, match=r"rows\.json") as caught:
        load_examples("captions", path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("captoins", {}, "task is 'captoins'; did you mean 'captions'?"),
        ("captions", {}, "The task captions needs data: --data"),
        ("captions", {"data": "gone.json"}, "gone.json: there is no such file"),
        ("captions", {"data": "{rows}", "split": "val"}, "'split': 'val'"),
        ("captions", {"data": "{rows}", "images": "gone"}, "gone: there is no such folder"),
        ("captions", {"data": "{rows}", "answer": "a"}, "no key for answer"),
        ("flickr8k", {"data": "{rows}"}, "`sentences` is missing"),
        ("flickr8k", {"data": "{rows}", "question": "a"}, "no key for question"),
        ("vqa", {"data": "{rows}", "prompt": "what?"}, "A prompt is for captions"),
        ("easy_vqa", {"data": "{rows}"}, "brings its own data"),
        ("easy_vqa", {"split": "val"}, "easy-VQA has no split 'val'"),
    ],
)
def test_what_cannot_be_asked_for(task, options, says, tmp_path):
    rows = saved(tmp_path, [GOOD | {"split": "test"}])
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_examples(task, **{name: value.format(rows=rows) for name, value in options.items()})
    assert says in str(caught.value)
