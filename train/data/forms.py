"""What the rows of each kind of data set mean: from a row to a `Conversation`."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from prefixvlm.train.data.conversation import Conversation

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACES = ("<image>", "<video>")  # of pictures in LLaVA's texts


class Form:
    """How the rows of one kind of data set become conversations.

    Each form has `turns(row, part)`, the (role, text) pairs of one sample. Where a row may hold several, `has_parts` is set
    and `parts(row)` counts them.

    Args:
        folder: of the images that rows name by path.
    """

    has_parts = False

    def __init__(self, folder: Path):
        self.folder = folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items() if k != 'folder')})"

    def turns(self, row: dict, part: int) -> list[tuple[str, str]]:
        raise TypeError("a form must define `turns`")

    def parts(self, row: dict) -> int:
        return 1

    def count(self, read: Callable[[], dict]) -> int:
        """How many samples a row holds; one that cannot be read counts as one, which is reported when it is read."""
        if not self.has_parts:
            return 1
        try:
            return self.parts(read())
        except ValueError:
            return 1

    def name(self, where: str, part: int) -> str:
        """Where a sample comes from: its file, its row and, of several texts, which one."""
        return f"{where}, text {part + 1}" if self.has_parts else where

    def sample(self, read: Callable[[], dict], part: int, name: str) -> Conversation:
        """One sample of a row.

        Raises:
            ValueError: naming the sample, if it cannot be trained on.
        """
        try:
            row = read()
            turns = self.turns(row, part)
            if not any(role == "assistant" and text for role, text in turns):
                raise ValueError("there is no text to learn")
            return Conversation(self.images(row), turns, name)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removesuffix('.')}.") from error

    def images(self, row: dict) -> list:
        """The images of a row: bytes or PIL images as they are, paths below the data's own folder; "" is no image."""
        found: Any = next((row[key] for key in ("image", "images") if not _is_empty(row.get(key))), [])
        return [self._inside(image) for image in (found if isinstance(found, list) else [found])]

    def _inside(self, image):
        path = image
        if isinstance(image, dict):
            if image.get("bytes") is not None:
                return image
            path = image.get("path")
        if not isinstance(path, str):
            return path
        # by hand, since pathlib takes longer than all the rest of a row
        if path.startswith(("/", "\\")) or path[1:2] == ":" or ".." in path.replace("\\", "/").split("/"):
            raise ValueError(f"the image {path} lies outside {self.folder}; give a path below it")
        return os.path.join(self.folder, path)


class LlavaForm(Form):
    """`id, image, conversations[{from, value}]`, as LLaVA-ReCap, LLaVA-NeXT-Data and LLaVA's own JSON have it."""

    def turns(self, row, part):
        try:
            turns = [(LLAVA_ROLES[turn["from"]], _text(turn["value"])) for turn in row["conversations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"`conversations` must be a list of {{from, value}} turns ({error!r})") from error
        asked = [turn["value"] for turn in row["conversations"] if LLAVA_ROLES[turn["from"]] == "user"]
        place = next((place for text in asked for place in PLACES if place in text), None)
        if place and not self.images(row):
            raise ValueError(f"a question has {place}, but the row has no image")
        return turns


class VqaForm(Form):
    """`image, question, answer`, as PathVQA and VQA-RAD have it."""

    def __init__(self, folder, question: str, answer: str):
        super().__init__(folder)
        self.question, self.answer = question, answer

    def turns(self, row, part):
        return [("user", _field(row, self.question)), ("assistant", _field(row, self.answer))]


class CaptionsForm(Form):
    """`image` and `texts` (or one `text`): each text is a sample of its own."""

    has_parts = True

    def __init__(self, folder, texts: str):
        super().__init__(folder)
        self.key = texts

    def texts(self, row) -> list[str]:
        texts = row.get(self.key)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"`{self.key}` must be a text or a list of texts")
        return texts

    def parts(self, row):
        return len(self.texts(row))

    def turns(self, row, part):
        return [("user", ""), ("assistant", _text(self.texts(row)[part]))]


class KarpathyForm(CaptionsForm):
    """`filename, sentences[{raw}]` and for COCO `filepath`, as in Karpathy's dataset_*.json."""

    def __init__(self, folder):
        super().__init__(folder, "sentences")

    def images(self, row):
        return [self._inside(str(PurePosixPath(row.get("filepath") or "") / _field(row, "filename")))]

    def turns(self, row, part):
        sentence = self.texts(row)[part]
        if not isinstance(sentence, dict):
            raise ValueError("`sentences` must be a list of objects with `raw`")
        return [("user", ""), ("assistant", _field(sentence, "raw"))]


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _field(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"`{key}` must be a text, not {row.get(key)!r}")
    return _text(row[key])


def _text(value) -> str:
    """A text without the placeholder that LLaVA's rows put where the image goes."""
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, not {value!r}")
    return value.replace("<image>", "").strip()
