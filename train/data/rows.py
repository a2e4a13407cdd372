"""Raw rows of a data set, wherever it lies, through `datasets`: all at hand, or streamed.

JSON is parsed row by row here rather than by `datasets`, which wants one type a column and gives up at the first bad
line: of real files, one bad row is then one bad row.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

JSON_SUFFIXES = (".json", ".jsonl")
SPLITS = ("train", "validation", "val", "dev", "test")
BATCH = 16  # rows of a stream that are read at a time
TEXT = "text"  # the column of a row that is still JSON


class RowTable:
    """Rows that can be asked for by number."""

    def __init__(self, table, name: str, split: str | None = None):
        self.table, self.name = table, name
        self.is_json = table.column_names == [TEXT]
        self.numbers = range(len(table))
        if self.is_json:
            self.numbers = [number for number, text in enumerate(table[TEXT]) if _is_wanted(text, split)]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        return f"{self.name}, row {self.numbers[index] + 1}"

    def __getitem__(self, index: int) -> dict:
        """One row.

        Raises:
            ValueError: if it is not valid JSON or not an object.
        """
        row = self.table[self.numbers[index]]
        return parsed(row[TEXT]) if self.is_json else row

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do."""
        # `datasets` hashes what it has read from files; what it was handed in memory gets a name at random
        if not self.is_json:
            return self.table._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for number in self.numbers:
            digest.update(self.table[number][TEXT].encode() + b"\n")
        return digest.hexdigest()


class RowStream:
    """Rows that come one after the other, from the start each time it is iterated."""

    def __init__(self, table, name: str, split: str | None = None):
        self.table, self.name, self.split = table, name, split

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """Yields where a row stands and the row, which may still be JSON (see `parsed`)."""
        for number, row in enumerate(self._all(), start=1):
            if list(row) != [TEXT] or _is_wanted(row[TEXT], self.split):
                yield f"{self.name}, row {number}", row

    def _all(self) -> Iterator[dict]:
        # by batches, since row by row `datasets` would deal out its files to the workers of a DataLoader, which here is
        # done sample by sample
        for batch in self.table.iter(batch_size=BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.name} {self.split}".encode(), digest_size=16).hexdigest()


def read_rows(path: str, split: str = "train", streaming: bool = False, field: str | None = None) -> RowTable | RowStream:
    """The rows of a data set.

    Args:
        path: a .json or .jsonl file, a .parquet file, a glob of such files, a folder that holds some, or the name of a
            data set on the Hub.
        split: of a data set; of JSON rows, those whose own key `split` says so, and those without one. `a+b` is both.
        streaming: read while training.
        field: where in a JSON file the list of rows is.

    Raises:
        ValueError: if there is nothing there, or a file as a whole cannot be read.
    """
    files = _files(path)
    if files and files[0].endswith(JSON_SUFFIXES):
        table = _json_table(files, streaming, field)
    else:
        table = _dataset(path, files, split, streaming)
    return (RowStream if streaming else RowTable)(table, path, split)


def parsed(text: str) -> dict:
    """One JSON row.

    Raises:
        ValueError: if it is not valid JSON or not an object.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def _is_wanted(text: str, split: str | None) -> bool:
    if not text.strip():
        return False
    if split is None or '"split"' not in text:
        return True
    try:
        own = parsed(text).get("split")
    except ValueError:
        return True  # wanted, so that it is reported
    return own is None or own in split.split("+")


def _files(path: str) -> list[str]:
    """The files a path stands for; none if it is to be a Hub id."""
    if any(sign in path for sign in "*?["):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise ValueError(f"{path}: no file matches.")
    elif Path(path).is_dir():
        for suffixes in ((".parquet",), JSON_SUFFIXES):
            if files := sorted(str(file) for file in Path(path).rglob("*") if file.suffix in suffixes):
                break
        else:
            raise ValueError(f"{path}: the folder has no .parquet, .jsonl or .json file.")
        if not files[0].endswith(".parquet") and len(files) > 1:
            raise ValueError(f"{path}: the folder has several JSON files; name one of {', '.join(files[:5])}.")
    elif path.endswith((*JSON_SUFFIXES, ".parquet")):
        files = [path]
    else:
        return []
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"{missing[0]}: there is no such file.")
    if len({Path(file).suffix for file in files}) > 1:
        raise ValueError(f"{path}: files of several kinds match; name those of one kind.")
    return files


def _json_table(files: list[str], streaming: bool, field: str | None):
    import datasets

    if files[0].endswith(".jsonl"):
        try:
            rows = datasets.load_dataset("text", data_files=files, split="train", streaming=streaming)
        except Exception as error:  # datasets raises errors of many kinds
            raise ValueError(f"{files[0]} cannot be read as text ({_line(error)}).") from error
        return rows
    texts = []
    for file in files:
        try:
            rows = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}.") from error
        if field is not None:
            rows = rows.get(field) if isinstance(rows, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{file}: expected a list of objects{f' under {field!r}' if field else ''}.")
        texts += [json.dumps(row, ensure_ascii=False) for row in rows]
    table = datasets.Dataset.from_dict({TEXT: texts})
    return table.to_iterable_dataset() if streaming else table


def _dataset(path: str, files: list[str], split: str, streaming: bool):
    import datasets

    if Path(path).is_dir():
        files = _of_split(files, split, path)
    try:
        if files:
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        else:
            rows = datasets.load_dataset(path, split=split, streaming=streaming)
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
    """Of the files of a folder those of a split, where their names tell splits apart (train-00000-of-00004.parquet)."""
    splits = {file: re.match("[a-z]*", Path(file).name)[0] for file in files}
    if not set(splits.values()) & set(SPLITS):
        return files
    chosen = [file for file in files if splits[file] in split.split("+")]
    if not chosen:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(sorted(set(splits.values())))}.")
    return chosen


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
