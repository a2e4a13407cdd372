"""Where training samples come from: data sets by the name of their form, mixtures of them, indexed or streamed."""

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from prefixvlm.train.data import easy_vqa
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.forms import FORMS, Form, detect, form_name
from prefixvlm.train.data.pictures import PictureFinder
from prefixvlm.train.data.rows import JsonRows, RowStream, TableRows, read_rows
from prefixvlm.train.data.tables import HeldRows
from prefixvlm.train.recipes.checking import did_you_mean, refuse_unknown_keys

SHUFFLE_BUFFER = 1000  # samples that a stream is shuffled in
LOOKED_AT = 20  # rows, to find out what they are

# where a sample of a stream comes from, and a function that makes it, which may raise a ValueError
Maker = tuple[str, Callable[[], Conversation]]


def load(source: str, **options) -> "Samples | Mixture | Stream | MixedStream":
    """The samples of a source named in a recipe.

    Raises:
        ValueError: for an unknown source or option, or data that does not have the source's form.
    """
    if source not in SOURCES:
        raise ValueError(f"There is no data source {source!r}; {did_you_mean(source, SOURCES)}")
    try:
        refuse_unknown_keys(options, options_of(source))
    except ValueError as error:
        raise ValueError(f"The data source {source}: {error}") from error
    try:
        samples = SOURCES[source](**options)
    except TypeError as error:
        raise ValueError(f"The data source {source} was given wrong options ({error}).") from error
    if not is_stream(samples) and not len(samples):
        raise ValueError(f"The data source {source} with {without_token(options)} has no rows.")
    return samples


def options_of(source: str) -> list[str]:
    """The names of the options of a source."""
    named = [name for name in inspect.signature(SOURCES[source]).parameters if name not in ("form", "keys")]
    forms = [FORMS[source]] if source in FORMS else FORMS.values() if source == "auto" else []
    return named + (["image", *dict.fromkeys(key for form in forms for key in form.keys)] if forms else [])


def without_token(options: dict) -> dict:
    """The settings of a source, or of the parts of a mixture, without the secret that a record must not keep."""
    shown = {name: value for name, value in options.items() if name != "token"}
    if isinstance(parts := shown.get("parts"), list):
        shown["parts"] = [without_token(part) if isinstance(part, dict) else part for part in parts]
    return shown


def described(samples) -> str:
    """Which formats samples are of, and the keys that are read of their rows."""
    if isinstance(samples, Mixture | MixedStream):
        return "; ".join(map(described, samples.sources))
    if isinstance(samples, Samples | Stream):
        return samples.described
    return described(samples.whole) if hasattr(samples, "whole") else "easy-VQA"


def is_stream(samples) -> bool:
    """Whether samples come one after the other, without a length."""
    return isinstance(samples, Stream | MixedStream)


class Samples:
    """Conversations by index, made from rows when they are asked for.

    Args:
        rows: by index: `JsonRows`, `TableRows` or `HeldRows`.
        form: what the rows mean.
    """

    def __init__(self, rows: JsonRows | TableRows | HeldRows, form: Form):
        self.rows, self.form = rows, form
        self._ends = None  # of each row's samples, where a row may have several
        if form.has_parts:
            self._ends = np.cumsum([form.count(partial(rows.__getitem__, index)) for index in range(len(rows))])

    def __len__(self) -> int:
        return len(self.rows) if self._ends is None else int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[int, int]:
        """The row of a sample, and which of the row's samples it is."""
        if self._ends is None:
            return index, 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)

    @property
    def described(self) -> str:
        """The form, and the keys of the first row that can be read."""
        for index in range(min(LOOKED_AT, len(self.rows))):
            try:
                return f"{form_name(self.form)} ({', '.join(self.form.read_keys(self.rows[index]).values())})"
            except ValueError:
                continue
        return form_name(self.form)

    def row(self, index: int) -> int:
        """Which row a sample is of."""
        return self._place(index)[0]

    def name(self, index: int) -> str:
        """Where a sample comes from: its file, its row and, of several texts, which one."""
        row, part = self._place(index)
        return self.form.name(self.rows.where(row), part)

    def __getitem__(self, index: int) -> Conversation:
        row, part = self._place(index)
        return self.form.sample(partial(self.rows.__getitem__, row), part, self.name(index))

    @property
    def fingerprint(self) -> str:
        return _digest(self.rows.fingerprint, repr(self.form))


class InMemory(list):
    """A list of conversations, as samples."""

    def name(self, index: int) -> str:
        return self[index].name

    @property
    def fingerprint(self) -> str:
        return _digest(*(str(sample.turns) for sample in self))


class Stream:
    """Conversations one after the other, shuffled among the next `shuffle_buffer` of the reader's own.

    Args:
        rows: a `RowStream`.
        form: what the rows mean.
        shuffle_buffer: 1 keeps the order of the rows.
    """

    def __init__(self, rows: RowStream, form: Form, shuffle_buffer: int = SHUFFLE_BUFFER):
        self.rows, self.form, self.shuffle_buffer = rows, form, shuffle_buffer

    def epoch(self, seed: str, reader: int = 0, readers: int = 1) -> Iterator[Maker]:
        """Yields one pass over the share of one of several readers; see `Maker`."""
        return _shuffled(self._in_order(reader, readers), self.shuffle_buffer, random.Random(seed))

    def _in_order(self, reader: int, readers: int) -> Iterator[Maker]:
        for where, read in self.rows.share(reader, readers):
            read = cache(read)  # a row of several texts is parsed once
            for part in range(self.form.count(read)):
                name = self.form.name(where, part)
                yield name, partial(self.form.sample, read, part, name)

    @property
    def described(self) -> str:
        """The form."""
        return form_name(self.form)

    @property
    def fingerprint(self) -> str:
        return _digest(self.rows.fingerprint, repr(self.form), str(self.shuffle_buffer))


class Mixture:
    """Several sources as one, each with its share of the samples of an epoch.

    An epoch is as long as it takes to see every sample of every source at least once; smaller sources are repeated,
    whole rounds first and then as many as still fit, spread evenly.
    """

    def __init__(self, sources: list[Samples], weights: list[float]):
        self.sources, self.weights = sources, weights
        total = sum(weights)
        length = max(len(source) * total / weight for source, weight in zip(sources, weights, strict=True))
        self.places = []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            wanted = max(len(source), round(length * weight / total))
            rounds, rest = divmod(wanted, len(source))
            again = [index * len(source) // rest for index in range(rest)]
            self.places += [(number, index) for index in [*list(range(len(source))) * rounds, *again]]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        number, inner = self.places[index]
        return self.sources[number].name(inner)

    def __getitem__(self, index: int) -> Conversation:
        number, inner = self.places[index]
        return self.sources[number][inner]

    @property
    def fingerprint(self) -> str:
        return _digest(*(source.fingerprint for source in self.sources), str(self.weights))


class MixedStream:
    """Several streams as one, each sample drawn from a source at random by its weight.

    A pass ends when every source has been read to its end at least once; those that end sooner start again.
    """

    def __init__(self, sources: list[Stream], weights: list[float]):
        self.sources, self.weights = sources, weights

    def epoch(self, seed: str, reader: int = 0, readers: int = 1) -> Iterator[Maker]:
        draw = random.Random(seed)
        rounds = [0] * len(self.sources)
        streams = [source.epoch(f"{seed}.{number}.0", reader, readers) for number, source in enumerate(self.sources)]
        while True:
            number = draw.choices(range(len(streams)), self.weights)[0]
            try:
                yield next(streams[number])
            except StopIteration:
                rounds[number] += 1
                if all(rounds):
                    return
                streams[number] = self.sources[number].epoch(f"{seed}.{number}.{rounds[number]}", reader, readers)

    @property
    def fingerprint(self) -> str:
        return _digest(*(source.fingerprint for source in self.sources), str(self.weights))


def rows_as(
    form: str | None,
    path: str,
    images: str | None = None,
    split: str = "train",
    streaming: bool = False,
    shuffle_buffer: int | None = None,
    field: str | None = None,
    annotations: str | None = None,
    hosts: list[str] | None = None,
    allow_text_only: bool | None = None,
    images_without_place: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    **keys: str,
):
    """The samples of rows that are alike.

    Args:
        form: of `FORMS`; `None` for the one that the first rows look like.
        path, split, streaming, field, annotations, revision, token, cache_dir: see `read_rows`.
        images: folder of the images that rows name, by default that of `path`.
        shuffle_buffer: see `Stream`.
        hosts: whose addresses of images may be fetched; others are refused.
        allow_text_only, images_without_place: see `Form`.
        keys: the rows' own name of `image`, and of what the form reads (`question`, `answer`, `texts`, ...).
    """
    folder = _image_folder(path, images)
    if not isinstance(hosts, list | None) or not all(isinstance(host, str) for host in hosts or []):
        raise ValueError(f"`hosts` must be a list of host names, not {hosts!r}.")
    if images_without_place not in (None, "front"):
        raise ValueError(f"`images_without_place` is {images_without_place!r}; it can be front.")
    rows = read_rows(path, split, streaming, field, annotations, revision=revision, token=token, cache_dir=cache_dir)
    name = form or _detected(rows, path)
    unknown = keys.keys() - {"image", *FORMS[name].keys}
    if unknown:
        refuse_unknown_keys(dict.fromkeys(unknown), ["image", *FORMS[name].keys])
    pictures = PictureFinder(folder, by_address=images is not None, hosts=hosts or ())
    made = FORMS[name](pictures, keys, allow_text_only, images_without_place)
    if isinstance(rows, RowStream):
        return Stream(rows, made, SHUFFLE_BUFFER if shuffle_buffer is None else shuffle_buffer)
    if shuffle_buffer is not None:
        raise ValueError("`shuffle_buffer` is for streaming; without it all samples are shuffled.")
    return Samples(rows, made)


def _detected(rows, path: str) -> str:
    """The form of the first rows that can be read."""
    if isinstance(rows, RowStream):
        readers = (read for _, read in rows.share())
    else:
        readers = (partial(rows.__getitem__, index) for index in range(len(rows)))
    first = []
    for _, read in zip(range(LOOKED_AT), readers, strict=False):
        try:
            first.append(read())
        except ValueError:
            continue  # it is reported when it is its turn
    if not first:
        raise ValueError(f"{path} has no row that can be read.")
    try:
        return detect(first)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def mixture(parts: list[dict]):
    """Several sources: a list of their settings, each with a `weight` (default 1), its share of the samples."""
    are_sources = isinstance(parts, list) and all(
        isinstance(one, dict) and {"source", "path"} & one.keys() for one in parts
    )
    if not are_sources or not parts:
        raise ValueError("A mixture's `parts` must be a list of data sources, each with its `source` or `path`.")
    weights = [part.get("weight", 1) for part in parts]
    if any(isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0 for weight in weights):
        raise ValueError(f"The weights of a mixture must be positive numbers, not {weights}.")
    sources = [load(**{"source": "auto", **{name: part[name] for name in part if name != "weight"}}) for part in parts]
    streams = [is_stream(source) for source in sources]
    if any(streams) != all(streams):
        raise ValueError("A mixture is streamed as a whole or not at all; set `streaming` in all of its parts or in none.")
    mixed: Any = MixedStream if all(streams) else Mixture
    return mixed(sources, weights)


def _image_folder(path: str, images: str | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise ValueError(f"{images}: there is no such folder of images.")
        return Path(images)
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _shuffled(items: Iterator, buffer: int, source: random.Random) -> Iterator:
    held = []
    for item in items:
        held.append(item)
        if len(held) >= buffer:
            chosen = source.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            yield held.pop()
    source.shuffle(held)
    yield from held


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


SOURCES: dict[str, Callable] = {
    "easy_vqa_captions": lambda split: InMemory(easy_vqa.captions(split)),
    "easy_vqa_conversations": lambda split: InMemory(easy_vqa.conversations(split)),
    "mixture": mixture,
    "auto": partial(rows_as, None),
    **{name: partial(rows_as, name) for name in FORMS},
}
