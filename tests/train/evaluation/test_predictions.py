"""An evaluation answers each example once, through any interruption and in any number of processes, and scores them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.evaluation import predictions
from prefixvlm.train.evaluation.answering import Decoding
from prefixvlm.train.evaluation.kept_answers import SETTINGS
from prefixvlm.train.evaluation.predictions import PREDICTIONS, evaluate, read_predictions
from prefixvlm.train.evaluation.tasks import Example

PROCESSOR = tiny_processor()
DECODING = Decoding(max_new_tokens=6, batch_size=3)
FIRST_BATCH = [2, 5, 6]  # the longest questions


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture
def examples():
    questions = ["wé", "www", "wwwwwé", "ww", "wwww", "wwwwww", "wwwww w", "w"]
    return [
        Example(
            Conversation.about([picture(index)], [("user", text)], f"row {index + 1}"), ["yes" if index % 2 else "a löwe"]
        )
        for index, text in enumerate(questions)
    ]


@pytest.fixture
def run(examples):
    """Runs an evaluation into a folder; gives the report."""
    model = tiny_model()

    def run(folder, decoding=DECODING, of=examples, **settings):
        return evaluate(model, PROCESSOR, of, "vqa", folder, decoding, {"model": "tiny", **settings})

    return run


@pytest.fixture
def asked(monkeypatch):
    """The indices that have been asked for, a list a run."""
    calls, real = [], predictions.answers

    def counted(model, processor, questions, indices, *rest):
        calls.append(sorted(indices))
        return real(model, processor, questions, indices, *rest)

    monkeypatch.setattr(predictions, "answers", counted)
    return calls


def break_off_after_the_first_batch(run, folder, monkeypatch):
    real = predictions.answers

    def broken(*arguments):
        yield next(real(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "answers", broken)
        with pytest.raises(KeyboardInterrupt):
            run(folder)


def test_the_report_has_scores_intervals_and_how_they_came_about(run, examples, tmp_path):
    decoding = Decoding(num_beams=2, max_new_tokens=3, batch_size=8)
    report = run(tmp_path / "a" / "b", decoding, task="vqa")
    assert report == json.loads((tmp_path / "a" / "b" / "metrics.json").read_text())
    assert report["decoding"] == {"num_beams": 2, "max_new_tokens": 3}
    assert (report["task"], report["examples"], report["versions"]["torch"]) == ("vqa", 8, torch.__version__)
    assert report["scores"]["yes_no_questions"] == report["scores"]["open_questions"] == 4
    for name, (low, high) in report["intervals"].items():
        assert low <= report["scores"][name] <= high


def test_scores_are_of_each_prediction_with_its_own_references(run, examples, tmp_path, monkeypatch):
    def said(model, processor, questions, indices, *rest):
        yield [(index, examples[index].references[0] if index != 3 else "no") for index in reversed(indices)]

    monkeypatch.setattr(predictions, "answers", said)
    scores = run(tmp_path)["scores"]
    assert (scores["yes_no"], scores["open"], scores["overall"]) == (3 / 4, 1, 7 / 8)


def test_predictions_are_in_order_and_say_of_what(run, examples, tmp_path):
    run(tmp_path)
    rows = read_predictions(tmp_path)
    assert [row.pop("index") for row in rows] == list(range(8))
    assert len({row.pop("prediction") for row in rows}) > 4
    assert rows == [
        {"name": one.question.name, "question": one.question.turns[0].text, "references": one.references}
        for one in examples
    ]


def test_an_interrupted_run_asks_only_what_is_missing(run, asked, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    break_off_after_the_first_batch(run, tmp_path / "parts", monkeypatch)
    assert sorted(row["index"] for row in read_predictions(tmp_path / "parts")) == FIRST_BATCH
    run(tmp_path / "parts")
    assert asked == [list(range(8)), list(range(8)), [0, 1, 3, 4, 7]]
    assert (tmp_path / "parts" / PREDICTIONS).read_bytes() == (tmp_path / "whole" / PREDICTIONS).read_bytes()


def test_an_interrupted_run_goes_on_in_smaller_batches(run, asked, tmp_path, monkeypatch):
    break_off_after_the_first_batch(run, tmp_path, monkeypatch)
    run(tmp_path, Decoding(max_new_tokens=DECODING.max_new_tokens, batch_size=1))
    assert asked[-1] == [0, 1, 3, 4, 7]


def test_a_finished_run_asks_nothing_again(run, asked, tmp_path):
    first = run(tmp_path)
    assert run(tmp_path) == first
    assert asked == [list(range(8)), []]


@pytest.mark.parametrize(
    "rest",
    [
        b'{"index": 4, "name": "row 5", "question": "wwww", "prediction": "as',
        '{"index": 4, "name": "é'.encode()[:-1],
        b'{"index": 4, "name": "row 5", "question": "wwww"}\n',
        b'{"index": 4, "name": "row 4", "question": "wwww", "prediction": "of another row"}\n',
        b'{"index": 4, "name": "row 5", "question": "another", "prediction": "of another question"}\n',
        b'{"index": 40, "name": "row 41", "question": "w", "prediction": "of no row"}\n',
        b"\x00" * 50,
        b"[7]\n7\n\n",
    ],
    ids=["cut", "cut in a character", "no prediction", "another row", "another question", "no row", "zeros", "no object"],
)
def test_lines_that_are_no_prediction_are_asked_again(rest, run, asked, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    break_off_after_the_first_batch(run, tmp_path / "parts", monkeypatch)
    with (tmp_path / "parts" / PREDICTIONS).open("ab") as file:
        file.write(rest)
    run(tmp_path / "parts")
    assert asked[-1] == [0, 1, 3, 4, 7]
    assert (tmp_path / "parts" / PREDICTIONS).read_bytes() == (tmp_path / "whole" / PREDICTIONS).read_bytes()


def test_a_last_line_cut_anywhere_loses_that_line_alone(run, asked, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    break_off_after_the_first_batch(run, tmp_path / "parts", monkeypatch)
    path = tmp_path / "parts" / PREDICTIONS
    last = json.loads(path.read_bytes().splitlines()[-1])["index"]
    path.write_bytes(path.read_bytes()[:-9])
    run(tmp_path / "parts")
    assert asked[-1] == sorted([0, 1, 3, 4, 7, last])
    assert path.read_bytes() == (tmp_path / "whole" / PREDICTIONS).read_bytes()


def test_what_further_processes_had_left_is_kept(run, asked, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    break_off_after_the_first_batch(run, tmp_path / "parts", monkeypatch)
    lines = (tmp_path / "whole" / PREDICTIONS).read_bytes().splitlines(keepends=True)
    (tmp_path / "parts" / "predictions.1.jsonl").write_bytes(lines[7] + lines[0])
    (tmp_path / "parts" / "predictions.11.jsonl").write_bytes(lines[2] + lines[3] + lines[4][:20])
    run(tmp_path / "parts")
    assert asked[-1] == [1, 4]
    assert (tmp_path / "parts" / PREDICTIONS).read_bytes() == b"".join(lines)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["metrics.json", PREDICTIONS, SETTINGS]


@pytest.mark.parametrize(
    ("decoding", "settings", "says"),
    [
        (Decoding(num_beams=2, max_new_tokens=6, batch_size=3), {}, "other settings of decoding"),
        (DECODING, {"model": "another", "task": "vqa"}, "other settings of model, task"),
    ],
)
def test_another_evaluation_is_not_mixed_in(decoding, settings, says, run, tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{says}; choose another folder"):
        run(tmp_path, decoding, **settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fewer_examples_are_another_evaluation(run, examples, tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="other settings of examples"):
        run(tmp_path, of=examples[:5])


@pytest.mark.parametrize("content", [None, b"{", b"7", b"\xff"])
def test_predictions_without_readable_settings_are_left_alone(content, run, tmp_path):
    run(tmp_path)
    (tmp_path / SETTINGS).unlink() if content is None else (tmp_path / SETTINGS).write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.json.*choose another folder"):
        run(tmp_path)
    assert len(read_predictions(tmp_path)) == 8


def test_a_run_that_answered_nothing_does_not_take_the_folder(run, examples, tmp_path):
    gone = Example(Conversation.about([str(tmp_path / "gone.png")], [("user", "wwwwwwwww")], "row 9"), ["yes"])
    with pytest.raises(ValueError, match=r"^row 9: .*gone\.png"):
        run(tmp_path / "out", of=[*examples, gone])
    assert run(tmp_path / "out")["examples"] == 8


def test_missing_packages_are_found_before_the_work(examples, asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefixvlm.train.evaluation.metrics.coco_caption.scores", None)
    with pytest.raises(ModuleNotFoundError):
        evaluate(tiny_model(), PROCESSOR, examples, "captions", tmp_path / "out", DECODING, {})
    assert asked == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    rows = [{"image": f"{index}.png", "question": "w" * (1 + 5 * index % 4), "answer": "yes"} for index in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for index in range(7):
        picture(index).save(tmp_path / f"{index}.png")
    arguments = ["evaluate", str(tmp_path), "--task", "vqa", "--data", str(tmp_path / "rows.json")]
    arguments += ["--batch-size", "2", "--max-new-tokens", "6", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "prefixvlm", *arguments, str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    two, one = (read_predictions(tmp_path / name) for name in ("two", "one"))
    assert [row["index"] for row in two] == list(range(7))
    found, expected = ([row.pop("log_likelihoods") for row in rows] for rows in (two, one))
    assert two == one
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # other batches, and so other sums
    assert sorted(path.name for path in (tmp_path / "two").glob("predictions*")) == [PREDICTIONS]
    assert done.stdout.count("7 examples by greedy search") == 1
