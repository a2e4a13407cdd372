"""Evaluation at the end of a run, and the recipe that leads to Table VI."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.evaluation.paper_results import METRICS
from prefixvlm.train.recipes.schema import load_recipe, parse_recipe
from prefixvlm.train.training.final_evaluation import final_evaluation

UCM = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ucm_captions"
SPLITS = ("train", "train", "restval", "restval", "val", "test", "test")
ON_A_CPU = ["bf16=false", "workers=0", "save_steps=0", "gradient_checkpointing=false"]


def karpathy(rows: list[tuple[str, str, list[str]]], name: str) -> dict:
    """Karpathy's form of (split, file name, captions)."""
    images = [
        {"filename": file, "imgid": number, "split": split, "sentences": [{"raw": text} for text in texts]}
        for number, (split, file, texts) in enumerate(rows)
    ]
    return {"dataset": name, "images": images}


@pytest.fixture
def start(tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def small(tmp_path):
    rows = []
    for number, split in enumerate(SPLITS):
        Image.effect_noise((16, 16), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
        rows.append((split, f"{number}.png", [f"picture {number}", f"noise of {number}"]))
    path = tmp_path / "dataset_small.json"
    path.write_text(json.dumps(karpathy(rows, "small")))
    return path


def captions(start, data: Path, *further: str) -> list[str]:
    overrides = [f"model.start={start}", f"stages.2.data.path={data}", *ON_A_CPU, "stages.2.batch_size=4"]
    overrides += ["stages.2.device_batch_size=4", "stages.2.max_steps=2", "test.max_new_tokens=5"]
    return ["train", "captions", *overrides, f"output={start.parent / 'out'}", *further]


def test_captions_are_trained_tested_and_the_table_is_printed(start, small, capsys):
    command = captions(start, small, f"stages.2.data.images={small.parent}")
    assert main(command) == 0
    output = start.parent / "out"
    record = json.loads((output / "stage-2" / "run.json").read_text())
    assert record["samples"] == {"read": 8, "used": 8, "skipped": 0}  # two captions of each picture of train and restval
    metrics = json.loads((output / "test" / "metrics.json").read_text())
    assert set(METRICS) <= metrics["scores"].keys()
    rows = [json.loads(line) for line in (output / "test" / "predictions.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [[f"picture {n}", f"noise of {n}"] for n in (5, 6)]
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    assert [word for word in table if word in METRICS] == list(METRICS)


def test_what_was_said_by_an_earlier_model_goes_and_a_finished_one_is_asked_again(start, small, monkeypatch):
    found = []

    def asked(run):
        found.append(sorted(path.name for path in Path(run.output).glob("*")))
        Path(run.output).mkdir(exist_ok=True)
        (Path(run.output) / "predictions.jsonl").touch()

    monkeypatch.setattr("prefixvlm.train.training.final_evaluation.run_evaluation", asked)
    command = captions(start, small, f"stages.2.data.images={small.parent}")
    for further in ([], ["--resume"], ["--overwrite", "seed=1"]):
        assert main([*command, *further]) == 0
    assert found == [[], ["predictions.jsonl"], []]


def test_a_test_set_that_cannot_be_used_is_found_before_training(start, small, capsys):
    short = captions(start, small, f"stages.2.data.images={small.parent}")
    assert main([*short, "test.task=coco"]) == 2
    assert "has 2 test images where Karpathy's test split of coco has 5,000" in capsys.readouterr().err
    assert main([*short, "test.split=validation"]) == 2
    assert "validation" in capsys.readouterr().err
    assert not (start.parent / "out").exists()


def test_the_published_sets_are_known_by_the_names_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr("prefixvlm.train.training.final_evaluation.checked_examples", lambda run: [])
    for name, task in (("coco", "coco"), ("flickr8k", "flickr8k"), ("flickr30k", "flickr30k"), ("mine", "karpathy")):
        recipe = load_recipe("captions", [f"stages.2.data.path=there/dataset_{name}.json"])
        run = final_evaluation(recipe, tmp_path)
        assert (run.task, run.data, run.images) == (task, f"there/dataset_{name}.json", "coco")


def test_questions_of_another_key_are_asked_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr("prefixvlm.train.training.final_evaluation.checked_examples", lambda run: [])
    stage = {"data": {"source": "vqa", "path": "rows.jsonl", "question": "asked"}}
    values = {"model": {"start": "x"}, "stages": {3: stage}, "test": {"task": "vqa", "answer": "said"}}
    run = final_evaluation(parse_recipe(values), tmp_path)
    assert (run.data, run.keys) == ("rows.jsonl", {"question": "asked", "answer": "said"})


@pytest.mark.parametrize(
    ("stage", "test", "message"),
    [
        (0, {"task": "captions"}, "test: a model that sees later tokens cannot generate"),
        (2, {"task": "caption"}, "test.task is 'caption'; did you mean 'captions'"),
        (2, {"task": "captions", "every_steps": 2}, "test: unknown key every_steps"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(stage, test, message):
    values = {"model": {"start": "x"}, "stages": {stage: {"data": {"source": "llava"}}}, "test": test}
    with pytest.raises(ValueError, match=r"my\.yaml") as caught:
        parse_recipe(values, "my.yaml")
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not UCM.is_dir(), reason="the UCM captions are not there")
def test_ucm_captions_in_karpathys_form(start, tmp_path):
    with (UCM / "captions.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    content = karpathy([(row["split"], row["image"], row["texts"]) for row in rows], "ucm")
    data = tmp_path / "dataset_ucm.json"
    data.write_text(json.dumps(content))
    assert main(captions(start, data, f"stages.2.data.images={UCM}", "test.limit=12")) == 0
    record = json.loads((tmp_path / "out" / "stage-2" / "run.json").read_text())
    assert record["samples"]["used"] == 5 * 1680
    metrics = json.loads((tmp_path / "out" / "test" / "metrics.json").read_text())
    assert metrics["examples"] == 12
