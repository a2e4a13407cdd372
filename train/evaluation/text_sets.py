"""Sets of texts in files, as `prefixvlm text-loss` takes them: `NAME=FILE[:KEY]`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefixvlm.train.data.rows import JsonRows


@dataclass
class TextSet:
    """The texts of one file: `rows` has the texts of each row, `where` the place of each row for error messages."""

    name: str
    file: str
    key: str
    rows: list[list[str]]
    where: list[str]


def read_texts(specification: str) -> TextSet:
    """The texts of `NAME=FILE[:KEY]`.

    FILE is a .txt file with one text per line, or a .jsonl or .json file of rows with a text or a list of texts at KEY
    (default `text`; dots lead into nested objects). Blank lines are skipped; blank texts are dropped, which may leave a
    row without any.

    Raises:
        ValueError: if NAME, the file, a row or its text is missing or malformed, saying which.
    """
    name, _, place = specification.partition("=")
    if not name or not place:
        raise ValueError(f"--text {specification}: expected NAME=FILE or NAME=FILE:KEY, such as human=texts.jsonl:human.")
    file, colon, key = place.rpartition(":")
    if Path(place).is_file() or not colon:  # the colon may be part of the path
        file, key = place, ""
    if not Path(file).is_file():
        raise ValueError(f"--text {name}: there is no file {place}{f', nor {file}' if file != place else ''}.")
    suffix = Path(file).suffix
    if suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"--text {name}: {file} is not a .txt, .jsonl or .json file.")
    found: dict[str, list[str]] = {}
    if suffix == ".txt":
        if key:
            raise ValueError(f"--text {name}: a .txt file such as {file} has no keys; leave out :{key}.")
        found = {f"{file}, line {number}": [line] for number, line in _lines(file)}
    else:
        key = key or "text"
        rows = JsonRows([file])
        for index in range(len(rows)):
            try:
                found[rows.where(index)] = _texts(rows[index], key)
            except ValueError as error:
                raise ValueError(f"{rows.where(index)}: {error}.") from error
    if not any(found.values()):
        raise ValueError(f"{file} holds no text.")
    return TextSet(name, file, key, list(found.values()), list(found))


def leave_out_empty_rows(sets: list[TextSet]) -> dict[str, int]:
    """Removes rows without text, and returns how many per set.

    If all sets have the same number of rows, a row is removed from all of them, so that rows stay paired.
    """
    empty = {texts.name: {index for index, row in enumerate(texts.rows) if not row} for texts in sets}
    if len({len(texts.rows) for texts in sets}) == 1:
        empty = dict.fromkeys(empty, set.union(*empty.values()))
    for texts in sets:
        kept = [index for index in range(len(texts.rows)) if index not in empty[texts.name]]
        if not kept:
            raise ValueError(f"--text {texts.name}: no row of {texts.file} has a text in every set.")
        texts.rows, texts.where = [texts.rows[index] for index in kept], [texts.where[index] for index in kept]
    return {name: len(rows) for name, rows in empty.items()}


def _lines(file: str) -> list[tuple[int, str]]:
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    # not splitlines, which also splits at line separators inside a text
    return [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]


def _texts(row: dict, key: str) -> list[str]:
    """The non-blank texts at a dotted key of a row.

    Raises:
        ValueError: if there is nothing, or something else.
    """
    value = next(_at(row, key), None)
    if value is None:
        raise ValueError(f"it has nothing at {key!r}; its keys are {', '.join(row)}")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key!r} is neither a text nor a list of texts ({str(value)[:60]!r})")
    return [text for text in texts if text.strip()]


def _at(row, key: str) -> Iterator:
    """Yields the values at a dotted key; keys may contain dots themselves, as in `machine.gpt-3.5`."""
    if not isinstance(row, dict):
        return
    if key in row:
        yield row[key]
    for place, sign in enumerate(key):
        if sign == ".":
            yield from _at(row.get(key[:place]), key[place + 1 :])
