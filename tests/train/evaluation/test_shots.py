"""Few-shot prompts: other examples with their answers as earlier turns, each image in its own turn."""

import json

import pytest
from PIL import Image
from tiny import save_tiny, tiny_processor

from prefixvlm.cli import main
from prefixvlm.train.evaluation.predictions import read_predictions
from prefixvlm.train.evaluation.tasks import load_examples
from prefixvlm.train.recipes.evaluation import EvaluationSettings

PROCESSOR = tiny_processor()


@pytest.fixture
def rows(tmp_path):
    """Two questions about each of six pictures; the last two pictures are for testing."""
    found = []
    for number in range(12):
        image = f"{number // 2}.png"
        Image.new("RGB", (16, 16), (40 * (number // 2), 0, 0)).save(tmp_path / image)
        split = "test" if number >= 8 else "train"
        row = {"image": image, "question": f"q{number}", "answer": f"a{number}", "texts": [f"c{number}"], "split": split}
        found.append(row)
    (tmp_path / "rows.json").write_text(json.dumps(found))
    return tmp_path / "rows.json"


def load(rows, task="vqa", **settings):
    return load_examples(EvaluationSettings(task=task, data=str(rows), **settings))


@pytest.mark.parametrize("shots", [0, 2, 4, 8])
def test_shots_are_earlier_turns_each_with_its_image(rows, shots):
    for example in load(rows, shots=shots):
        turns = example.question.turns
        assert len(turns) == 2 * shots + 1
        asked = [turn.text for turn in turns[:-1:2]]
        assert len(set(asked)) == shots
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            number = int(question.text[1:])
            assert number < 8  # of the split for training
            assert answer.text == f"a{number}"
            assert question.parts[0].source.endswith(f"{number // 2}.png")
        messages = []
        for turn in turns:
            images = [{"type": "image", "image": part.source} for part in turn.parts[:-1]]
            messages.append({"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]})
        written = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True)
        assert PROCESSOR.apply_chat_template(example.question.messages(), add_generation_prompt=True) == written
        assert written.count("<|image_pad|>") == shots + 1
        assert all(f"user\n<|image_pad|>{text}<|im_end|>" in written for text in asked[1:])


def test_each_question_has_its_own_shots_and_a_seed_draws_them(rows):
    first, again, other = ([one.question.said for one in load(rows, shots=3, shots_seed=seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert len({str(said[:-1]) for said in first}) > 1


def test_no_shot_is_about_the_questions_own_image(rows):
    for example in load(rows, shots=2, shots_split="test"):
        *shots, own = example.question.images
        assert own not in shots


def test_captions_are_asked_for_in_the_same_words(rows):
    example = load(rows, "captions", shots=2, prompt="Describe it.")[0]
    assert [text for role, text in example.question.said if role == "user"] == ["Describe it."] * 3
    assert len(example.question.images) == 3


@pytest.mark.parametrize(
    ("task", "settings", "says"),
    [
        ("vqa", {"shots": 9}, "has fewer than 9 examples about other images"),
        ("vqa", {"shots": 3, "shots_split": "test"}, "has fewer than 3 examples"),
        ("vqa", {"shots": 1, "shots_split": "gone"}, "no rows"),
        ("vqa", {"shots": 1, "shots_data": "gone.json"}, "gone.json: there is no such file"),
        ("vqa", {"shots_seed": 3}, "none asked for"),
        ("captions", {"shots": 1}, "say by `prompt`"),
    ],
)
def test_shots_that_cannot_be_had(rows, task, settings, says):
    with pytest.raises(ValueError, match=says):
        load(rows, task, **settings)


def test_from_the_command_line(rows, tmp_path, capsys):
    save_tiny(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), "--task", "vqa", "--data", str(rows), "--shots", "2"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--max-new-tokens", "2"]) == 0
    assert len(read_predictions(tmp_path / "out")) == 4
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["shots"]["number"] == 2
    # another number of shots is another evaluation
    arguments[-1] = "1"
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "with other settings of" in capsys.readouterr().err
