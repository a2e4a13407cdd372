"""From a recipe's words about a model to the model and its processor."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefixvlm.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.configuration_prefix_vlm import IMAGE_TOKEN, TURN_END_TOKEN, TURN_START_TOKEN
from prefixvlm.processing.processing_prefix_vlm import siglip_image_processor
from prefixvlm.train.recipe import ModelRecipe

END_TOKEN, NOISE_TOKEN = "<|endoftext|>", "<|mask|>"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder: str, dtype: str = "float32"):
    """A saved PrefixVLM and its processor.

    Raises:
        ValueError: if the folder holds none, naming it.
    """
    try:
        model = PrefixVLMForConditionalGeneration.from_pretrained(folder, dtype=_dtype(dtype))
        return model, PrefixVLMProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} is not a PrefixVLM that can be loaded ({' '.join(str(error).split())[:200]})."
        ) from error


def build(recipe: ModelRecipe, texts: Iterable[str]):
    """The model and processor a recipe starts from.

    Args:
        recipe: its `model` part.
        texts: what a tokenizer of our own would learn from; read only if the recipe asks for one.

    Raises:
        ValueError: for settings that do not go together or backbones that cannot be loaded.
    """
    if recipe.start is not None:
        return load(recipe.start, recipe.dtype)
    if isinstance(recipe.vision, str) != isinstance(recipe.text, str):
        raise ValueError("model.vision and model.text must both be pretrained (names) or both new (settings).")
    if isinstance(recipe.vision, str):
        try:
            processor = PrefixVLMProcessor.from_backbones(recipe.vision, recipe.text)
            model = PrefixVLMForConditionalGeneration.from_backbones(
                recipe.vision, recipe.text, dtype=_dtype(recipe.dtype), **recipe.config
            )
        except OSError as error:
            raise ValueError(f"A backbone cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    else:
        model, processor = _from_settings(recipe, texts)
    tokenizer = processor.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(TURN_END_TOKEN), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def _from_settings(recipe: ModelRecipe, texts: Iterable[str]):
    if isinstance(recipe.tokenizer, dict):
        unknown = set(recipe.tokenizer) - {"vocab_size"}
        if unknown:
            raise ValueError(f"model.tokenizer: unknown key {', '.join(sorted(unknown))}; only vocab_size is known.")
        tokenizer = train_tokenizer(texts, **recipe.tokenizer)
    elif recipe.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
        tokenizer.add_tokens([IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN], special_tokens=True)
        tokenizer.padding_side = "left"
    else:
        raise ValueError("model.tokenizer is needed for a model with random weights; name one, or give a vocab_size.")
    text = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **recipe.text}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = PrefixVLMConfig(
        vision_config=recipe.vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **recipe.config,
    )
    scale = {"image_mean": recipe.image_mean, "image_std": recipe.image_std}
    processor = PrefixVLMProcessor(
        siglip_image_processor(config.vision_config.image_size, **{k: v for k, v in scale.items() if v is not None}),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
    )
    return PrefixVLMForConditionalGeneration(config).to(_dtype(recipe.dtype)), processor


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the tokens of our conversations, learnt from `texts`; any text can be encoded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [END_TOKEN, IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN, NOISE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        mask_token=NOISE_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"model.dtype is {name!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]
