"""Caption scores of files in COCO's format, without a model: what `prefixvlm score` does."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from prefixvlm.train.evaluation.metrics.coco_caption.scores import DEFAULT, caption_scores
from prefixvlm.train.evaluation.metrics.intervals import bootstrap

_PREDICTIONS_FORM = 'a list of {"image_id": ..., "caption": ...}'
_REFERENCES_FORM = '{"images": [{"id": ...}], "annotations": [{"image_id": ..., "caption": ...}]}'


def score_files(
    predictions: str | Path, references: str | Path, metrics: Iterable[str] | None = None, intervals: bool = False
) -> dict:
    """Scores a file of predictions against a file of references.

    Images of `references` without a prediction are left out; their number is printed to stderr and returned.

    Args:
        predictions: JSON, `[{"image_id", "caption"}]`.
        references: JSON, `{"images": [{"id"}], "annotations": [{"image_id", "caption"}]}`.
        metrics: names of scores; by default all but SPICE.
        intervals: whether to add 95% intervals, from 1,000 resamples of the images.

    Returns:
        `images` (how many were scored), `images_without_prediction` if there are any, the scores, `notes` on scores that
        are 0 by construction, and `intervals`.

    Raises:
        ValueError: if a file is malformed, or its images do not match the other file's.
        OSError: if a file cannot be read, or Java is missing or fails.
    """
    predicted = _read_predictions(Path(predictions))
    captions = _read_references(Path(references))
    for place, image in enumerate(predicted):
        if image not in captions:
            raise ValueError(
                f"{predictions}: [{place}] is for image {image!r}, which is not among the images of {references}; "
                "remove it, or give the references of the same split."
            )
        if not captions[image]:
            raise ValueError(
                f"{references}: image {image!r} has no annotation, but {predictions} has a prediction for it; "
                "add a reference caption, or remove the prediction."
            )
    # in the order of the references, as in COCO's evaluation
    images = [image for image in captions if image in predicted]
    scored = caption_scores(
        [predicted[image] for image in images], [captions[image] for image in images], metrics or DEFAULT
    )
    result: dict[str, object] = {"images": len(images)}
    missing = len(captions) - len(images)
    if missing:
        result["images_without_prediction"] = missing
        print(
            f"{missing} of the {len(captions)} images in {references} have no prediction in {predictions}; "
            f"only the other {len(images)} are scored.",
            file=sys.stderr,
        )
    result |= scored.scores
    if scored.notes:
        result["notes"] = scored.notes
    if intervals:
        result["intervals"] = bootstrap(scored.resampled, len(images))
    return result


def _read_predictions(path: Path) -> dict[int | str, str]:
    """The caption of each image, in the file's order."""
    entries = _json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds {_kind(entries)}; predictions are {_PREDICTIONS_FORM}.")
    if not entries:
        raise ValueError(f"{path} is an empty list; give at least one prediction.")
    captions = {}
    for place, entry in enumerate(entries):
        image, caption = _captioned(entry, f"{path}: [{place}]", _PREDICTIONS_FORM)
        if image in captions:
            raise ValueError(f"{path}: [{place}] is a second prediction for image {image!r}; keep one.")
        captions[image] = caption
    return captions


def _read_references(path: Path) -> dict[int | str, list[str]]:
    """The captions of each image, in the order of the file's images."""
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_kind(content)}; references are {_REFERENCES_FORM}.")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise ValueError(f"{path} has no list, or an empty one, at {key!r}; references are {_REFERENCES_FORM}.")
    captions: dict[int | str, list[str]] = {}
    for place, image in enumerate(content["images"]):
        identity = image.get("id") if isinstance(image, dict) else None
        if not _is_identity(identity):
            raise ValueError(f"{path}: images[{place}] has no number or string at 'id'; references are {_REFERENCES_FORM}.")
        captions[identity] = []
    for place, entry in enumerate(content["annotations"]):
        image, caption = _captioned(entry, f"{path}: annotations[{place}]", _REFERENCES_FORM)
        # a reference file reduced to fewer images may still have the annotations of all
        if image in captions:
            captions[image].append(caption)
    return captions


def _captioned(entry, where: str, form: str) -> tuple[int | str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_kind(entry)}; the file must be {form}.")
    if not _is_identity(entry.get("image_id")):
        raise ValueError(f"{where} has no number or string at 'image_id'; the file must be {form}.")
    if not isinstance(entry.get("caption"), str):
        raise ValueError(f"{where} has no string at 'caption'; the file must be {form}.")
    return entry["image_id"], entry["caption"]


def _is_identity(value) -> TypeGuard[int | str]:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _json(path: Path):
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}); give a JSON file.") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file in COCO's format.") from error


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
