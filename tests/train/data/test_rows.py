"""Rows by index and as streams: the same rows, each read by one reader alone, each named by its file and number."""

import json
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixvlm.train.data import rows as module
from prefixvlm.train.data.rows import JsonRows, read_rows

ROWS = 100
LINES = st.lists(st.sampled_from(['{"a": 1}', '{"a": "é\\n]"}', "", "{", "[1]", '{"split": "test"}']), max_size=12)
LEAVES = st.none() | st.text() | st.integers()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def read(where_and_row):
    where, row = where_and_row
    try:
        return where, row()
    except ValueError as error:
        return where, str(error)


def by_number(rows: JsonRows) -> list:
    return [read((rows.where(index), lambda index=index: rows[index])) for index in range(len(rows))]


@settings(max_examples=150, deadline=None)
@given(lines=LINES, ends=st.sampled_from(["", "\n"]), readers=st.integers(1, 9), split=st.sampled_from([None, "train"]))
def test_readers_of_one_file_read_each_line_once(lines, ends, readers, split, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_text("\n".join(lines) + ends, encoding="utf-8")
    stream = read_rows(str(path), split, streaming=True)
    shares = [read(row) for reader in range(readers) for row in stream.share(reader, readers)]
    assert shares == by_number(read_rows(str(path), split))
    wanted = [number for number, line in enumerate(lines, 1) if line and not (split and "split" in line)]
    assert [where for where, _ in shares] == [f"{path}, row {number}" for number in wanted]


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(VALUES, max_size=6),
    other=VALUES,
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    field=st.sampled_from([None, "images"]),
)
def test_a_list_is_cut_where_its_entries_are(entries, other, indent, is_ascii, encoding, field, tmp_path_factory):
    path = tmp_path_factory.mktemp("list") / "rows.json"
    entries = [{"value": entry, "images": []} for entry in entries]
    content = entries if field is None else {"before": other, "images": entries, "after": other}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=is_ascii), encoding=encoding)
    rows = read_rows(str(path), None, field=field)
    assert [rows[index] for index in range(len(rows))] == entries


@pytest.mark.parametrize("content", ["[", "[{}", '[{} {"a": 1}]', "[{},]", "[] []", '{"images": [{}, ]}', '{"images" []}'])
def test_a_broken_list_is_named(content, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows.json is not valid JSON: .* line 1 column \d+"):
        read_rows(str(tmp_path / "rows.json"), None, field="images" if content.startswith("{") else None)


def test_a_byte_that_is_not_utf8_spoils_one_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    assert (rows[0], rows[2]) == ({"a": 1}, {"a": 3})
    with pytest.raises(ValueError, match="not valid JSON"):
        rows[1]


def write(folder, kind: str, files: int) -> str:
    per_file = ROWS // files
    for file in range(files):
        values = [{"number": number} for number in range(file * per_file, (file + 1) * per_file)]
        path = folder / f"part-{file}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
        elif kind == "json":
            path.write_text(json.dumps(values))
        else:
            datasets.Dataset.from_list(values).to_parquet(str(path))
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize("files", [1, 2, 4, 10])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_four_readers_read_and_parse_each_row_once(kind, files, tmp_path, monkeypatch):
    stream = read_rows(write(tmp_path, kind, files), streaming=True)
    parsed = Counter()
    loads = json.loads
    monkeypatch.setattr(module.json, "loads", lambda text: parsed.update([text]) or loads(text))
    shares = [[row()["number"] for _, row in stream.share(reader, 4)] for reader in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(ROWS))
    assert max(map(len, shares)) <= 30
    if kind != "parquet":
        assert sum(parsed.values()) == ROWS


def test_rows_can_be_sent_to_another_process(tmp_path):
    import pickle

    rows = read_rows(write(tmp_path, "jsonl", 2))
    rows[0]
    assert pickle.loads(pickle.dumps(rows))[99] == {"number": 99}
