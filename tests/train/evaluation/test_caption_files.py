import json
import os
import subprocess
import sys

import pytest

from prefixvlm.cli import main
from prefixvlm.train.evaluation.metrics.coco_caption.scores import caption_scores

IMAGES = [3, 1, 2]
CAPTIONS = {1: ["a dog runs", "dogs"], 2: ["two cats sleep"], 3: ["a man on a horse", "a rider"]}
PREDICTED = {1: "a dog sleeps", 3: "a man on a horse"}


def predictions(content=None):
    return [{"image_id": image, "caption": caption} for image, caption in (content or PREDICTED).items()]


def references(images=IMAGES, captions=CAPTIONS):
    annotations = [{"image_id": image, "caption": caption} for image, found in captions.items() for caption in found]
    return {"images": [{"id": image} for image in images], "annotations": annotations}


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Runs the command on contents, JSON or bytes; gives the exit code, what it printed and its complaints."""
    monkeypatch.chdir(tmp_path)

    def run(predicted, captions, *options):
        for name, content in (("p.json", predicted), ("r.json", captions)):
            if content is not None:
                (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        code = main(["score", "p.json", "r.json", *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_scores_are_those_of_the_predicted_images(score):
    code, out, err = score(predictions(), references(), "--metrics", "CIDEr, Bleu_1", "--intervals")
    result = json.loads(out)
    intervals = result.pop("intervals")
    direct = caption_scores([PREDICTED[3], PREDICTED[1]], [CAPTIONS[3], CAPTIONS[1]], ["Bleu_1", "CIDEr"]).scores
    assert code == 0
    assert result == {"images": 2, "images_without_prediction": 1, **direct}
    assert err == "1 of the 3 images in r.json have no prediction in p.json; only the other 2 are scored.\n"
    for name, (low, high) in intervals.items():
        assert low <= direct[name] <= high
    assert list(intervals) == ["Bleu_1", "CIDEr"]


def test_whole_files_are_scored_in_silence(score):
    everything = dict.fromkeys(IMAGES, "a dog")
    code, out, err = score(predictions(everything), references(), "--metrics", "ROUGE_L")
    assert (code, err, list(json.loads(out))) == (0, "", ["images", "ROUGE_L"])


@pytest.mark.parametrize(
    ("predicted", "captions", "says"),
    [
        (None, references(), ["p.json cannot be read", "give a JSON file"]),
        (b"{", references(), ["p.json is not JSON"]),
        (b"\xff\xfe\xfa", references(), ["p.json is not JSON"]),
        (b"[" * 200_000, references(), ["p.json is not JSON"]),
        (references(), predictions(), ["p.json holds an object", "predictions are a list"]),
        (predictions(), predictions(), ["r.json holds a list", "references are"]),
        ([], references(), ["p.json is an empty list", "at least one"]),
        ([7], references(), ["p.json: [0] is a number"]),
        ([{"caption": "a"}], references(), ["p.json: [0] has no number or string at 'image_id'"]),
        ([{"image_id": 1, "caption": None}], references(), ["p.json: [0] has no string at 'caption'"]),
        (
            [*predictions(), *predictions({1: "b"})],
            references(),
            ["p.json: [2]", "second prediction for image 1", "keep one"],
        ),
        (predictions({1: "a", 9: "b"}), references(), ["p.json: [1]", "image 9", "r.json", "remove it"]),
        (predictions({"1": "a"}), references(), ["p.json: [0]", "image '1'"]),
        (predictions({4: "a"}), references([4]), ["r.json: image 4 has no annotation", "add a reference"]),
        (predictions(), {"images": []}, ["r.json has no list, or an empty one, at 'images'"]),
        (predictions(), {"images": [{"id": 1}]}, ["at 'annotations'"]),
        (predictions(), {**references(), "images": [{"id": [1]}]}, ["r.json: images[0] has no number or string at 'id'"]),
        (predictions(), {**references(), "annotations": [{"image_id": 1}]}, ["r.json: annotations[0] has no string"]),
    ],
)
def test_bad_files_are_said_in_one_line(score, predicted, captions, says):
    code, out, err = score(predicted, captions)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in says), err


def test_an_unknown_metric_is_said(score):
    code, out, err = score(predictions(), references(), "--metrics", "BLEU")
    assert (code, out) == (2, "")
    assert "choose from Bleu_1" in err


def test_without_pycocoevalcap_the_extra_is_named(score, monkeypatch):
    for module in ("caption_files", "metrics.coco_caption.scores"):
        monkeypatch.delitem(sys.modules, f"prefixvlm.train.evaluation.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu", None)
    code, _, err = score(predictions(), references())
    assert code == 2
    assert "pip install 'prefixvlm[eval]'" in err


def test_the_command_does_without_torch_and_evaluate(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(predictions()))
    (tmp_path / "r.json").write_text(json.dumps(references()))
    script = (
        "import sys; from prefixvlm.cli import main; code = main(['score', 'p.json', 'r.json', '--metrics', 'Bleu_4']); "
        "sys.exit(code or bool({'torch', 'evaluate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2


CHINESE = ["一只狗在草地上奔跑", "两只猫在睡觉"]


@pytest.mark.parametrize(
    ("captions", "predicted", "notes"),
    [
        ({1: ["a dog runs fast"]}, {1: "a dog runs fast"}, ["CIDEr: 0 by construction, since there is only one image"]),
        (
            {1: ["a dog runs fast"], 2: ["a dog runs fast"]},
            {1: "a dog runs fast", 2: "a dog"},
            ["CIDEr: 0 by construction, since all images have the same references"],
        ),
        (
            {1: [CHINESE[0]], 2: [CHINESE[1]]},
            {1: CHINESE[0], 2: CHINESE[1]},
            ["Bleu_2, Bleu_3, Bleu_4: 0 by construction", "All scores take a caption without blanks"],
        ),
        ({1: ["a dog runs fast"], 2: ["two cats sleep"]}, {1: "nothing", 2: "at all"}, []),
    ],
)
def test_scores_that_no_prediction_could_raise_are_named(score, captions, predicted, notes):
    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr")
    code, out, _ = score(predictions(predicted), references(list(captions), captions), "--metrics", ",".join(names))
    result = json.loads(out)
    assert code == 0
    found = result.get("notes", [])
    assert len(found) == len(notes)
    for note, begins in zip(found, notes, strict=True):
        assert note.startswith(begins)
        for name in names:
            if f"{name}:" in note or f"{name}," in note:
                assert result[name] < 1e-3, name
