"""From a recipe's `model` part to the model and its processor."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from prefixvlm.configuration.configuration_prefix_vlm import (
    IMAGE_TOKEN,
    PAPER_VISION,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
)
from prefixvlm.configuration.conversation_prefix_vlm import prepare
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor, vision_backbone
from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.inference.loading import base_of_adapter, dtype_named, load, one_line
from prefixvlm.train.data.noise import MASK_TOKEN
from prefixvlm.train.recipes.schema import ModelRecipe

END_TOKEN = "<|endoftext|>"
PAPER_PAIR = ("google/siglip-so400m-patch14-224", "Qwen/Qwen2.5-0.5B")


def load_start(start: str, dtype: str, quantize: str | None = None, **hub):
    """A saved model to train, and its processor; see `load`.

    Raises:
        ValueError: also for an adapter, which is not a whole model.
    """
    if base_of_adapter(start):
        raise ValueError(f"{start} is an adapter; make a whole model of it first: prefixvlm merge {start} --output DIR")
    return load(start, dtype, quantize, **hub)


def refuse_random_start(recipe: ModelRecipe, random_init: bool) -> None:
    """Raises a ValueError for random weights in place of a saved model's."""
    if random_init and recipe.start is not None:
        raise ValueError("--random-init is for recipes that name backbones; this one starts from a whole model.")


def build(recipe: ModelRecipe, texts: Iterable[str], random_init: bool = False):
    """The model and processor a recipe starts from.

    Args:
        recipe: its `model` part.
        texts: to train a new tokenizer on; read only if the recipe asks for one.
        random_init: take only the shapes of pretrained backbones; their weights are not loaded.

    Raises:
        ValueError: for settings that contradict each other or backbones that cannot be loaded.
    """
    if recipe.start is not None:
        return load_start(recipe.start, recipe.dtype, **recipe.hub)
    if isinstance(recipe.vision, str) != isinstance(recipe.text, str):
        raise ValueError("model.vision and model.text must both be pretrained (names) or both new (settings).")
    if isinstance(recipe.vision, str) and random_init:
        model, processor = _from_settings(recipe.model_copy(update=_shapes(recipe)), texts)
    elif isinstance(recipe.vision, str) and isinstance(recipe.text, str):
        for key in ("tokenizer", "image_mean", "image_std"):
            if getattr(recipe, key) is not None:
                raise ValueError(f"model.{key} is for random weights; pretrained backbones bring their own. Leave it out.")
        try:
            shared: dict[str, Any] = {"image_size": recipe.image_size, "chat_template": recipe.chat_template, **recipe.hub}
            sizes = {key: recipe.config[key] for key in ("pixel_shuffle", "mean_pooling") if key in recipe.config}
            processor = PrefixVLMProcessor.from_backbones(
                recipe.vision, recipe.text, center_crop=recipe.center_crop, **sizes, **shared
            )
            model = PrefixVLMForConditionalGeneration.from_backbones(
                recipe.vision, recipe.text, dtype=dtype_named(recipe.dtype), **shared, **recipe.config
            )
        except OSError as error:
            raise ValueError(f"A backbone cannot be loaded ({one_line(error)}).") from error
    else:
        model, processor = _from_settings(recipe, texts)
    return model, processor


def paper_config(recipe: ModelRecipe) -> PrefixVLMConfig:
    """The paper's pair, which is built in, in a recipe's image size and with its settings."""
    vision = {**PAPER_VISION, "image_size": recipe.image_size or PAPER_VISION["image_size"]}
    return PrefixVLMConfig.from_preset("paper", vision_config=vision, **recipe.config)


def _shapes(recipe: ModelRecipe) -> dict:
    """The configurations of two named backbones, as a recipe's `vision` and `text`."""
    if (recipe.vision, recipe.text) == PAPER_PAIR:
        config = paper_config(recipe)
        vision, text = config.vision_config, config.text_config
    else:
        try:
            vision = vision_backbone(str(recipe.vision), recipe.image_size, **recipe.hub).config
            text = AutoConfig.from_pretrained(recipe.text, **recipe.hub)
        except (OSError, ValueError) as error:
            raise ValueError(f"The shape of a backbone cannot be read ({one_line(error)}).") from error
    return {"vision": vision.to_dict(), "text": text.to_dict(), "tokenizer": recipe.tokenizer or recipe.text}


def _from_settings(recipe: ModelRecipe, texts: Iterable[str]):
    if isinstance(recipe.tokenizer, dict):
        tokenizer = train_tokenizer(texts, **recipe.tokenizer)
    elif recipe.tokenizer:
        try:
            tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer, **recipe.hub)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.tokenizer {recipe.tokenizer} cannot be loaded ({one_line(error)}).") from error
        prepare(tokenizer, recipe.chat_template)
    else:
        raise ValueError("model.tokenizer is needed for a model with random weights; name one, or give a vocab_size.")
    text: dict[str, Any] = {"tie_word_embeddings": True, **(recipe.text if isinstance(recipe.text, dict) else {})}
    text["vocab_size"] = max(len(tokenizer), text.get("vocab_size", 0))
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
    model = PrefixVLMForConditionalGeneration(config).to(dtype_named(recipe.dtype))
    model.set_stop_tokens(tokenizer)
    return model, processor


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the conversation tokens, trained on `texts`; any text can be encoded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [END_TOKEN, IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN, MASK_TOKEN]
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
        mask_token=MASK_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
