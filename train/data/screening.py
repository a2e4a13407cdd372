"""Which samples can be trained on: each is checked before training, and those that cannot be used are reported.

Nothing is dropped silently: rows read = rows trained on + rows in skipped.jsonl. The check reads a sample's row and the
headers of its images, and tokenizes what may be too long for the decoder; what only decoding an image shows comes up in
training, where a padding sample then replaces the sample.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.configuration.writing import write_atomically
from prefixvlm.modeling_vlm.positions_prefix_vlm import attention_window, context
from prefixvlm.processing.images_prefix_vlm import check_image
from prefixvlm.train.data.collator import ConversationCollator, Encoded
from prefixvlm.train.data.conversation import Conversation

BATCH = 64
BARRIER_EVERY = 1000  # samples; processes then wait for each other, so that none waits for another's whole share
FIRST_VERDICT = 1000  # samples of a stream; before, the share of failures says little


@dataclass
class Screened:
    """The verdict on a data set, or on one process's share of it.

    Attributes:
        indices: of the samples that can be trained on.
        lengths: tokens of each of them, images included; empty if not measured.
        supervised: supervised tokens of each of them; as `lengths`.
        images: of each of them.
        skipped: (index, name, reason) of the others.
    """

    indices: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: "list[Screened]") -> "Screened":
        """The verdict on a data set of which every process has checked a share, in the order of the samples."""
        order = sorted((index, part, place) for part, one in enumerate(parts) for place, index in enumerate(one.indices))
        whole = cls([index for index, _, _ in order], skipped=sorted(row for part in parts for row in part.skipped))
        for name in ("lengths", "supervised", "images"):
            columns = [getattr(part, name) for part in parts]
            if any(columns):
                setattr(whole, name, [columns[part][place] for _, part, place in order])
        return whole


class Screening:
    """The verdicts on the data sets of a run: each reached once, shared by stages, and kept in a file for `--resume`.

    Args:
        folder: gets a file for each data set.
        resume: use the verdicts that are there.
        workers: processes that check, for each process of the run.
        limit: the share of unusable samples that stops the run; such a verdict is not kept, so that the data can be mended.
    """

    def __init__(self, folder: Path, resume: bool = False, workers: int = 0, limit: float = 1.0):
        self.folder, self.resume, self.workers, self.limit = folder, resume, workers, limit
        self._reached: dict[str, Screened] = {}

    def verdict(self, samples, collator: ConversationCollator, max_length: int | None, measure: bool) -> Screened:
        """As `screen`, in all processes of the run together; each gets the whole verdict."""
        asked = json.dumps([samples.fingerprint, collator.text_format, collator.context, max_length, measure])
        key = hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()
        path = self.folder / f"{key}.json"
        if key not in self._reached and self.resume and all(gather_object([path.is_file()])):
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._reached[key] = Screened(**{**kept, "skipped": [tuple(row) for row in kept["skipped"]]})
        if key not in self._reached:
            state = PartialState()
            part = screen(samples, collator, max_length, measure, self.workers, state)
            self._reached[key] = Screened.joined(gather_object([part]))
            stops = len(self._reached[key].skipped) > self.limit * len(samples)
            if state.is_main_process and not stops:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(asdict(self._reached[key]), ensure_ascii=False))
        return self._reached[key]


def screen(
    samples,
    collator: ConversationCollator,
    max_length: int | None = None,
    measure: bool = False,
    workers: int = 0,
    state: PartialState | None = None,
) -> Screened:
    """Checks every sample of a data set, or this process's share of them.

    Args:
        samples: a sequence of `Conversation`s.
        collator: the `ConversationCollator` of the stage.
        max_length: the most tokens a sample may have; `None` for any.
        measure: count tokens also without a `max_length`. It takes most of the time.
        workers: processes that check.
        state: of several processes, each of which calls this; `None` for the only one.
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    share = range(rank, len(samples), processes)
    checks = torch.utils.data.DataLoader(
        _Checks(samples, collator, max_length, measure or max_length is not None),
        batch_size=BATCH,
        sampler=share,
        num_workers=workers,
        collate_fn=list,
    )
    result, barriers = Screened(), len(samples) // (BARRIER_EVERY * processes)
    own = iter(share)
    done = 0
    # `None` leaves the bar out where there is no terminal
    bar = tqdm(total=len(share), desc="Checking the data", unit="sample", delay=2, disable=True if rank else None)
    with bar as progress:
        for batch in checks:
            for verdict in batch:
                index = next(own)
                if isinstance(verdict, str):
                    result.skipped.append((index, samples.name(index), verdict))
                else:
                    result.indices.append(index)
                    for found, column in zip(verdict, (result.images, result.lengths, result.supervised), strict=False):
                        column.append(found)
            progress.update(len(batch))
            done += len(batch)
            while state and processes > 1 and barriers and done >= BARRIER_EVERY:
                state.wait_for_everyone()
                done, barriers = done - BARRIER_EVERY, barriers - 1
    return result


class _Checks(torch.utils.data.Dataset):
    """What is known of each sample - images, and if measured tokens and supervised tokens - or why it cannot be used."""

    def __init__(self, samples, collator: ConversationCollator, max_length: int | None, measured: bool):
        self.samples, self.collator, self.max_length, self.measured = samples, collator, max_length, measured
        self.problems: dict[str, str | None] = {}  # of image files, which many samples may share

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, ...] | str]:
        checked = [self._checked(index) for index in indices]
        if not self.measured:
            return [found if isinstance(found, str) else self._counted(found) for found in checked]
        try:
            measured = iter(self.collator.lengths([found for found in checked if not isinstance(found, str)]))
            return [found if isinstance(found, str) else self._measured(found, *next(measured)) for found in checked]
        except ValueError:  # one by one, to find which one fails
            return [found if isinstance(found, str) else self._measured_alone(found) for found in checked]

    def _checked(self, index: int) -> Conversation | str:
        try:
            sample = self.samples[index]
            if self.collator.text_format == "conversation":
                sample.messages()
            for image in sample.images:
                self._check(image)
        except ValueError as error:
            return str(error)
        return sample

    def _check(self, image) -> None:
        if not isinstance(image, str):
            check_image(image)
            return
        if image not in self.problems:
            self.problems[image] = None
            try:
                check_image(image)
            except ValueError as error:
                self.problems[image] = str(error)
        if problem := self.problems[image]:
            raise ValueError(problem)

    def _counted(self, sample: Conversation) -> tuple[int, ...] | str:
        if self.collator.may_be_too_long(sample) and isinstance(problem := self._measured_alone(sample), str):
            return problem
        return (len(sample.images),)

    def _measured_alone(self, sample: Conversation) -> tuple[int, ...] | str:
        try:
            return self._measured(sample, *self.collator.lengths([sample])[0])
        except ValueError as error:
            return str(error)

    def _measured(self, sample: Conversation, tokens: int, supervised: int) -> tuple[int, ...] | str:
        try:
            self.collator.refuse_too_long(sample, tokens)
            refuse_unfit(sample, tokens, supervised, self.max_length)
        except ValueError as error:
            return str(error)
        return len(sample.images), tokens, supervised


def longest_sample(text_config) -> int | None:
    """The most tokens of a sample that a decoder reads: its context, or the sliding window of some layers."""
    limits = [limit for limit in (context(text_config), attention_window(text_config)) if limit is not None]
    return min(limits, default=None)


def refuse_unfit(sample: Conversation, tokens: int, supervised: int, max_length: int | None) -> None:
    """Raises a ValueError for a sample with too many tokens, or with none to learn."""
    if max_length is not None and tokens > max_length:
        raise ValueError(f"{sample.name}: it has {tokens} tokens, the limit is {max_length}.")
    if not supervised:
        raise ValueError(f"{sample.name}: there is no token to learn.")


def encode_one(collator: ConversationCollator, max_length: int | None, sample: Conversation) -> Encoded:
    """A sample's tensors.

    Raises:
        ValueError: if the sample cannot be trained on: a bad row or image, no token to learn, or too many tokens.
    """
    (encoded,) = collator.encoded([sample])
    refuse_unfit(sample, len(encoded), int((encoded.labels != IGNORE_INDEX).sum()), max_length)
    return encoded


class Report:
    """Writes down every sample that is not trained on, and stops a run that has too many of them.

    Each process and worker appends its own lines.

    Args:
        path: a .jsonl file.
        limit: the share of the samples that may be unusable.
        read: the number of samples; for a stream, the number read so far is passed with each failure.
    """

    def __init__(self, path: Path, limit: float, read: int = 0):
        self.path, self.limit, self.read = path, limit, read
        self.screened = 0
        self.failed: set[str] = set()  # names; one that fails in every epoch is one sample
        self.first = ""

    def start(self, skipped: Iterable[tuple[int, str, str]]) -> None:
        """Takes over what screening has found; the main process writes it, and keeps the failures of an interrupted run."""
        found = [(name, reason) for _, name, reason in skipped]
        if PartialState().is_main_process:
            failed = [line for line in self._lines() if "occurrence" in line]
            lines = [{"sample": name, "reason": reason} for name, reason in found]
            write_atomically(self.path, "".join(map(_line, lines + failed)))
        PartialState().wait_for_everyone()
        self.screened = len(found)
        self.failed = {line["sample"] for line in self._lines() if "occurrence" in line}
        self.first = next((_told(name, reason) for name, reason in found), "")
        self.refuse_if_too_many()

    def occurrences(self) -> set[str]:
        """The seeds of those that failed in training: a resumed run passes over them without trying again."""
        return {line["occurrence"] for line in self._lines() if "occurrence" in line}

    def add(self, name: str, reason: str, occurrence: str | None = None, read: int | None = None) -> None:
        """Records a sample that turns out to be unusable.

        Args:
            occurrence: its seed, in map-style training.
            read: the number of samples read, for a stream; too many failures then raise at once.

        Raises:
            ValueError: if a stream has too many.
        """
        line = {"sample": name, "reason": reason} | ({} if occurrence is None else {"occurrence": occurrence})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(line))
        self.failed.add(name)
        self.first = self.first or _told(name, reason)
        if read is not None:
            self.read = max(read, FIRST_VERDICT)
            self.refuse_if_too_many()

    def exchange(self) -> None:
        """Shares the failures that any process has found with all of them.

        Raises:
            ValueError: as `refuse_if_too_many`.
        """
        self.failed.update(gather_object(sorted(self.failed)))
        self.refuse_if_too_many()

    def refuse_if_too_many(self) -> None:
        """Stops a run with too many unusable samples.

        Raises:
            ValueError: if more than `limit` of the samples cannot be used.
        """
        unusable = self.screened + len(self.failed)
        if unusable > self.limit * self.read:
            raise ValueError(
                f"{unusable:,} of {self.read:,} samples cannot be used, more than the {self.limit:.2%} that "
                f"max_skipped allows; all are listed in {self.path}. The first: {self.first}"
            )

    def _lines(self) -> list[dict]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]


def _told(name: str, reason: str) -> str:
    return reason if name in reason else f"{name}: {reason}"


def _line(values: dict) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
