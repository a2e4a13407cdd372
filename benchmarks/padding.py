"""How much of a batch is padding: the share of real tokens with shuffled, length-grouped and packed batches.

    python benchmarks/padding.py --tokenizer TOKENIZER --source captions --path my-data [--batch 32]

Prints one line of JSON per layout, over a whole epoch with the paper's 256 image tokens. The images are not opened.
"""

import argparse
import json

from PIL import Image
from transformers import AutoTokenizer

from prefixvlm import PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.order import EpochSampler, OrderedSamples
from prefixvlm.train.data.packing import pack
from prefixvlm.train.data.sources import load as load_samples

IMAGE_SIDE, IMAGE_TOKENS = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--source", required=True, help="captions, vqa, llava ...")
    parser.add_argument("--path", required=True)
    parser.add_argument("--batch", type=int, default=32, help="samples per device batch (default: 32)")
    parser.add_argument("--max-tokens-per-row", type=int, default=2048, help="of a packed row (default: 2048)")
    options = parser.parse_args()
    text_format = "caption" if options.source in ("captions", "karpathy") else "conversation"
    lengths = sample_lengths(options, text_format)
    packed = options.max_tokens_per_row
    for layout, grouped, max_tokens_per_row in (("plain", False, 0), ("grouped", True, 0), ("packed", False, packed)):
        share, widest = real_share(lengths, options.batch, grouped, max_tokens_per_row)
        result = {
            "data": options.path,
            "samples": len(lengths),
            "layout": layout,
            "batch": options.batch,
            "max_tokens_per_row": max_tokens_per_row,
            "widest_row": widest,
            "real_token_share": round(share, 4),
        }
        print(json.dumps(result))


def sample_lengths(options, text_format: str) -> list[int]:
    """The number of tokens of each sample."""
    image_processor = siglip_image_processor(IMAGE_SIDE)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    processor = PrefixVLMProcessor(image_processor, tokenizer, num_image_tokens=IMAGE_TOKENS)
    collator = ConversationCollator(processor, text_format)
    samples = load_samples(options.source, path=options.path)
    dot = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
    loaded = [samples[index] for index in range(len(samples))]
    loaded = [sample.with_images([dot] * len(sample.images)) for sample in loaded]
    return [len(sample) for sample in collator.encoded(loaded)]


def real_share(lengths: list[int], batch: int, grouped: bool, max_tokens_per_row: int) -> tuple[float, int]:
    """The share of an epoch's token slots that hold real tokens, and the length of its longest row."""
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
