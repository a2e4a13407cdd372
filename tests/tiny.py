"""Tiny models, tokenizers and inputs that the tests share; nothing here needs a network or a file.

Shapes: B batch, T tokens, P image tokens.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from prefixvlm import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.processing.processing_prefix_vlm import siglip_image_processor

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
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    image_tokens, vocabulary = config.num_image_tokens, config.text_config.vocab_size
    width = image_tokens + max(text_lengths)
    input_ids = torch.zeros(len(text_lengths), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(text_lengths):
        words = torch.randint(FIRST_WORD, vocabulary, (length,), generator=generator)
        tokens = torch.cat([torch.full((image_tokens,), config.image_token_id), words])
        places = slice(width - len(tokens), None) if padding_side == "left" else slice(len(tokens))
        input_ids[row, places] = tokens
        attention_mask[row, places] = 1
    size = config.vision_config.image_size
    pixel_values = torch.randn(len(text_lengths), 3, size, size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
