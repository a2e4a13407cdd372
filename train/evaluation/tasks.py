"""What a model can be tested on: images, each with what people said of it, or with a question and its answers.

A test set is whole or it is not scored: a row that cannot be read stops the evaluation, and so does a published split of
another size than the published one.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from prefixvlm.train.data import easy_vqa, sources
from prefixvlm.train.data.conversation import Conversation, Turn
from prefixvlm.train.data.forms import FORMS
from prefixvlm.train.evaluation.metrics.vqa.scores import normalized
from prefixvlm.train.recipes.evaluation import EvaluationSettings, TaskName

Kind = Literal["captions", "vqa"]
YES_OR_NO = re.compile(r"(\W*)(yes|no)(\W*)", re.IGNORECASE)
MAX_NEW_TOKENS: dict[Kind, int] = {"captions": 64, "vqa": 32}  # unless the settings say otherwise


@dataclass(frozen=True)
class Task:
    """A test set by name.

    Attributes:
        kind: `captions` or `vqa`, which decides the scores.
        source: of `train/data/sources.py`; `None` for easy-VQA, which needs no files.
        rows: how many the published test split has, and `None` where any number will do.
        default_data: the Hub id it is read from if nothing else is named.
        column: where Table VI of the paper has its scores.
    """

    kind: Kind
    source: str | None
    rows: int | None = None
    default_data: str | None = None
    column: str | None = None


TASKS: dict[TaskName, Task] = {
    "captions": Task("captions", "captions"),
    "karpathy": Task("captions", "karpathy"),
    "vqa": Task("vqa", "vqa"),
    "choices": Task("vqa", "choices"),
    "flickr8k": Task("captions", "karpathy", 1000, column="Flickr8k"),
    "flickr30k": Task("captions", "karpathy", 1000, column="Flickr30k"),
    "coco": Task("captions", "karpathy", 5000, column="COCO"),
    "pathvqa": Task("vqa", "vqa", default_data="flaviagiammarino/path-vqa"),
    "easy_vqa": Task("vqa", None),
}


@dataclass(frozen=True)
class Example:
    """One thing to ask of a model.

    Attributes:
        question: ends with a user turn; an empty one asks for a caption.
        references: what people said.
        image_id: by which COCO's tools know the image, where the data set has such.
        choices: the answers to choose from, of a question that has such; yes and no, if the reference is one of them.
        right: which of them is right.
    """

    question: Conversation
    references: list[str]
    image_id: int | str | None = None
    choices: tuple[str, ...] = ()
    right: int = 0


def spread(items: list, count: int) -> list:
    """`count` of the items at even distances, or all if there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def load_examples(settings: EvaluationSettings) -> list[Example]:
    """The examples of a task, all of them. COCO's own captions_*.json will do as `data` of the task `captions`.

    Raises:
        ValueError: for settings that the task has no use for, data that cannot be read, a row without image, question or
            reference, or a published test split of a wrong size.
    """
    name, task, data = settings.task, TASKS[settings.task], settings.data
    if settings.prompt is not None and task.kind != "captions":
        raise ValueError(f"A prompt is for captions; the task {name} has questions of its own.")
    if task.source is None:
        if data or settings.images or settings.keys:
            raise ValueError(f"The task {name} brings its own data; leave data, images and the names of keys out.")
        samples = easy_vqa.conversations(settings.split)
        return [example for sample in samples for example in _turn_by_turn(sample)]
    data = data or task.default_data
    if data is None:
        raise ValueError(f"The task {name} needs data: --data, or `data` in a recipe.")
    if unknown := [key for key in settings.keys if key not in ("image", *FORMS[task.source].keys)]:
        raise ValueError(f"The rows of the task {name} have no key for {', '.join(unknown)} to name; leave it out.")
    examples = _from_rows(task, task.source, data, settings)
    if not examples:
        raise ValueError(f"{data} has no rows of the split {settings.split!r}.")
    if settings.split == "test":
        _refuse_another_size(name, data, len(examples))
    return _with_shots([_with_prompt(one, settings.prompt) for one in examples], settings)


def _with_prompt(example: Example, prompt: str | None) -> Example:
    if prompt is None:
        return example
    return replace(example, question=Conversation.about(example.question.images, [("user", prompt)], example.question.name))


def _with_shots(examples: list[Example], settings: EvaluationSettings) -> list[Example]:
    """The examples, each after `settings.shots` others with their answers, as earlier turns of one conversation.

    Each question has shots of its own, drawn by the seed and the question's name, and none about its own images. Their
    answers are the first references.

    Raises:
        ValueError: for captions without a prompt, which are asked for in no words that could be repeated, or data with too
            few other images; else as `load_examples`.
    """
    if not settings.shots:
        if (settings.shots_data, settings.shots_split, settings.shots_seed) != (None, "train", 0):
            raise ValueError("Shots are described, but none asked for; say by `shots` how many stand before each question.")
        return examples
    if TASKS[settings.task].kind == "captions" and settings.prompt is None:
        raise ValueError("Shots are turns of a conversation; say by `prompt` in which words a caption is asked for.")
    others = {"data": settings.shots_data or settings.data, "split": settings.shots_split}
    no_more = {"shots": 0, "shots_data": None, "shots_split": "train", "shots_seed": 0}
    pool = load_examples(settings.model_copy(update=others | no_more))
    return [_after_shots(example, pool, settings) for example in examples]


def _after_shots(example: Example, pool: list[Example], settings: EvaluationSettings) -> Example:
    question = example.question
    draw = random.Random(f"{settings.shots_seed} {question.name} {question.turns[-1].text}")
    shown = set(map(_image_key, question.images))
    turns: list[Turn] = []
    tried: set[int] = set()
    left = settings.shots
    while left:
        if len(tried) == len(pool):
            raise ValueError(
                f"{question.name}: the split {settings.shots_split!r} has fewer than {settings.shots} examples about other "
                "images; ask for fewer shots."
            )
        index = draw.randrange(len(pool))
        if index in tried:
            continue
        tried.add(index)
        shot = pool[index]
        if shown.isdisjoint(map(_image_key, shot.question.images)):
            turns += [*shot.question.turns, Turn("assistant", (shot.references[0],), is_supervised=False)]
            left -= 1
    return replace(example, question=replace(question, turns=[*turns, *question.turns]))


def _image_key(image):
    """What two mentions of one image share."""
    if isinstance(image, dict):
        return image["bytes"] if image.get("bytes") is not None else image.get("path")
    return image if isinstance(image, str | bytes) else id(image)


def _from_rows(task: Task, source: str, data: str, settings: EvaluationSettings) -> list[Example]:
    samples = sources.load(source, path=data, images=settings.images, split=settings.split, **settings.keys)
    assert isinstance(samples, sources.Samples)  # no task streams or mixes
    read = _captions if task.kind == "captions" else _choices if source == "choices" else _vqa
    examples = []
    for index in range(len(samples.rows)):
        where = samples.rows.where(index)
        try:
            examples.append(read(samples.form, samples.rows[index], where))
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removesuffix('.')}; a test set must be whole.") from error
        if not examples[-1].question.images:
            raise ValueError(f"{where}: there is no image; a test set must be whole.")
    return examples


def _captions(form, row: dict, where: str) -> Example:
    references = form.texts(row)
    if not all(references):
        raise ValueError("a caption is empty")
    image_id = next((row[key] for key in ("cocoid", "coco_id", "image_id", "imgid") if key in row), None)
    return Example(Conversation.about(form.images(row), [("user", "")], where), references, image_id)


def _vqa(form, row: dict, where: str) -> Example:
    *asked, _ = form.samples(row)[0]
    if not asked[-1].text.strip():
        raise ValueError(f"`{form.key(row, 'question')}` is empty")
    answers = form.answers(row)
    if not all(answers):
        raise ValueError(f"`{form.key(row, 'answer')}` has an empty answer")
    return _with_yes_and_no(Example(Conversation(asked, where), answers))


def _choices(form, row: dict, where: str) -> Example:
    *asked, answer = form.samples(row)[0]
    choices, right = form.choices(row), form.right(row)
    if not all(choices):
        raise ValueError("a choice is empty")
    return Example(Conversation(asked, where), [answer.text], choices=tuple(choices), right=right)


def _with_yes_and_no(example: Example) -> Example:
    """The example with its choices, if it asks for yes or no; both are spelt as the reference is."""
    agreed = Counter(map(normalized, example.references)).most_common(1)[0][0]
    found = YES_OR_NO.fullmatch(next(text for text in example.references if normalized(text) == agreed))
    if not found:
        return example
    before, word, after = found.groups()
    spell = str.upper if word.isupper() else str.capitalize if word[0].isupper() else str.lower
    choices = tuple(f"{before}{spell(one)}{after}" for one in ("yes", "no"))
    return replace(example, choices=choices, right=("yes", "no").index(word.lower()))


def _turn_by_turn(sample: Conversation) -> list[Example]:
    texts = [turn.text for turn in sample.turns]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [
        _with_yes_and_no(Example(Conversation.about(sample.images, [("user", asked)], sample.name), [reply]))
        for asked, reply in pairs
    ]


def _refuse_another_size(task: TaskName, path: str, rows: int) -> None:
    expected = TASKS[task].rows
    if expected is not None and rows != expected:
        raise ValueError(
            f"{path} has {rows:,} test images where Karpathy's test split of {task} has {expected:,}, so its scores could "
            "not be compared with published ones; give dataset_*.json of Karpathy's splits, or use the task karpathy."
        )
