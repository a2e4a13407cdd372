"""Our scores in the layout of Table VI, beside the paper's."""

import pytest

from prefixvlm.train.evaluation.paper_results import METRICS, TABLE_VI, beside_the_paper
from prefixvlm.train.evaluation.tasks import TASKS

REPORT = {
    "scores": {metric: (place + 1) / 10 for place, metric in enumerate(METRICS)},
    "intervals": {metric: (place / 10, (place + 2) / 10) for place, metric in enumerate(METRICS)},
}


def test_every_published_column_is_of_a_task_and_has_all_metrics():
    assert {task.column for task in TASKS.values()} - {None} == set(TABLE_VI)
    assert all(len(column) == len(METRICS) for column in TABLE_VI.values())


def test_each_row_has_ours_its_interval_and_the_papers():
    head, *rows = beside_the_paper("COCO", "mine", REPORT).splitlines()
    assert head.split("  ")[0] == "Metric"
    assert head.endswith("paper, Table VI")
    assert [row.split() for row in rows[:1] + rows[-1:]] == [
        ["Bleu_1", "10.0", "0.0", "to", "20.0", "79.2"],
        ["CIDEr", "70.0", "60.0", "to", "80.0", "127.1"],
    ]
    assert len(rows) == len(METRICS)


@pytest.mark.parametrize("name", ["m", "a model with a long name"])
def test_columns_stand_below_each_other(name):
    marks = [name, *(f"{10 * place}.0" for place in range(1, 8))]
    lines = beside_the_paper("Flickr8k", name, REPORT).splitlines()
    assert len({line.index(mark) for line, mark in zip(lines, marks, strict=True)}) == 1


def test_what_the_paper_did_not_measure_has_no_column_of_its():
    assert "paper" not in beside_the_paper(None, "mine", REPORT)
