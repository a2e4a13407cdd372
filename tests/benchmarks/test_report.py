"""Results as tables: every figure shown is one that was measured."""

import json
import sys

from benchmarks import report

VERSIONS = {"torch": "2", "transformers": "4", "python": "3"}
SECONDS = {"median_s": 2.0, "min_s": 1.5, "max_s": 2.5, "rounds": 5}
RESULTS = [
    {"measurement": "decoding", "PrefixVLM": {**SECONDS, "tokens_per_second": 8.0}, "share_of_the_bandwidth_limit": 0.71},
    {"measurement": "stage 1 training step", "depth": 0.25, "faster_than_llava": 1.5, "memory_of_llava": 0.6},
    {"measurement": "questions about one image", "questions": 8, "faster_together": 3.14},
    {
        "measurement": "cost by batch",
        "amounts": [1, 2],
        "seconds": [SECONDS, {**SECONDS, "median_s": 4.0}],
        "gflop": [10.0, 20.0],
        "exponent": 1.0,
        "marginal": 1.0,
        "exponent_of_flops": 1.0,
        "peak_gib": [1.5, 2.0],
    },
]
RESULTS = [{**one, "where": "2 cores, x86, float32", "versions": VERSIONS, "command": "python -m x"} for one in RESULTS]


def test_the_table_has_a_line_a_claim():
    lines = report.table(RESULTS).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("decoding")
    assert "0.71" in lines[0]
    assert "stage 1 training step (25% of the layers)" in lines[1]
    assert "questions about one image, 8 asked" in lines[3]


def test_the_page_keeps_its_words_and_gets_new_figures(tmp_path, monkeypatch):
    page, results = tmp_path / "PERFORMANCE.md", tmp_path / "results.jsonl"
    page.write_text(f"before\n{report.START}\nold figures\n{report.END}\nafter\n")
    results.write_text("".join(json.dumps(one) + "\n" for one in RESULTS))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["report", str(results)])
    for _ in range(2):  # written twice, nothing is doubled
        report.main()
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old figures" not in text
        assert text.count("`python -m x`") == 1
    assert "| decoding | **0.71** |" in text
    assert "| PrefixVLM | 2.000 (1.500 to 2.500, 5 times) | 8.0 tokens/s |" in text
    assert "| 2 | 4.000 | 20.0 | 2.00 |" in text
