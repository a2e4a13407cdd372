"""Raw rows of a data set, wherever it is stored: by index, or as a stream of which each reader reads only its share.

JSON is read here rather than by `datasets`, which wants one type per column and gives up at the first bad line; here
one bad row costs only that row. A file is mapped into memory, not loaded; only the offsets of its rows are kept, and a row
is parsed when it is asked for. Everything else goes through `datasets`.
"""

import codecs
import glob
import hashlib
import json
import mmap
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prefixvlm.inference.loading import refuse_missing_path
from prefixvlm.train.data.tables import HeldRows, contents, object_rows, pickled_rows, table_rows

# the kinds of files, by what their names end in, where a folder has several the first
KINDS = {
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "lines": (".jsonl", ".ndjson"),
    "json": (".json",),
    "table": (".csv", ".tsv", ".txt", ".token"),
    "pickle": (".pkl",),
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a folder of images, as `datasets` knows it
SPLITS = ("train", "validation", "val", "dev", "test")
BATCH = 16  # rows of a stream that `datasets` reads at a time
LINE_FEED = 10
CHUNK = 2**26  # bytes searched for ends of lines at once
BEGINNING = 2**12  # bytes of a file, in which its first sign is
WHITESPACE = b" \t\r\n"
NO_WHITESPACE = re.compile(r"[^ \t\n\r]")
DECODER = json.JSONDecoder()

# where a row is, and a function that reads it: a dictionary, or a ValueError
Row = tuple[str, Callable[[], dict]]


class JsonRows:
    """Rows of .json or .jsonl files, by index.

    Args:
        files: paths, all of one kind.
        split: keep the rows whose key `split` has this value, and those without one; `None` for all. `a+b` is both.
        field: the key of a .json file's list of rows; `None` if the file is that list.

    Raises:
        ValueError: if a .json file as a whole cannot be read.
    """

    def __init__(self, files: list[str], split: str | None = None, field: str | None = None):
        self.files = files
        self._maps: dict[int, mmap.mmap | bytes] = {}
        places = []  # (rows, 4) per file: index of the file, first byte, the byte after the last, number of the row
        for number, file in enumerate(files):
            spans = _line_spans(file) if field is None and _has_lines(file) else _list_spans(file, field)
            places.append(np.column_stack([np.full(len(spans), number), spans, np.arange(1, len(spans) + 1)]))
        self.places = np.concatenate(places)
        wanted = [index for index in range(len(self.places)) if _is_wanted(self._bytes(index), split)]
        self.places = self.places[wanted]

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a map belongs to one process

    def __len__(self) -> int:
        return len(self.places)

    def where(self, index: int) -> str:
        file, _, _, number = self.places[index].tolist()
        return f"{self.files[file]}, row {number}"

    def __getitem__(self, index: int) -> dict:
        """One row.

        Raises:
            ValueError: if it is not valid JSON or not an object.
        """
        return _parsed(self._bytes(index))

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self)):
            digest.update(self._bytes(index) + b"\n")
        return digest.hexdigest()

    def _bytes(self, index: int) -> bytes:
        file, start, end, _ = self.places[index].tolist()
        if file not in self._maps:
            self._maps[file] = _mapped(self.files[file])
        return self._maps[file][start:end]


class TableRows:
    """Rows of a `datasets` table, by index."""

    def __init__(self, table, name: str):
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    def __getitem__(self, index: int) -> dict:
        return _unnested(self.table[index])

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do; computed by `datasets`."""
        return self.table._fingerprint


class RowStream(ABC):
    """Rows one after the other, from the start each time they are asked for.

    Several readers share the files (or shards); where there are fewer files than readers, those of one file read
    different rows of it.

    Args:
        name: of the data set.
        split: of its rows.
    """

    def __init__(self, name: str, split: str | None):
        self.name, self.split = name, split

    @abstractmethod
    def share(self, reader: int = 0, readers: int = 1) -> Iterator[Row]:
        """Yields the rows of one of several readers."""

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.name} {self.split}".encode(), digest_size=16).hexdigest()


class LineStream(RowStream):
    """The lines of .jsonl files. Readers that share a file each read the lines that start in their part of the bytes."""

    def __init__(self, files: list[str], name: str, split: str | None):
        super().__init__(name, split)
        self.files = files

    def share(self, reader: int = 0, readers: int = 1) -> Iterator[Row]:
        for index, part, parts in _assignments(len(self.files), reader, readers):
            path = self.files[index]
            size = Path(path).stat().st_size
            with open(path, "rb") as file:
                start, end = size * part // parts, size * (part + 1) // parts
                number = _line_feeds(file, start - 1)
                if start:  # a line that starts before belongs to the reader of the part before
                    file.readline()
                    number += 1
                while file.tell() < end:
                    line = file.readline()
                    number += 1
                    if _is_wanted(line, self.split):
                        yield f"{path}, row {number}", partial(_parsed, line.removesuffix(b"\n"))


class ListStream(RowStream):
    """The rows of .json files. Where they begin is known only once the whole file has been read."""

    def __init__(self, rows: JsonRows | HeldRows, name: str, split: str | None):
        super().__init__(name, split)
        self.rows = rows

    def share(self, reader: int = 0, readers: int = 1) -> Iterator[Row]:
        for index in range(reader, len(self.rows), readers):
            yield self.rows.where(index), partial(self.rows.__getitem__, index)


class TableStream(RowStream):
    """The rows of a `datasets` stream, by its shards; only the reader's own become Python objects."""

    def __init__(self, table, name: str, split: str | None):
        super().__init__(name, split)
        self.table = table.with_format("arrow")

    def share(self, reader: int = 0, readers: int = 1) -> Iterator[Row]:
        shards = self.table.num_shards
        for shard, part, parts in _assignments(shards, reader, readers):
            before = 0
            for batch in self.table.shard(shards, shard).iter(batch_size=BATCH):
                own = [row for row in range(len(batch)) if (before + row) % parts == part]
                for row, values in zip(own, batch.take(own).to_pylist(), strict=True):
                    of = f" of shard {shard + 1}" if shards > 1 else ""
                    yield f"{self.name}, row {before + row + 1}{of}", partial(_unnested, values)
                before += len(batch)


def read_rows(
    path: str,
    split: str | None = "train",
    streaming: bool = False,
    field: str | None = None,
    annotations: str | None = None,
    **hub: str | None,
) -> JsonRows | TableRows | HeldRows | RowStream:
    """The rows of a data set.

    Args:
        path: a .json or .jsonl file (also .gz), a table (.csv, .tsv, .txt, .token), .parquet or webdataset .tar files, .pkl
            files of plain rows, a glob of such files, a folder that holds some or images with their metadata, or the name
            of a data set on the Hub.
        split: of a data set; of rows here, those whose key `split` has this value, and those without one. `a+b` is both.
        streaming: read while training.
        field: where in a JSON file the list of rows is.
        annotations: the file with the answers to a file of questions.
        hub: `revision`, `token` and `cache_dir` of a data set on the Hub, as in `datasets`.

    Raises:
        ValueError: if there is nothing there, or a file as a whole cannot be read.
    """
    files = _files(path)
    kind = _kind(files[0]) if files else None
    hub = {name: value for name, value in hub.items() if value is not None}
    if files and hub:
        raise ValueError(f"{path} is on this machine; leave out {', '.join(hub)}, which are for data sets on the Hub.")
    if kind == "lines" and streaming and not any(file.lower().endswith(".gz") or not _has_lines(file) for file in files):
        return LineStream(files, path, split)
    if kind in ("lines", "json"):
        rows = _json_rows(files, split, field, annotations)
        return ListStream(rows, path, split) if streaming else rows
    if annotations is not None or field is not None:
        raise ValueError(f"{path} is no JSON file; leave out {'annotations' if annotations else 'field'}.")
    if kind in ("table", "pickle"):
        rows = (table_rows if kind == "table" else pickled_rows)(files).of_split(split)
        return ListStream(rows, path, split) if streaming else rows
    table = _table(path, files, kind, split or "train", streaming, hub)
    return (
        TableStream(table, "@".join(filter(None, (path, hub.get("revision")))), split)
        if streaming
        else TableRows(table, path)
    )


def _kind(file: str) -> str | None:
    """What a file is by its name, one of `KINDS`; `None` for any other."""
    name = file.lower().removesuffix(".gz")
    return next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), None)


def _json_rows(files: list[str], split: str | None, field: str | None, annotations: str | None) -> JsonRows | HeldRows:
    content = _object(files[0]) if field is None and len(files) == 1 else None
    if content is None:
        if annotations is not None:
            raise ValueError(f"{files[0]} is no file of questions; leave out annotations={annotations}.")
        return JsonRows(files, split, field)
    if any("sentences" in image for image in content.get("images") or [] if isinstance(image, dict)):
        return JsonRows(files, split, "images")  # Karpathy's splits
    return object_rows(files[0], content, annotations).of_split(split)


def _object(file: str) -> dict | None:
    """What a file holds that is one JSON object; `None` for any other."""
    content = _mapped(file)
    if not content[:BEGINNING].lstrip(codecs.BOM_UTF8 + WHITESPACE).startswith(b"{") or _has_lines(file):
        return None
    try:
        return json.loads(bytes(content).removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error


def _has_lines(file: str) -> bool:
    """Whether each line of a JSON file is a row: by its name, unless its first lines show that it is not so."""
    content = _mapped(file)
    if _kind(file) == "json" and not content[:BEGINNING].lstrip(codecs.BOM_UTF8 + WHITESPACE).startswith(b"{"):
        return False
    first, _, rest = bytes(content[:CHUNK]).removeprefix(codecs.BOM_UTF8).lstrip(WHITESPACE).partition(b"\n")
    is_alone = not rest.strip(WHITESPACE)
    try:
        value = json.loads(first)
    except ValueError:
        value = None
    if _kind(file) == "lines":
        is_array = value is None and first.rstrip(WHITESPACE) in (b"[", b"[{")
        return not (is_array or (is_alone and isinstance(value, list) and all(isinstance(row, dict) for row in value)))
    return isinstance(value, dict) and not is_alone


def _assignments(shards: int, reader: int, readers: int) -> Iterator[tuple[int, int, int]]:
    """Yields (shard, part, parts) for what one reader reads: whole shards, or one part of one."""
    if shards >= readers:
        yield from ((shard, 0, 1) for shard in range(reader, shards, readers))
    else:
        shard = reader % shards
        yield shard, reader // shards, len(range(shard, readers, shards))


def _parsed(row: bytes) -> dict:
    try:
        values = json.loads(row)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def _unnested(row: dict) -> dict:
    """A webdataset's row, with what its .json file holds beside the other files of the sample."""
    nested = row.get("json") if "__key__" in row else None
    return {**nested, **row} if isinstance(nested, dict) else dict(row)


def _is_wanted(row: bytes, split: str | None) -> bool:
    if not row.strip():
        return False
    if split is None or b'"split"' not in row:
        return True
    try:
        own = _parsed(row).get("split")
    except ValueError:
        return True  # wanted, so that it is reported
    return own is None or own in split.split("+")


def _mapped(file: str) -> mmap.mmap | bytes:
    if file.lower().endswith(".gz"):
        return contents(file)
    with open(file, "rb") as opened:
        if not Path(file).stat().st_size:
            return b""  # which cannot be mapped
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _line_spans(file: str) -> np.ndarray:
    """(rows, 2): first byte, and the one after the last, of each line."""
    content = np.frombuffer(_mapped(file), dtype=np.uint8)
    chunks = range(0, len(content), CHUNK)
    found = [np.flatnonzero(content[start : start + CHUNK] == LINE_FEED) + start for start in chunks]
    if len(content) and content[-1] != LINE_FEED:
        found.append(np.array([len(content)]))
    ends = np.concatenate([[], *found]).astype(np.int64)
    starts = np.concatenate([[0], ends + 1])[: len(ends)]
    return np.column_stack([starts, ends])


def _line_feeds(file: BinaryIO, size: int) -> int:
    """The number of line feeds in the next `size` bytes of a file, which are thereby read."""
    count = 0
    while size > 0:
        chunk = file.read(min(size, CHUNK))
        count += chunk.count(b"\n")
        size -= len(chunk)
    return count


def _list_spans(file: str, field: str | None) -> np.ndarray:
    """As `_line_spans`, of the entries of a JSON list, which are parsed one by one to find them."""
    content = bytes(_mapped(file))
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        # a byte that is no UTF-8 is bad in its own row alone
        text = content[mark:].decode(errors="surrogateescape")
        start = _list_start(text, field)
        if start is not None:
            return _entry_spans(text, start, is_whole=field is None) + mark
        json.loads(text)  # raises where something is broken
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    raise ValueError(f"{file}: expected a list of objects{f' under {field!r}' if field else ''}.")


def _list_start(text: str, field: str | None) -> int | None:
    """The place of the bracket that opens a file's list, or the one below its key `field`."""
    place = _skip(text, 0)
    if field is not None:
        if not text.startswith("{", place):
            return None
        key, value_end = None, place
        while key != field:
            place = _skip(text, value_end) + 1  # after the brace or comma
            if text.startswith("}", place - 1):
                return None
            key, place = DECODER.raw_decode(text, _skip(text, place))
            place = _skip(text, _expect(text, _skip(text, place), ":"))
            if key != field:
                _, value_end = DECODER.raw_decode(text, place)
    return place if text.startswith("[", place) else None


def _entry_spans(text: str, place: int, is_whole: bool) -> np.ndarray:
    """As `_list_spans`, of the list whose bracket is at `place`; nothing may follow it if it is the whole file."""
    is_ascii = text.isascii()

    def size(start: int, end: int) -> int:
        """In bytes, which is what places in a file are counted in."""
        return end - start if is_ascii else len(text[start:end].encode(errors="surrogateescape"))

    spans: list[tuple[int, int]] = []
    seen, seen_bytes = 0, 0
    place = _skip(text, place + 1)
    while not text.startswith("]", place):
        if spans:
            place = _skip(text, _expect(text, place, ","))
        _, end = DECODER.raw_decode(text, place)
        start_byte = seen_bytes + size(seen, place)
        seen, seen_bytes = end, start_byte + size(place, end)
        spans.append((start_byte, seen_bytes))
        place = _skip(text, end)
    if is_whole and (rest := _skip(text, place + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _skip(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    found = NO_WHITESPACE.search(text, place)
    return found.start() if found else len(text)


def _expect(text: str, place: int, sign: str) -> int:
    if not text.startswith(sign, place):
        raise json.JSONDecodeError(f"Expecting {sign!r} delimiter", text, place)
    return place + 1


def _files(path: str) -> list[str]:
    """The files a path stands for; none if it can only be a Hub id, and for a folder of images with metadata."""
    if any(sign in path for sign in "*?["):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise ValueError(f"{path}: no file matches.")
    elif Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).rglob("*") if _kind(str(file)))
        if any(Path(file).name in METADATA for file in found):
            return []
        kinds = {kind: [file for file in found if _kind(file) == kind and not file.endswith(".txt")] for kind in KINDS}
        kind, files = next(((kind, files) for kind, files in kinds.items() if files), (None, []))
        if kind is None:
            raise ValueError(f"{path}: the folder has no .parquet, .tar, .jsonl, .json, .csv, .tsv, .token or .pkl file.")
        if kind not in ("parquet", "webdataset") and len(files) > 1:
            raise ValueError(f"{path}: the folder has several files of rows; name one of {', '.join(files[:5])}.")
    elif _kind(path) or Path(path).is_file():
        files = [path]
    else:
        refuse_missing_path(path)
        return []
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"{missing[0]}: there is no such file.")
    if unknown := [file for file in files if _kind(file) is None]:
        known = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
        raise ValueError(f"{unknown[0]} is of no kind that is read: {known}.")
    if len({_kind(file) for file in files}) > 1:
        raise ValueError(f"{path}: files of several kinds match; name those of one kind.")
    return files


def _table(path: str, files: list[str], kind: str | None, split: str, streaming: bool, hub: dict):
    import datasets

    if Path(path).is_dir() and files:
        files = _of_split(files, split, path)
    try:
        if kind is not None:
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
        elif Path(path).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=path, split=split, streaming=streaming)
        else:
            rows = datasets.load_dataset(path, split=split, streaming=streaming, **hub)
    except Exception as error:  # datasets raises errors of many kinds for data that is not there
        raise ValueError(f"The data set {path} cannot be loaded ({_line(error)}).") from error
    features = rows.features or rows._resolve_features().features
    for name, feature in features.items():
        image = datasets.Image(decode=False)
        # undecoded, so that a bad image is named by `load_image`, not by a decoder somewhere in between
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, image)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.Sequence(image))
    return rows


def _of_split(files: list[str], split: str, path: str) -> list[str]:
    """The files of a folder that belong to a split, where file names tell splits apart (train-00000-of-00004.parquet)."""
    splits = {file: re.split("[^a-z]", Path(file).name)[0] for file in files}
    if not set(splits.values()) & set(SPLITS):
        return files
    chosen = [file for file in files if splits[file] in split.split("+")]
    if not chosen:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(sorted(set(splits.values())))}.")
    return chosen


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
