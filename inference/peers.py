"""Other image-text-to-text models of transformers, asked as ours is: so that one code scores them all.

Shapes: B prompts, T tokens.
"""

import inspect
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX, PrefixVLMConfig
from prefixvlm.inference.loading import base_of_adapter, dtype_named, one_line, refuse_missing_path
from prefixvlm.processing.images_prefix_vlm import load_image

# from 5.x on
TAKES_CALL_APART = "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


def is_peer(name: str) -> bool:
    """Whether a folder or Hub id is of another image-text-to-text model of transformers than ours.

    Raises:
        ValueError: if there is no such folder.
    """
    refuse_missing_path(name)
    if base_of_adapter(name) is not None:
        return False
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:  # of many kinds; who loads it as ours says what is wrong
        return False
    return not isinstance(config, PrefixVLMConfig) and type(config) in AutoModelForImageTextToText._model_mapping


def load_peer(name: str, dtype: str, device: torch.device) -> tuple[torch.nn.Module, "PeerProcessor"]:
    """Loads such a model, and its processor in the form in which ours is asked.

    Raises:
        ValueError: for a folder that cannot be loaded, or lacks weights.
    """
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype_named(dtype), output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(name)
    except ImportError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many kinds
        raise ValueError(f"{name} cannot be loaded ({one_line(error)}).") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(report['missing_keys'])}.")
    return model.to(device).eval(), PeerProcessor(processor, model.dtype)


class PeerProcessor:
    """A processor of transformers, called as ours is.

    Args:
        processor: with a chat template or, of a model that captions alone, without one.
        dtype: of the pixels.
    """

    rows_to_score = 1  # at once: not every model finds its positions behind padding

    def __init__(self, processor, dtype: torch.dtype):
        self.processor, self.dtype = processor, dtype
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, images: Sequence[Sequence], text: Sequence[str], **kwargs) -> BatchFeature:
        """What captions pictures without words; as ours, with one list of images for each text.

        Raises:
            ValueError: for a model that wants to be asked in words, or an image that cannot be opened.
        """
        if getattr(self.processor, "chat_template", None):
            raise ValueError("This model is asked in words; say by --prompt in which, such as 'Describe the image.'")
        if any(len(group) != 1 for group in images):
            raise ValueError("This model captions one image at a time.")
        pictures = [_picture(group[0]) for group in images]
        return self.processor(images=pictures, return_tensors=kwargs["return_tensors"]).to(self.dtype)

    def apply_chat_template(
        self,
        conversations: list[list[dict]],
        return_labels: bool = False,
        add_generation_prompt: bool = False,
        padding: bool = False,
        padding_side: str = "left",
        **kwargs,
    ) -> BatchFeature:
        """The model's inputs for conversations; with `return_labels` for one, whose last turn is an answer.

        Raises:
            ValueError: for a model without a chat template, an image that cannot be opened, or an answer that the template
                does not put after the prompt.
        """
        if not getattr(self.processor, "chat_template", None):
            raise ValueError("This model has no chat template, so that it cannot be asked questions.")
        if not return_labels:
            return self._rendered(conversations, add_generation_prompt, padding, padding_side)
        (conversation,) = conversations
        whole = self._rendered([conversation], add_generation_prompt=False)
        asked = self._rendered([conversation[:-1]], add_generation_prompt=True)["input_ids"]
        labels = whole["input_ids"].clone()
        if not torch.equal(labels[:, : asked.shape[1]], asked):
            raise ValueError("This model's chat template does not end its prompt where an answer begins.")
        labels[:, : asked.shape[1]] = IGNORE_INDEX
        whole["labels"] = labels
        return whole

    def batch_decode(self, ids, skip_special_tokens: bool = False) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)

    def _rendered(self, conversations, add_generation_prompt: bool, padding: bool = False, side: str = "left"):
        self.tokenizer.padding_side = side
        encoded = self.processor.apply_chat_template(
            [_with_parts(messages) for messages in conversations],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            **_for_the_call(return_tensors="pt", padding=padding),
        )
        encoded.pop("token_type_ids", None)  # of tokenizers on transformers 4, which generation does not know
        return encoded.to(self.dtype)


def _for_the_call(**kwargs) -> dict:
    """Arguments of a processor's own call, which transformers 5 wants apart from those of the template."""
    return {"processor_kwargs": kwargs} if TAKES_CALL_APART else kwargs


def _with_parts(messages: list[dict]) -> list[dict]:
    """Messages whose contents are lists of parts, with pictures in them, as all chat templates of such models take them."""
    changed = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [part if part["type"] == "text" else {"type": "image", "image": _picture(part["image"])} for part in parts]
        changed.append({"role": message["role"], "content": parts})
    return changed


def _picture(image):
    return load_image(image, "the image")
