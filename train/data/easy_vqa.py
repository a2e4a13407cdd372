"""easy-VQA as conversations and captions: 5,000 pictures of one coloured shape and 48,248 questions about them.

The data set (MIT, https://github.com/vzhou842/easy-VQA) comes with the PyPI package `easy-vqa`.
"""

import json
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path

from prefixvlm.train.data.conversation import Conversation

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NEGATIONS = ("no", "not")


def questions_by_image(split: str) -> dict[Path, list[tuple[str, str]]]:
    """The (question, answer) pairs of each picture of the split `train` or `test`.

    Raises:
        ValueError: for another split, or if the package easy-vqa is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has no split {split!r}; choose train or test.")
    try:
        folder = Path(str(resources.files("easy_vqa"))) / "data" / split
    except ModuleNotFoundError as error:
        raise ValueError("easy-VQA is not installed; run: pip install easy-vqa") from error
    questions = defaultdict(list)
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        questions[folder / "images" / f"{image}.png"].append((question, answer))
    return dict(questions)


def facts(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """The colour and the shape that a picture's questions and answers reveal; `None` for what they leave open.

    A question with a content answer states it ("what color is the circle?" - "red"), and so does a yes to a plain
    question or a no to a negated one ("is there not a red shape?" - "no").
    """
    color = shape = None
    for question, answer in questions:
        words = re.findall("[a-z]+", question)
        negated = any(word in NEGATIONS for word in words)
        if answer in ("yes", "no"):
            stated = words if (answer == "yes") != negated else []
        else:
            stated = [*words, answer]
        color = next((word for word in stated if word in COLORS), color)
        shape = next((word for word in stated if word in SHAPES), shape)
    return color, shape


def captions(split: str) -> list[Conversation]:
    """A caption of the known facts for each picture, such as "a red circle"; "shape" stands for an unknown shape."""
    samples = []
    for image, questions in questions_by_image(split).items():
        color, shape = facts(questions)
        words = ["a", color, shape or "shape"]
        caption = " ".join(word for word in words if word)
        samples.append(Conversation.about([str(image)], [("user", ""), ("assistant", caption)], str(image)))
    return samples


def conversations(split: str) -> list[Conversation]:
    """All questions of a picture and their answers as one conversation, yes/no questions first.

    After "what color is the shape?" - "red", many yes/no answers follow from the text alone; in this order the picture
    is needed.
    """
    samples = []
    for image, questions in questions_by_image(split).items():
        ordered = sorted(questions, key=lambda pair: pair[1] not in ("yes", "no"))
        turns = [turn for question, answer in ordered for turn in (("user", question), ("assistant", answer))]
        samples.append(Conversation.about([str(image)], turns, str(image)))
    return samples
