"""Rows of files that are read whole: tables of text, pickled lists, JSON objects whose rows are spread over several lists.

`datasets` wants one type per column and gives up at the first bad line; here one bad row costs only that row.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

BROKEN = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are no UTF-8
TOKEN_LINE = re.compile(r"(?P<image>.+\.\w+)#\d+\t(?P<caption>.*)")  # of Flickr8k and Flickr30k
DELIMITERS = ",;|\t"
CAPTION_OF, QUESTIONS, ANNOTATIONS = "texts", "questions", "annotations"
WITHIN_AN_ID = "image.png"  # ScienceQA's name of every picture, in a folder that is named after the question


class HeldRows:
    """Rows in memory, by index.

    Args:
        rows: dictionaries, or the reason why one cannot be read.
        names: where each comes from.
    """

    def __init__(self, rows: list[dict | str], names: list[str]):
        self.rows, self.names = rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> dict:
        """One row.

        Raises:
            ValueError: if it could not be read.
        """
        row = self.rows[index]
        if isinstance(row, str):
            raise ValueError(row)
        return dict(row)

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def of_split(self, split: str | None) -> "HeldRows":
        """The rows whose key `split` has this value, and those without one."""
        wanted = [
            place
            for place, row in enumerate(self.rows)
            if split is None or isinstance(row, str) or row.get("split") in (None, *split.split("+"))
        ]
        return HeldRows([self.rows[place] for place in wanted], [self.names[place] for place in wanted])


def contents(file: str) -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz.

    Raises:
        ValueError: if it cannot be unpacked.
    """
    content = Path(file).read_bytes()
    if not file.lower().endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be unpacked ({error}).") from error


def table_rows(files: list[str]) -> HeldRows:
    """The rows of .csv, .tsv, .txt and .token files.

    The first line names the columns, except in Flickr's token files, `image.jpg#0<tab>caption`.

    Raises:
        ValueError: for a file that is no such table.
    """
    return _held(files, _table)


def pickled_rows(files: list[str]) -> HeldRows:
    """The rows of PathVQA's own .pkl files: lists of dictionaries.

    Raises:
        ValueError: for a file that is none, or holds more than lists, dictionaries, texts and numbers; its code is not run.
    """
    return _held(files, _unpickled)


def _held(files: list[str], read: Callable[[str], Iterable[tuple[int, dict | str]]]) -> HeldRows:
    rows: list[dict | str] = []
    names: list[str] = []
    for file in files:
        for number, row in read(file):
            rows.append(row)
            names.append(f"{file}, row {number}")
    return HeldRows(rows, names)


def object_rows(path: str, content: dict, annotations: str | None = None) -> HeldRows:
    """The rows of a JSON object.

    COCO's and NoCaps' captions, VQAv2's and its brothers' questions with the answers in another file, entries by their
    ids as of GQA and ScienceQA, or one list under any key as of TextVQA.

    Args:
        path: of the file.
        content: what it holds.
        annotations: the file with the answers to a file of questions; by default the one beside it that is named alike.

    Raises:
        ValueError: in one sentence that says what the file is, if it holds no rows.
    """
    lists = {name: value for name, value in content.items() if _is_list_of_objects(value)}
    if QUESTIONS in lists and not any("answer" in row or "answers" in row for row in lists[QUESTIONS][:1]):
        return _joined(path, lists[QUESTIONS], annotations)
    if annotations is not None:
        raise ValueError(f"{path} is no file of questions; leave out annotations={annotations}.")
    if "images" in lists and ANNOTATIONS in lists:
        return _by_image(path, lists["images"], lists[ANNOTATIONS])
    if ANNOTATIONS in lists and "question_id" in lists[ANNOTATIONS][0] and "question" not in lists[ANNOTATIONS][0]:
        raise ValueError(
            f"{path} has VQAv2's answers without their questions; give the file of questions "
            f"(..._{QUESTIONS}.json), and this one as `annotations` unless it is named alike."
        )
    if len(lists) == 1 or "data" in lists:
        name, rows = ("data", lists["data"]) if "data" in lists else next(iter(lists.items()))
        return HeldRows(rows, [f"{path}, row {number} of {name}" for number in range(1, len(rows) + 1)])
    if content and not lists and all(isinstance(value, dict) for value in content.values()):
        return HeldRows([_with_id(key, row) for key, row in content.items()], [f"{path}, entry {key}" for key in content])
    raise ValueError(
        f"{path} is an object with the keys {', '.join(map(str, list(content)[:8])) or '(none)'}; expected a list of "
        "rows, COCO's images and annotations, VQAv2's questions, or entries by their ids."
    )


def _is_list_of_objects(value) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _with_id(key: str, row: dict) -> dict:
    picture = row.get("image")
    if picture == WITHIN_AN_ID:
        picture = "/".join(filter(None, (row.get("split"), key, picture)))
    return {"id": key, **row} | ({"image": picture} if "image" in row else {})


def _by_image(path: str, images: list[dict], entries: list[dict]) -> HeldRows:
    """One row for each image, with its captions."""
    if not any("caption" in entry for entry in entries):
        raise ValueError(f"{path} has annotations without captions (COCO's instances or key points); give captions_*.json.")
    texts: dict = {}
    names: dict = {}
    rows: list[dict | str] = []
    for number, entry in enumerate(entries, start=1):
        texts.setdefault(entry.get("image_id"), []).append(entry.get("caption"))
        names.setdefault(entry.get("image_id"), f"{path}, annotation {number}")
    known = []
    for image in images:
        identifier = image.get("id")
        file = image.get("file_name") or image.get("coco_url")
        rows.append({"image_id": identifier, "file_name": file, CAPTION_OF: texts.pop(identifier, [])})
        known.append(f"{path}, image {identifier}")
    lost: list[dict | str] = [f"its image_id {identifier} is none of the file's images" for identifier in texts]
    return HeldRows(rows + lost, known + [names[identifier] for identifier in texts])


def _joined(path: str, questions: list[dict], annotations: str | None) -> HeldRows:
    """Questions with the answers to them from another file."""
    file = Path(annotations) if annotations else _answers_of(Path(path))
    if file is None or not file.is_file():
        raise ValueError(
            f"{path} has questions without answers; give the file with the answers as `annotations`"
            + (f", or put it beside: {file}." if file else ".")
        )
    try:
        content = json.loads(file.read_bytes())
        answers = {entry["question_id"]: entry for entry in content[ANNOTATIONS]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected annotations[{{question_id, answers}}] ({error!r}).") from error
    rows: list[dict | str] = []
    for question in questions:
        answer = answers.get(question.get("question_id"))
        rows.append("no answer has its question_id" if answer is None else {**question, **answer})
    return HeldRows(rows, [f"{path}, question {question.get('question_id')}" for question in questions])


def _answers_of(path: Path) -> Path | None:
    """Where VQAv2, OK-VQA and VizWiz have the answers to a file of questions."""
    if QUESTIONS not in path.name:
        return None
    return path.with_name(path.name.replace("OpenEnded_", "").replace(QUESTIONS, ANNOTATIONS))


def _table(file: str) -> Iterator[tuple[int, dict | str]]:
    """Yields (number, row)."""
    content = contents(file)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{file} is UTF-16 text; save it as UTF-8.")
    # a byte that is no UTF-8 is bad in its own row alone
    text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    lines = text.splitlines()
    if lines and TOKEN_LINE.fullmatch(lines[0]):
        for number, line in enumerate(lines, start=1):
            found = TOKEN_LINE.fullmatch(line)
            if BROKEN.search(line):
                yield number, "it is not UTF-8 text"
            elif line.strip():
                yield number, found.groupdict() if found else "it is not image.jpg#0, a tab and a caption"
        return
    header = lines[0] if lines else ""
    delimiter = "\t" if file.lower().endswith(".tsv") else max(DELIMITERS, key=header.count)
    if delimiter not in header:
        raise ValueError(
            f"{file}: its first line names no columns ({header[:60]!r}); write a line such as image,caption in front."
        )
    csv.field_size_limit(2**31 - 1)  # pictures may be columns, too
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader)]
    number = 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield number, f"it cannot be read ({error})"
            continue
        if not values:
            continue
        number += 1
        if len(values) != len(names):
            yield number, f"it has {len(values)} columns, the first line has {len(names)}"
        elif bad := next((value for value in values if BROKEN.search(value)), None):
            yield number, f"it is not UTF-8 text ({bad[:60]!a})"
        else:
            yield number, dict(zip(names, values, strict=True))


class _PlainUnpickler(pickle.Unpickler):
    """Reads what needs no code: of a file from elsewhere, a class may be anything."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _unpickled(file: str) -> Iterator[tuple[int, dict | str]]:
    """Yields (number, row)."""
    try:
        content = _PlainUnpickler(io.BytesIO(contents(file))).load()
    except Exception as error:  # a broken pickle raises errors of many kinds
        raise ValueError(f"{file} is no pickled list of plain rows ({error}); write its rows as .jsonl.") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a list of rows.")
    for number, row in enumerate(content, start=1):
        yield number, row if isinstance(row, dict) else "it is not an object"
