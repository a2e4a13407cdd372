"""Where training samples come from: each source turns its rows into `Conversation`s."""

import json
from pathlib import Path

from prefixvlm.train import easy_vqa
from prefixvlm.train.conversation import Conversation

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load(source: str, **options) -> list[Conversation]:
    """The samples of a source named in a recipe.

    Raises:
        ValueError: for an unknown source or option, or data that does not have the source's form.
    """
    if source not in SOURCES:
        raise ValueError(f"There is no data source {source!r}; choose one of {', '.join(SOURCES)}.")
    try:
        samples = SOURCES[source](**options)
    except TypeError as error:
        raise ValueError(f"The data source {source} was given wrong options ({error}).") from error
    if not len(samples):
        raise ValueError(f"The data source {source} with {options} has no rows.")
    return samples


class LlavaDataset:
    """Rows of LLaVA's form, `id, image, conversations[{from, value}]`, made into conversations one by one.

    Args:
        path: a .json or .jsonl file, a folder or the name of a data set on the Hub, which `datasets` loads.
        images: the folder that image paths are relative to; by default that of `path`.
        split: of a data set.
    """

    def __init__(self, path: str, images: str | None = None, split: str = "train"):
        self.path = path
        self.rows = _json_rows(Path(path)) if path.endswith((".json", ".jsonl")) else _dataset_rows(path, split)
        self.images = Path(images) if images else Path(path).parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        name = f"{self.path}, row {index + 1}"
        try:
            turns = [(LLAVA_ROLES[turn["from"]], _without_placeholder(turn["value"])) for turn in row["conversations"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}: `conversations` must be a list of {{from, value}} turns ({error!r}).") from error
        image = row.get("image")
        if isinstance(image, str):
            image = str(self._inside(image, name))
        return Conversation([] if image is None else [image], turns, name)

    def _inside(self, image: str, name: str) -> Path:
        path = self.images / image
        if not path.resolve().is_relative_to(self.images.resolve()):
            raise ValueError(f"{name}: the image {image} lies outside {self.images}.")
        return path


def _json_rows(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects with `image` and `conversations`.")
    return rows


def _dataset_rows(path: str, split: str):
    import datasets

    try:
        rows = datasets.load_dataset(path, split=split)
    except Exception as error:  # datasets raises errors of many kinds for data that is not there
        raise ValueError(f"The data set {path} cannot be loaded ({error}).") from error
    if "conversations" not in rows.column_names:
        raise ValueError(f"The data set {path} has no column `conversations`, only {', '.join(rows.column_names)}.")
    if "image" in rows.column_names:
        # undecoded, so that a bad image is named by `load_image`, not by a decoder somewhere in between
        rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows


def _without_placeholder(text: str) -> str:
    return text.replace("<image>", "").strip()


SOURCES = {
    "easy_vqa_captions": easy_vqa.captions,
    "easy_vqa_conversations": easy_vqa.conversations,
    "llava": LlavaDataset,
}
