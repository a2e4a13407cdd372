"""Tiny models, tokenizers and inputs that the tests share; nothing here needs a network or a file.

Shapes: B batch, T tokens, P image tokens.
"""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor

SPECIAL_TOKENS = ["<|endoftext|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>"]
IMAGE_TOKEN_ID = 1
FIRST_WORD = len(SPECIAL_TOKENS)  # ids from here on are text


def tiny_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level, 260 tokens, so that any text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(image_size: int = 16, patch_size: int = 8, **kwargs) -> PrefixVLMProcessor:
    return PrefixVLMProcessor(
        siglip_image_processor(image_size),
        tiny_tokenizer(**kwargs),
        num_image_tokens=(image_size // patch_size) ** 2,
    )


def save_tiny(folder) -> None:
    """Saves a whole model with its processor, and a picture, photo.png."""
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    Image.new("RGB", (20, 30), "red").save(folder / "photo.png")


def tiny_config(attention_mode: str = "prefix", image_size: int = 16, patch_size: int = 8, **kwargs) -> PrefixVLMConfig:
    """Four image tokens, two layers each side; grouped heads and untypical rope, so that mistakes there would show."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )
    text = Qwen2Config(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        initializer_range=0.3,  # wide enough that tokens differ clearly and greedy answers vary
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return PrefixVLMConfig(
        vision_config=vision, text_config=text, attention_mode=attention_mode, image_token_id=IMAGE_TOKEN_ID, **kwargs
    )


def tiny_model(
    attention_mode: str = "prefix", seed: int = 0, attn_implementation: str = "sdpa", **kwargs
) -> PrefixVLMForConditionalGeneration:
    torch.manual_seed(seed)
    config = tiny_config(attention_mode, **kwargs)
    config._attn_implementation = attn_implementation
    return PrefixVLMForConditionalGeneration(config).eval()


def random_batch(model, text_lengths, seed: int = 0, padding_side: str = "right") -> dict:
    """One image and so many words a row, padded on `padding_side`."""
    return layout_batch(model, ["I" + "w" * length for length in text_lengths], seed, padding_side)


def layout_batch(model, rows, seed: int = 0, padding_side: str = "right") -> dict:
    """Rows such as "wIIww", where I is an image and w a random word, padded on `padding_side`."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    image_tokens, vocabulary = config.num_image_tokens, config.text_config.vocab_size
    width = max(len(image_numbers(row, image_tokens)) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        words = torch.randint(FIRST_WORD, vocabulary, (row.count("w"),), generator=generator)
        tokens = torch.full((len(image_numbers(row, image_tokens)),), config.image_token_id)
        tokens[torch.tensor(image_numbers(row, image_tokens)) == 0] = words
        places = slice(width - len(tokens), None) if padding_side == "left" else slice(len(tokens))
        input_ids[index, places] = tokens
        attention_mask[index, places] = 1
    size = config.vision_config.image_size
    pixel_values = torch.randn("".join(rows).count("I"), 3, size, size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


def image_numbers(row: str, image_tokens: int) -> list[int]:
    """For each position of a row such as "wIIww" the number of its image from 1, and 0 at words."""
    numbers = []
    for place, piece in enumerate(row):
        numbers += [row[: place + 1].count("I")] * image_tokens if piece == "I" else [0]
    return numbers


def row_alone(batch: dict, row: int, model) -> dict:
    """One row of a batch without its padding, with its own images."""
    is_image = batch["input_ids"] == model.config.image_token_id
    first = int(is_image[:row].sum()) // model.config.num_image_tokens
    count = int(is_image[row].sum()) // model.config.num_image_tokens
    valid = batch["attention_mask"][row].bool()
    alone = {name: batch[name][row : row + 1, valid] for name in ("input_ids", "attention_mask")}
    return {**alone, "pixel_values": batch["pixel_values"][first : first + count] if count else None}


def rule_mask(mode: str, images: list[int], valid=None, documents=None) -> torch.Tensor:
    """Who may see whom among T positions, (T, T) bool: the rule of the design pair by pair, not the product's function."""
    length = len(images)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            opened = {
                "causal": k <= q,
                "prefix": k <= q or images[q] == images[k] != 0,
                "prefix_all_images": k <= q or images[k] != 0,
                "bidirectional": True,
            }[mode]
            same_document = documents is None or documents[q] == documents[k]
            mask[q, k] = opened and same_document and (valid is None or valid[k])
        if valid is not None and not valid[q]:
            mask[q, q] = True
    return mask
