"""lmms-eval's own evaluator runs a local task on a saved folder, and its answers are those of our own generation."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny import tiny_model, tiny_processor

from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation.answering import answer

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see docs/LMMS_EVAL.md")
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

from prefixvlm.train.evaluation.lmms_eval import NAME, register

MAX_NEW_TOKENS = 6
QUESTIONS = ["which colour is it?", "which?", "a much longer question, so that the others are padded?", "and so?", "why?"]

# JSON is YAML, too
TASK = {
    "dataset_path": "parquet",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_visual": "image",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A picture of noise for each question."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{number}.png") for number in range(len(QUESTIONS))]
    for path in paths:
        PILImage.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()).save(path)
    return paths


@pytest.fixture(scope="module")
def ours(images):
    """What the model answers when we ask it, one question at a time."""
    questions = [
        Conversation.about([image], [("user", question)], "") for image, question in zip(images, QUESTIONS, strict=True)
    ]
    answers = answer(tiny_model(), tiny_processor(), questions, batch_size=1, max_new_tokens=MAX_NEW_TOKENS)
    assert len(set(answers)) > 1  # else a mixed-up order would not show
    return answers


@pytest.fixture
def evaluate(folder, images, tmp_path, monkeypatch):
    """lmms-eval on the questions with given reference answers: the share it counts as right, and what the model said."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    register()

    def run(references, generation_kwargs):
        rows = {"image": images, "question": QUESTIONS, "answer": references}
        features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
        task = {
            **TASK,
            "task": "local",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "test.parquet")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "generation_kwargs": generation_kwargs,
        }
        (tmp_path / "task").mkdir()
        (tmp_path / "task" / "local.yaml").write_text(json.dumps(task))
        results = evaluator.simple_evaluate(
            model=NAME,
            model_args=f"pretrained={folder}",
            tasks=["local"],
            task_manager=TaskManager("ERROR", str(tmp_path / "task"), include_defaults=False, model_name=NAME),
            batch_size=2,
            device="cpu",
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
        return results["results"]["local"]["exact_match,none"], [sample["resps"][0][0] for sample in samples]

    return run


def test_the_answers_are_those_of_our_own_generation(evaluate, ours):
    references = [*ours[:-1], "something else"]
    share, answers = evaluate(references, {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0})
    assert [text.strip() for text in answers] == ours
    assert share == pytest.approx(1 - 1 / len(QUESTIONS))


def test_an_answer_ends_before_what_the_task_stops_at(evaluate, ours):
    stop = ours[0][2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "temperature": 1.0, "until": ["", stop]}
    _, answers = evaluate(ours, settings)
    assert [text.strip() for text in answers] == [text.partition(stop)[0].strip() for text in ours]


def test_a_setting_of_other_models_is_left_out(evaluate, ours):
    _, answers = evaluate(ours, {"max_new_tokens": MAX_NEW_TOKENS, "image_aspect_ratio": "pad"})
    assert [text.strip() for text in answers] == ours


def test_a_warm_task_samples(evaluate, ours):
    _, answers = evaluate(ours, {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, "temperature": 50.0})
    assert [text.strip() for text in answers] != ours
