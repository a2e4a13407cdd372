"""Texts of files: each kind read, each row's place known, pairs kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixvlm.train.evaluation import text_sets as module
from prefixvlm.train.evaluation.text_sets import read_texts

KEYS = st.text(st.sampled_from("ab."), min_size=1, max_size=4)


@given(st.lists(KEYS, min_size=1, max_size=4))
def test_a_dotted_path_leads_through_keys_that_have_dots(keys):
    row = "found"
    for key in reversed(keys):
        row = {key: row, "other": "not it"}
    assert module._texts(row, ".".join(keys)) == ["found"]


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_texts_of_each_kind_of_file(tmp_path):
    rows = [{"text": "one", "machine": {"A-2017": ["two", "three"]}}, {"text": "four", "machine": {"A-2017": "five"}}]
    lines = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    # a byte order mark, a blank line, and a line separator, which ends no line of JSON or text
    (tmp_path / "plain.txt").write_bytes("\ufeffone\r\n\r\nfo\u2028ur\n".encode())
    assert read_texts(f"a={lines}").rows == [["one"], ["four"]]
    assert read_texts(f"a={lines}:machine.A-2017").rows == [["two", "three"], ["five"]]
    assert read_texts(f"a={tmp_path}/rows.json:machine.A-2017").rows == [["two", "three"], ["five"]]
    plain = read_texts(f"a={tmp_path}/plain.txt")
    assert plain.rows == [["one"], ["fo\u2028ur"]]
    assert plain.where == [f"{tmp_path}/plain.txt, line 1", f"{tmp_path}/plain.txt, line 3"]


def test_rows_without_text_are_left_out_of_all_sets_that_are_paired(tmp_path):
    rows = [{"a": "one", "b": "x"}, {"a": ["two", ""], "b": " "}, {"a": [], "b": "z"}, {"a": "four", "b": "w"}]
    file, short = write(tmp_path / "rows.jsonl", rows), write(tmp_path / "short.jsonl", [{"a": ""}, {"a": "five"}])
    paired = [read_texts(f"{key}={file}:{key}") for key in "ab"]
    assert module.leave_out_empty_rows(paired) == {"a": 2, "b": 2}
    assert [texts.rows for texts in paired] == [[["one"], ["four"]], [["x"], ["w"]]]
    assert [place[-1] for place in paired[0].where] == ["1", "4"]
    apart = [read_texts(f"long={file}:a"), read_texts(f"short={short}:a")]
    assert module.leave_out_empty_rows(apart) == {"long": 1, "short": 1}
    assert apart[0].rows == [["one"], ["two"], ["four"]]
    never = write(tmp_path / "never.jsonl", [{"a": "", "b": "x"}, {"a": "x", "b": ""}])
    with pytest.raises(ValueError, match="--text a: no row"):
        module.leave_out_empty_rows([read_texts(f"{key}={never}:{key}") for key in "ab"])


def test_a_colon_of_the_path_is_no_key(tmp_path):
    odd = write(tmp_path / "C:set=1:x.jsonl", [{"text": "one", "ai": "two"}])
    assert read_texts(f"a={odd}").rows == [["one"]]
    found = read_texts(f"a={odd}:ai")
    assert (found.name, found.file, found.key, found.rows) == ("a", odd, "ai", [["two"]])
