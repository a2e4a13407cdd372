"""Table VI of arXiv 2503.19508, and our scores in its layout."""

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
TABLE_VI = {
    "Flickr8k": (76.0, 59.9, 45.3, 33.7, 27.8, 57.8, 99.4),
    "Flickr30k": (74.1, 56.9, 42.2, 30.8, 25.2, 53.6, 80.5),
    "COCO": (79.2, 63.4, 48.6, 36.7, 29.1, 58.4, 127.1),
}


def beside_the_paper(column: str | None, name: str, report: dict) -> str:
    """A table of caption scores in percent with their intervals, beside the paper's if it reports the data set.

    Args:
        column: of `TABLE_VI`, or `None` for a data set that is not in it.
        name: heading of our column.
        report: the contents of metrics.json.
    """
    published = TABLE_VI.get(column) if column else None
    heads = ["Metric", name, "95% interval", *(["paper, Table VI"] if published else [])]
    rows = []
    for place, metric in enumerate(METRICS):
        low, high = (100 * bound for bound in report["intervals"][metric])
        row = [metric, f"{100 * report['scores'][metric]:.1f}", f"{low:.1f} to {high:.1f}"]
        rows.append([*row, *([f"{published[place]:.1f}"] if published else [])])
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )
