"""COCO's caption scores as a module for `evaluate`; they are computed in `scores.py`, which does not import evaluate."""

import datasets
import evaluate

from .scores import DEFAULT, caption_scores


class CocoCaption(evaluate.Metric):
    """`caption_scores` for `evaluate.load`; `compute` also takes `metrics`."""

    def _info(self):
        return evaluate.MetricInfo(
            description="BLEU, METEOR, ROUGE-L, CIDEr and SPICE of image captions, as pycocoevalcap computes them.",
            citation="X. Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325",
            inputs_description=caption_scores.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references, metrics=DEFAULT):
        return caption_scores(predictions, references, metrics).scores
