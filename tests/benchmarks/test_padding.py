"""Padding: the share of real tokens in each layout, by hand and through the command."""

import json
import sys

import pytest
from PIL import Image
from tiny import tiny_tokenizer

from benchmarks import padding


def test_shares_known_by_hand():
    assert padding.real_share([4, 4, 4, 4], 2, grouped=False, max_tokens_per_row=0) == (1.0, 4)
    # 6 beside 2 leaves 4 of 12 places empty; in one packed row none
    assert padding.real_share([6, 2], 2, grouped=False, max_tokens_per_row=0) == (pytest.approx(8 / 12), 6)
    assert padding.real_share([6, 2], 2, grouped=False, max_tokens_per_row=8) == (1.0, 8)


def test_the_command_prints_a_line_for_each_layout(tmp_path, monkeypatch, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "texts": ["w" * length]} for length in (3, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--tokenizer", f"{tmp_path}/tokenizer", "--source", "captions", "--path", f"{tmp_path}/rows.jsonl"]
    monkeypatch.setattr(sys, "argv", ["padding", *options, "--batch", "2", "--max-tokens-per-row", "600"])
    padding.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["layout"], line["max_tokens_per_row"]) for line in lines] == [
        ("plain", 0),
        ("grouped", 0),
        ("packed", 600),
    ]
    assert lines[0]["real_token_share"] < lines[2]["real_token_share"] == 1.0
    assert lines[2]["widest_row"] == 2 * 256 + 3 + 40 + 2  # each sample ends with an end token
