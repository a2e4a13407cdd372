"""Where training samples come from: each source turns its rows into `Conversation`s."""

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from prefixvlm.train.data import easy_vqa
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.rows import TEXT, RowStream, RowTable, parsed, read_rows

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHUFFLE_BUFFER = 1000  # samples a stream is shuffled among


def load(source: str, **options) -> "Samples | Mixture | Stream | MixedStream":
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
    if not is_stream(samples) and not len(samples):
        raise ValueError(f"The data source {source} with {options} has no rows.")
    return samples


def is_stream(samples) -> bool:
    """Whether samples come one after the other, without a length."""
    return isinstance(samples, Stream | MixedStream)


class Samples:
    """Conversations by number, made from rows when they are asked for.

    Args:
        rows: a `RowTable`.
        form: one of the forms below.
    """

    def __init__(self, rows: RowTable, form: "Form"):
        self.rows, self.form = rows, form
        counts = (_parts(form, partial(rows.__getitem__, index)) for index in range(len(rows)))
        self.places = [(index, part) for index, count in enumerate(counts) for part in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Where a sample stands: its file, its row and, of several, its text."""
        row, part = self.places[index]
        return _name(self.form, self.rows.where(row), part)

    def __getitem__(self, index: int) -> Conversation:
        row, part = self.places[index]
        return _made(self.form, lambda: self.rows[row], part, self.name(index))

    @property
    def fingerprint(self) -> str:
        return _digest(self.rows.fingerprint, repr(self.form))


class InMemory(list):
    """Conversations that are all there."""

    def name(self, index: int) -> str:
        return self[index].name

    @property
    def fingerprint(self) -> str:
        return _digest(*(f"{sample.images} {sample.turns}" for sample in self))


class Stream:
    """Conversations one after the other, shuffled among the next `shuffle_buffer`.

    Args:
        rows: a `RowStream`.
        form: one of the forms below.
        shuffle_buffer: 1 keeps the order of the rows.
    """

    def __init__(self, rows: RowStream, form: "Form", shuffle_buffer: int = SHUFFLE_BUFFER):
        self.rows, self.form, self.shuffle_buffer = rows, form, shuffle_buffer

    def epoch(self, seed: str) -> Iterator[tuple[str, Callable[[], Conversation]]]:
        """Yields one pass over the rows: where each sample stands, and what makes it, which may raise a ValueError."""
        return _shuffled(self._in_order(), self.shuffle_buffer, random.Random(seed))

    def _in_order(self):
        for where, row in self.rows:
            read = partial(parsed, row[TEXT]) if list(row) == [TEXT] else partial(dict, row)
            for part in range(_parts(self.form, read)):
                name = _name(self.form, where, part)
                yield name, partial(_made, self.form, read, part, name)

    @property
    def fingerprint(self) -> str:
        return _digest(self.rows.fingerprint, repr(self.form), str(self.shuffle_buffer))


class Mixture:
    """Several sources as one, each with its share of the samples of an epoch.

    An epoch is as long as it takes to see every sample of every source at least once; smaller sources are gone over
    again, whole rounds first and then as many as still fit, spread evenly.
    """

    def __init__(self, sources: list[Samples], weights: list[float]):
        self.sources = sources
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
        return _digest(*(source.fingerprint for source in self.sources), str(len(self)))


class MixedStream:
    """Several streams as one, each sample drawn from a source at random by its weight.

    A pass ends when every source has been read to its end at least once; those that end sooner start again.
    """

    def __init__(self, sources: list[Stream], weights: list[float]):
        self.sources, self.weights = sources, weights

    def epoch(self, seed: str) -> Iterator[tuple[str, Callable[[], Conversation]]]:
        draw = random.Random(seed)
        rounds = [0] * len(self.sources)
        streams = [source.epoch(f"{seed}.{number}.0") for number, source in enumerate(self.sources)]
        while True:
            number = draw.choices(range(len(streams)), self.weights)[0]
            try:
                yield next(streams[number])
            except StopIteration:
                rounds[number] += 1
                if all(rounds):
                    return
                streams[number] = self.sources[number].epoch(f"{seed}.{number}.{rounds[number]}")

    @property
    def fingerprint(self) -> str:
        return _digest(*(source.fingerprint for source in self.sources), str(self.weights))


class Form:
    """How the rows of one kind of data set become conversations.

    Each form has `turns(row, part)`, the (role, text) pairs of one sample. Where a row may hold several, `has_parts` is set
    and `parts(row)` counts them.
    """

    has_parts = False

    def __init__(self, folder: Path):
        self.folder = folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items() if k != 'folder')})"

    def images(self, row: dict) -> list:
        """The images of a row: bytes or PIL images as they are, paths below the data's own folder."""
        found = row.get("images") if row.get("image") is None else row["image"]
        if found is None:
            return []
        return [self._inside(image) for image in (found if isinstance(found, list) else [found])]

    def _inside(self, image):
        path = image
        if isinstance(image, dict):
            if image.get("bytes") is not None:
                return image
            path = image.get("path")
        if not isinstance(path, str):
            return path
        parts = PurePosixPath(path.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or path[1:2] == ":":
            raise ValueError(f"the image {path} lies outside {self.folder}; give a path below it")
        return str(self.folder / path)


class LlavaForm(Form):
    """`id, image, conversations[{from, value}]`, as LLaVA-ReCap, LLaVA-NeXT-Data and LLaVA's own JSON have it."""

    def turns(self, row, part):
        try:
            turns = [(LLAVA_ROLES[turn["from"]], _text(turn["value"])) for turn in row["conversations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"`conversations` must be a list of {{from, value}} turns ({error!r})") from error
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


def llava(path: str, images: str | None = None, split: str = "train", streaming: bool = False, **options):
    """Rows of LLaVA's form; `read_rows` says what `path` may be. Images lie below `images`, by default beside `path`."""
    return _samples(read_rows(path, split, streaming), LlavaForm(_image_folder(path, images)), **options)


def vqa(
    path: str,
    images: str | None = None,
    split: str = "train",
    streaming: bool = False,
    question: str = "question",
    answer: str = "answer",
    **options,
):
    """Rows with a question and an answer; `question` and `answer` name their keys."""
    form = VqaForm(_image_folder(path, images), question, answer)
    return _samples(read_rows(path, split, streaming), form, **options)


def captions(
    path: str, images: str | None = None, split: str = "train", streaming: bool = False, texts: str = "texts", **options
):
    """Rows with an image and its texts; `texts` names their key."""
    form = CaptionsForm(_image_folder(path, images), texts)
    return _samples(read_rows(path, split, streaming), form, **options)


def karpathy(path: str, images: str, split: str = "train", **options):
    """Karpathy's splits of Flickr8k, Flickr30k and COCO: dataset_*.json, and the folder with the pictures."""
    rows = read_rows(path, split, field="images")
    return _samples(rows, KarpathyForm(Path(images)), **options)


def mixture(parts: list[dict]):
    """Several sources: a list of their settings, each with a `weight` (default 1), its share of the samples."""
    if not isinstance(parts, list) or not parts or any(not isinstance(p, dict) or "source" not in p for p in parts):
        raise ValueError("A mixture's `parts` must be a list of data sources, each with its `source`.")
    weights = [part.get("weight", 1) for part in parts]
    if any(isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0 for weight in weights):
        raise ValueError(f"The weights of a mixture must be positive numbers, not {weights}.")
    sources = [load(**{name: value for name, value in part.items() if name != "weight"}) for part in parts]
    streams = [is_stream(source) for source in sources]
    if any(streams) != all(streams):
        raise ValueError("A mixture is streamed as a whole or not at all; set `streaming` in all of its parts or in none.")
    return (MixedStream if all(streams) else Mixture)(sources, weights)


def _samples(rows, form: Form, shuffle_buffer: int | None = None):
    if isinstance(rows, RowStream):
        return Stream(rows, form, SHUFFLE_BUFFER if shuffle_buffer is None else shuffle_buffer)
    if shuffle_buffer is not None:
        raise ValueError("`shuffle_buffer` is for streaming; without it all samples are shuffled.")
    return Samples(rows, form)


def _image_folder(path: str, images: str | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise ValueError(f"{images}: there is no such folder of images.")
        return Path(images)
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _parts(form: Form, read: Callable[[], dict]) -> int:
    """How many samples a row holds; one that cannot be read counts as one, which is reported when it is asked for."""
    if not form.has_parts:
        return 1
    try:
        return form.parts(read())
    except ValueError:
        return 1


def _name(form: Form, where: str, part: int) -> str:
    return f"{where}, text {part + 1}" if form.has_parts else where


def _made(form: Form, read: Callable[[], dict], part: int, name: str) -> Conversation:
    try:
        row = read()
        turns = form.turns(row, part)
        if not any(role == "assistant" and text for role, text in turns):
            raise ValueError("there is no text to learn")
        return Conversation(form.images(row), turns, name)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removesuffix('.')}.") from error


def _field(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"`{key}` must be a text, not {row.get(key)!r}")
    return _text(row[key])


def _text(value) -> str:
    """A text without the placeholder that LLaVA's rows put where the image goes."""
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, not {value!r}")
    return value.replace("<image>", "").strip()


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


SOURCES = {
    "easy_vqa_captions": lambda split: InMemory(easy_vqa.captions(split)),
    "easy_vqa_conversations": lambda split: InMemory(easy_vqa.conversations(split)),
    "llava": llava,
    "vqa": vqa,
    "captions": captions,
    "karpathy": karpathy,
    "mixture": mixture,
}
