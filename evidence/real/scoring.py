"""What `make real` scores beyond `prefixvlm evaluate`: the class that a caption names, answers by type, single photos."""

from collections import Counter

import numpy as np

from evidence.real.scenes import is_named
from prefixvlm.train.evaluation.metrics.coco_caption.scores import caption_scores
from prefixvlm.train.evaluation.metrics.vqa.scores import normalized

ANSWER_TYPES = ("CLOSED", "OPEN")


def class_named(captions: list[str], rows: list[dict]) -> float:
    """The share of captions that name the class of their row's photo."""
    return float(np.mean([is_named(row["class_by_index"], text) for text, row in zip(captions, rows, strict=True)]))


def by_answer_type(answers: list[str], rows: list[dict], training_rows: list[dict]) -> dict[str, dict]:
    """How many answers of each type are right, beside one and the same answer to all: the commonest of the training rows.

    Args:
        rows: of VQA-RAD, one for each answer.

    Returns:
        By answer type, the number of `questions`, `accuracy` after normalisation, `commonest` and `commonest_accuracy`.
    """
    found = {}
    for kind in ANSWER_TYPES:
        chosen = [(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True) if row["answer_type"] == kind]
        if not chosen:
            continue
        known = Counter(normalized(row["answer"]) for row in training_rows if row["answer_type"] == kind)
        commonest = known.most_common(1)[0][0]
        found[kind] = {
            "questions": len(chosen),
            "accuracy": float(np.mean([normalized(answer) == normalized(right) for answer, right in chosen])),
            "commonest": commonest,
            "commonest_accuracy": float(np.mean([normalized(right) == commonest for _, right in chosen])),
        }
    return found


def examples(captions: list[str], rows: list[dict], count: int = 12) -> list[dict]:
    """Photos with what was said of them, from the best CIDEr of a single photo to the worst, at even distances."""
    scored = caption_scores(captions, [row["texts"] for row in rows], metrics=("CIDEr",))
    scores = [scored.resampled(np.array([index]))["CIDEr"] for index in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda index: -scores[index])
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [
        {
            "image": rows[index]["image"],
            "class": rows[index]["class_by_index"],
            "said": captions[index],
            "reference": rows[index]["texts"][0],
            "CIDEr": scores[index],
            "rank": int(place) + 1,
        }
        for place, index in ((place, order[place]) for place in places)
    ]
