"""How much of a batch is real: the share of tokens that are no padding, plainly, grouped by length, and packed.

    python benchmarks/padding.py --tokenizer TOKENIZER --source captions --path my-data [--batch 32] [--row-length 2048]

Prints one line of JSON a layout, over a whole epoch with the paper's 256 image tokens. Images are not looked at.
"""

import argparse
import json

from PIL import Image
from transformers import AutoTokenizer

from prefixvlm import PrefixVLMProcessor
from prefixvlm.processing.processing_prefix_vlm import siglip_image_processor
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.order import EpochSampler, OrderedSamples
from prefixvlm.train.data.packing import pack
from prefixvlm.train.data.sources import load as load_samples

IMAGE_SIDE, IMAGE_TOKENS = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--source", required=True, help="captions, vqa, llava ...")
    parser.add_argument("--path", required=True)
    parser.add_argument("--batch", type=int, default=32, help="samples of a device batch")
    parser.add_argument("--row-length", type=int, default=2048, help="tokens of a packed row")
    options = parser.parse_args()
    text_format = "caption" if options.source in ("captions", "karpathy") else "conversation"
    lengths = sample_lengths(options, text_format)
    for name, grouped, max_tokens_per_row in (
        ("plain", False, 0),
        ("grouped", True, 0),
        ("packed", False, options.max_tokens_per_row),
    ):
        share, widest = real_share(lengths, options.batch, grouped, max_tokens_per_row)
        line = {"data": options.path, "samples": len(lengths), "layout": name, "batch": options.batch}
        print(
            json.dumps(
                {
                    **line,
                    "max_tokens_per_row": max_tokens_per_row,
                    "widest_row": widest,
                    "real_token_share": round(share, 4),
                }
            )
        )


def sample_lengths(options, text_format: str) -> list[int]:
    """Tokens of each sample of the data."""
    image_processor = siglip_image_processor(IMAGE_SIDE)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    processor = PrefixVLMProcessor(image_processor, tokenizer, num_image_tokens=IMAGE_TOKENS)
    collator = ConversationCollator(processor, text_format)
    samples = load_samples(options.source, path=options.path)
    dot = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
    loaded = [samples[index] for index in range(len(samples))]
    loaded = [Conversation([dot] * len(sample.images), sample.turns, sample.name) for sample in loaded]
    return [len(sample) for sample in collator.encoded(loaded)]


def real_share(lengths: list[int], batch: int, grouped: bool, max_tokens_per_row: int) -> tuple[float, int]:
    """The share of real tokens of an epoch in all slots of its batches, and the widest row."""
    samples = OrderedSamples(lengths, list(range(len(lengths))), lengths if grouped else None, seed=0)
    order = [index for _, index, _ in EpochSampler(samples, batch, multiple=1)]
    slots, widest = 0, 0
    for start in range(0, len(order), batch):
        chosen = [lengths[index] for index in order[start : start + batch]]
        rows = pack(chosen, max_tokens_per_row) if max_tokens_per_row else [[index] for index in range(len(chosen))]
        width = max(sum(chosen[index] for index in row) for row in rows)
        slots, widest = slots + width * len(rows), max(widest, width)
    return sum(lengths) / slots, widest


if __name__ == "__main__":
    main()
