"""Scores of answers as a module for `evaluate`; they are computed in `scores.py`, which does not import evaluate."""

import datasets
import evaluate

from . import scores
from .scores import vqa_scores


class Vqa(evaluate.Metric):
    """`vqa_scores` for `evaluate.load`."""

    def _info(self):
        answer = datasets.Value("string")
        return evaluate.MetricInfo(
            description=scores.__doc__,
            citation="X. He et al., PathVQA, arXiv 2003.10286; S. Antol et al., VQA, arXiv 1505.00468",
            inputs_description=vqa_scores.__doc__,
            features=[
                datasets.Features({"predictions": answer, "references": answer}),
                datasets.Features({"predictions": answer, "references": datasets.Sequence(answer)}),
            ],
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions, references):
        return vqa_scores(predictions, references).scores
