"""The input pipeline alone: JPEG files to training batches, in samples a second of one process without a model.

`over_training` compares it with what a training step consumes, which `--only training_step` measures in the same run.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import REPEATS, Setup, alternate, emit, processor_for, summary
from benchmarks.training_step import BATCH, BUILT_IN, texts
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation

SAMPLES = 64
PICTURE = (640, 480)


def run(setup: Setup, consumed: dict[str, float] | None = None, captions: Path = BUILT_IN) -> list[dict]:
    """`consumed` is how many samples a second training takes, by stage."""
    words = texts(captions)
    collator = ConversationCollator(processor_for(words, 2000), "caption")
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for index in range(SAMPLES):
            path = Path(folder, f"{index}.jpg")
            Image.effect_noise(PICTURE, 32).convert("RGB").save(path, quality=90)
            samples.append(Conversation.about([path], [("user", ""), ("assistant", words[index % len(words)])], path.name))

        def load() -> None:
            for start in range(0, SAMPLES, BATCH):
                collator(samples[start : start + BATCH])

        seconds = alternate({"pipeline": load}, torch.device("cpu"), REPEATS)["pipeline"]
    rate = SAMPLES / sorted(seconds)[len(seconds) // 2]
    over = {stage: round(rate / taken, 1) for stage, taken in (consumed or {}).items()}
    return [
        emit(
            "input pipeline",
            setup,
            **summary(seconds),
            samples_per_second=round(rate, 1),
            picture=PICTURE,
            over_training=over,
        )
    ]
