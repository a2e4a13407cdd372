"""Which samples can be trained on: each is tried once before training, and what cannot be used is written down.

So nothing is dropped silently: rows read = rows trained on + rows in skipped.jsonl.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from prefixvlm.modeling_vlm.modeling_prefix_vlm import IGNORE_INDEX
from prefixvlm.processing.images_prefix_vlm import load_image

BATCH = 32
DOT = Image.new("RGB", (16, 16))
FIRST_VERDICT = 1000  # samples of a stream, before which their share says little


@dataclass
class Screened:
    """The verdict on a data set.

    Attributes:
        indices: of the samples that can be trained on.
        lengths: tokens of each of them, images included.
        supervised: tokens of each of them that are learnt.
        images: of each of them.
        skipped: (name, reason) of the others.
    """

    indices: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def encode_one(collator, sample, max_length: int | None):
    """A sample's tensors.

    Raises:
        ValueError: if the sample cannot be trained on: a bad row or image, no token to learn, or too many tokens.
    """
    (encoded,) = collator.encoded([sample])
    if max_length is not None and len(encoded) > max_length:
        raise ValueError(f"{sample.name}: it has {len(encoded)} tokens, the limit is {max_length}.")
    if not (encoded.labels != IGNORE_INDEX).any():
        raise ValueError(f"{sample.name}: there is no token to learn.")
    return encoded


def screen(samples, collator, max_length: int | None, workers: int = 0) -> Screened:
    """Tries every sample of a data set.

    Args:
        samples: a sequence of `Conversation`s.
        collator: the `ConversationCollator` of the stage.
        max_length: the most tokens a sample may have; `None` for any.
        workers: processes that try them.
    """
    trials = torch.utils.data.DataLoader(
        _Trials(samples, collator, max_length), batch_size=BATCH, num_workers=workers, collate_fn=list
    )
    result = Screened()
    with tqdm(total=len(samples), desc="Checking the data", unit="sample", delay=2) as progress:
        for index, verdict in enumerate(verdict for batch in trials for verdict in batch):
            if isinstance(verdict, str):
                result.skipped.append((samples.name(index), verdict))
            else:
                result.indices.append(index)
                for found, values in zip(verdict, (result.lengths, result.supervised, result.images), strict=True):
                    values.append(found)
            progress.update()
    return result


class _Trials(torch.utils.data.Dataset):
    """The size of each sample, or why it cannot be used. Of samples that share an image file, one opens it."""

    def __init__(self, samples, collator, max_length):
        self.samples, self.collator, self.max_length = samples, collator, max_length
        self.problems = {}

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            sample = self.samples[index]
            encoded = encode_one(
                self.collator, replace(sample, images=[self._opened(image) for image in sample.images]), self.max_length
            )
        except ValueError as error:
            return str(error)
        supervised = int((encoded.labels != IGNORE_INDEX).sum())
        return len(encoded), supervised, 0 if encoded.pixel_values is None else len(encoded.pixel_values)

    def _opened(self, image):
        """A stand-in for an image that can be opened, since only the number of images counts here."""
        if not isinstance(image, str):
            load_image(image)
        elif image not in self.problems:
            try:
                load_image(image)
                self.problems[image] = None
            except ValueError as error:
                self.problems[image] = str(error)
        if isinstance(image, str) and self.problems[image]:
            raise ValueError(self.problems[image])
        return DOT


def write_report(skipped: list[tuple[str, str]], path: Path) -> None:
    """One line of JSON for each sample that is not trained on."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_line(name, reason) for name, reason in skipped)


def _line(name: str, reason: str) -> str:
    return json.dumps({"sample": name, "reason": reason}, ensure_ascii=False) + "\n"


def refuse_if_too_many(skipped: list[tuple[str, str]], read: int, limit: float, path: Path) -> None:
    """Stops a run whose data is worse than it should be.

    Raises:
        ValueError: if more than `limit` of the samples cannot be used.
    """
    if len(skipped) > limit * read:
        name, reason = skipped[0]
        raise ValueError(
            f"{len(skipped):,} of {read:,} samples cannot be used, more than the {limit:.2%} that max_skipped allows; "
            f"all are listed in {path}. The first: {reason if name in reason else f'{name}: {reason}'}"
        )


class StreamReport:
    """Writes down samples of a stream as they turn out unusable, and stops when there are too many.

    Args:
        path: a .jsonl file; each process and worker adds lines to it.
        limit: the share that may be unusable.
    """

    def __init__(self, path: Path, limit: float):
        self.path, self.limit = path, limit
        self.skipped = []

    def __call__(self, name: str, reason: str, read: int) -> None:
        self.skipped.append((name, reason))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(name, reason))
        refuse_if_too_many(self.skipped, max(read, FIRST_VERDICT), self.limit, self.path)
