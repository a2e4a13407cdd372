"""Images and text to the tensors the model reads, and to the labels it learns from.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and its own siblings.

Shapes: B batch, T tokens, P image tokens, I images in the batch.
"""

import importlib
import json
import os

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from ..configuration.configuration_prefix_vlm import IMAGE_TOKEN, TURN_END_TOKEN, TURN_START_TOKEN
from .images_prefix_vlm import load_image

IGNORE_INDEX = -100

# ChatML, with the image before the first turn as the paper's sequence asks: <im>*P INST1 ans1 INST2 ans2 (section III-D).
# Of several images, those that open the first message go to the front and the others stay where they were put.
CHAT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif -%}
{%- set front = namespace(message=-1, images=0) -%}
{%- for message in messages -%}
  {%- if front.message < 0 and message.content is not string -%}
    {%- set seen = namespace(images=0, leading=0, text=false) -%}
    {%- for part in message.content -%}
      {%- if part.type in ('image', 'image_url') -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if not seen.text %}{% set seen.leading = seen.leading + 1 %}{% endif -%}
      {%- else -%}
        {%- set seen.text = true -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if seen.images -%}
      {%- set front.message = loop.index0 -%}
      {%- set front.images = 1 if seen.images == 1 else seen.leading -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- for _ in range(front.images) %}{{ 'IMAGE_TOKEN' }}{% endfor -%}
{%- for message in messages -%}
  {%- set skip = namespace(images=front.images if loop.index0 == front.message else 0) -%}
  {%- set body -%}
    {%- if message.content is string -%}
      {{- message.content -}}
    {%- else -%}
      {%- for part in message.content -%}
        {%- if part.type in ('image', 'image_url') -%}
          {%- if skip.images %}{% set skip.images = skip.images - 1 %}{% else %}{{ 'IMAGE_TOKEN' }}{% endif -%}
        {%- elif part.type == 'text' -%}
          {{- part.text -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {{- 'TURN_START' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- body + 'TURN_END' -}}{%- endgeneration -%}
  {%- else -%}
    {{- body + 'TURN_END' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'TURN_STARTassistant\\n' }}{% endif -%}
"""


def default_chat_template(image_token: str = IMAGE_TOKEN) -> str:
    """The Jinja template of our conversations for a tokenizer whose image token is `image_token`."""
    template = CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token)
    return template.replace("TURN_START", TURN_START_TOKEN).replace("TURN_END", TURN_END_TOKEN)


def siglip_image_processor(image_size: int, **kwargs):
    """SigLIP's image processor for square images of `image_size` pixels; needs no torchvision."""
    # on transformers 5 the class of the plain name is the one for torchvision
    image_processor = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)
    return image_processor(size={"height": image_size, "width": image_size}, **kwargs)


class PrefixVLMProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}, "images_kwargs": {}}


class PrefixVLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer as one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: a tokenizer that knows `image_token`.
        chat_template: Jinja; by default ChatML with the image in front.
        num_image_tokens: P, how many tokens one image takes.
        image_token: the text that stands for one image feature.
    """

    # 4.x reads these; 5.x goes by the parameter names of __init__ and warns about them
    if hasattr(ProcessorMixin, "attributes"):
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        num_image_tokens=256,
        image_token=IMAGE_TOKEN,
        **kwargs,
    ):
        self.auto_map = {"AutoProcessor": "processing_prefix_vlm.PrefixVLMProcessor"}
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no token {image_token!r}; add it, or use PrefixVLMProcessor.from_backbones."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or default_chat_template(image_token))

    @classmethod
    def from_backbones(
        cls, vision: str = "google/siglip-so400m-patch14-224", text: str = "Qwen/Qwen2.5-0.5B", **kwargs
    ) -> "PrefixVLMProcessor":
        """The processor that belongs to `PrefixVLMForConditionalGeneration.from_backbones(vision, text)`.

        Adds the image token and ChatML's turn tokens where the tokenizer lacks them, and pads on the left, as batched
        generation needs (training collators choose their own side).
        """
        config = AutoConfig.from_pretrained(vision)
        config = getattr(config, "vision_config", config)
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.add_tokens([IMAGE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN], special_tokens=True)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            image_processor = AutoImageProcessor.from_pretrained(vision)
        except OSError:  # a folder of weights alone
            image_processor = siglip_image_processor(config.image_size)
        num_image_tokens = (config.image_size // config.patch_size) ** 2
        return cls(image_processor, tokenizer, num_image_tokens=num_image_tokens, **kwargs)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, return_labels: bool = False, **kwargs) -> BatchFeature:
        """Prepares images and raw text.

        Where each image stands is said by `image_token` in the text, once an image. A text that does not have exactly as
        many as its images gets them in front, and the tokens in it count as words that somebody typed.

        Args:
            images: one image, a list (dealt out to the texts in order), or a list of lists, one for each text. Any form
                that `load_image` opens.
            text: one text or a list.
            return_labels: also give labels, the ids of all text tokens, -100 at images and padding.
            kwargs: those of the tokenizer and the image processor (`padding`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (I, C, H, W), `labels` (B, T) if asked for.

        Raises:
            ValueError: for an image that cannot be used, images that cannot be dealt out, or a `max_length` that would
                cut through an image.
        """
        if images is None and text is None:
            raise ValueError("Give the processor images, text or both.")
        kwargs = self._merged_kwargs(kwargs)
        if text is None:
            return self._image_features(_as_list(images), kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        groups = self._images_by_text(images, texts)
        samples = []
        for sample, group in zip(texts, groups, strict=True):
            if sample.count(self.image_token) != len(group):
                sample = self.image_token * len(group) + self.as_typed(sample)
            samples.append([(sample, True)])
        bos = self.tokenizer.bos_token
        if bos is not None and texts and texts[0].startswith(bos):
            kwargs["text_kwargs"]["add_special_tokens"] = False
        return self._encode(samples, groups, kwargs, return_labels, alone=isinstance(text, str))

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_labels: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Renders conversations with images, and tokenizes them if asked.

        Control tokens typed by a user are kept as words, so that they can neither ask for an image nor end a turn.

        Args:
            conversation: messages `{"role": ..., "content": text or parts}`, or a list of such conversations. An image part
                is `{"type": "image", "image" | "url" | "path": ...}`.
            return_labels: with `tokenize` and `return_dict`, also give labels: the assistant's answers and their end
                tokens, -100 elsewhere.
            return_assistant_tokens_mask: the same places as a mask of 0 and 1, `assistant_masks`.
            processor_kwargs, kwargs: arguments of the tokenizer and the image processor; what they do not know goes to
                the template (`add_generation_prompt`, `continue_final_message`, ...).

        Returns:
            The text, or `input_ids`, or with `return_dict` what `__call__` returns.
        """
        template_kwargs, kwargs = self._split_kwargs({**kwargs, **(processor_kwargs or {})})
        alone = not (conversation and isinstance(conversation[0], list | tuple))
        conversations, groups = [], []
        for messages in [conversation] if alone else conversation:
            messages, images = self._clean(messages)
            conversations.append(messages)
            groups.append(images)
        texts, spans = render_jinja_template(
            conversations=conversations,
            chat_template=chat_template or self.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **template_kwargs},
        )
        if not tokenize:
            return texts[0] if alone else texts
        if "images" in kwargs:
            groups = self._images_by_text(kwargs.pop("images"), texts)
        kwargs = self._merged_kwargs(kwargs)
        kwargs["text_kwargs"]["add_special_tokens"] = False
        samples = [_split(text, answers) for text, answers in zip(texts, spans, strict=True)]
        encoded = self._encode(samples, groups, kwargs, return_labels or return_assistant_tokens_mask, alone)
        if return_assistant_tokens_mask:
            labels = encoded["labels"] if return_labels else encoded.pop("labels")
            encoded["assistant_masks"] = (
                (labels != IGNORE_INDEX).long()
                if torch.is_tensor(labels)
                else [[int(label != IGNORE_INDEX) for label in row] for row in labels]
            )
        return encoded if return_dict else encoded["input_ids"]

    def _clean(self, messages):
        """A copy of a conversation with typed control tokens made harmless, and its images in the template's order."""
        cleaned, images = [], []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content = self.as_typed(content)
            else:
                content = [
                    {**part, "text": self.as_typed(part["text"])} if part["type"] == "text" else part for part in content
                ]
                sources = [_image_source(part) for part in content if part["type"] in ("image", "image_url")]
                images += [source for source in sources if source is not None]
            cleaned.append({**message, "content": content})
        return cleaned, images

    def as_typed(self, text: str) -> str:
        """The text with the control tokens in it kept as words."""
        for token in (self.image_token, TURN_START_TOKEN, TURN_END_TOKEN):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _split_kwargs(self, kwargs: dict) -> tuple[dict, dict]:
        """Arguments for the template, and those that tokenizer or image processor know."""
        known = {"images", "return_tensors", "text_kwargs", "images_kwargs", "common_kwargs"}
        for name in ("text_kwargs", "images_kwargs"):
            known |= set(PrefixVLMProcessorKwargs.__annotations__[name].__annotations__)
            known |= set(ProcessingKwargs.__annotations__[name].__annotations__)
        return {k: v for k, v in kwargs.items() if k not in known}, {k: v for k, v in kwargs.items() if k in known}

    def _merged_kwargs(self, kwargs: dict) -> dict:
        merged = self._merge_kwargs(PrefixVLMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        common = merged.pop("common_kwargs", {})
        merged["return_tensors"] = merged["text_kwargs"].pop("return_tensors", None) or common.get("return_tensors")
        return merged

    def _images_by_text(self, images, texts: list[str]) -> list[list]:
        if images is None:
            return [[] for _ in texts]
        images = _as_list(images)
        if images and all(isinstance(group, list | tuple) for group in images):
            if len(images) != len(texts):
                raise ValueError(
                    f"There are {len(texts)} texts, but {len(images)} groups of images; give one group a text."
                )
            return [list(group) for group in images]
        if len(texts) == 1:
            return [images]
        counts = [text.count(self.image_token) for text in texts]
        if sum(counts) != len(images):
            if len(images) != len(texts):
                raise ValueError(
                    f"{len(images)} images cannot be dealt out to {len(texts)} texts; pass one list of images for each text."
                )
            counts = [1] * len(texts)
        left = iter(images)
        return [[next(left) for _ in range(count)] for count in counts]

    def _image_features(self, images: list, kwargs: dict) -> BatchFeature:
        images = [load_image(image, f"image {index + 1} of {len(images)}") for index, image in enumerate(images)]
        return self.image_processor(images, **{**kwargs["images_kwargs"], "return_tensors": kwargs["return_tensors"]})

    def _encode(self, samples, groups, kwargs: dict, with_labels: bool, alone: bool) -> BatchFeature:
        """Tokenizes samples of (text, supervised) pieces, pads them and adds the images.

        The pieces of a sample are tokenized one by one, so that no token can straddle the border of an answer.
        """
        text_kwargs = dict(kwargs["text_kwargs"])
        block = self.image_token * self.num_image_tokens
        pieces = [piece.replace(self.image_token, block) for sample in samples for piece, _ in sample]
        special = text_kwargs.pop("add_special_tokens", True)
        padding = text_kwargs.pop("padding", False)
        padding_side = text_kwargs.pop("padding_side", None)
        truncation = text_kwargs.pop("truncation", None)
        max_length = text_kwargs.pop("max_length", None)
        multiple = text_kwargs.pop("pad_to_multiple_of", None)
        piece_ids = iter(self.tokenizer(pieces, add_special_tokens=special, **text_kwargs)["input_ids"] if pieces else [])
        rows, labels = [], []
        for index, (sample, group) in enumerate(zip(samples, groups, strict=True)):
            ids, targets = [], []
            for _, supervised in sample:
                tokens = next(piece_ids)
                ids += tokens
                targets += tokens if supervised else [IGNORE_INDEX] * len(tokens)
            if truncation and max_length is not None and len(ids) > max_length:
                kept = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
                ids, targets = ids[kept], targets[kept]
            found, wanted = ids.count(self.image_token_id), len(group) * self.num_image_tokens
            if found != wanted:
                raise ValueError(
                    f"Text {index + 1} has {found} image tokens where its {len(group)} image(s) need {wanted}; "
                    f"raise max_length (now {max_length}), or give one image for each {self.image_token}."
                )
            rows.append(ids)
            labels.append([IGNORE_INDEX if token == self.image_token_id else token for token in targets])
        width = _padded_width([len(row) for row in rows], padding, max_length, multiple)
        left = (padding_side or self.tokenizer.padding_side) == "left"
        pad_token_id = self.tokenizer.pad_token_id
        data = {
            "input_ids": _pad(rows, width, pad_token_id if pad_token_id is not None else 0, left),
            "attention_mask": _pad([[1] * len(row) for row in rows], width, 0, left),
        }
        if with_labels:
            data["labels"] = _pad(labels, width, IGNORE_INDEX, left)
        if alone and kwargs["return_tensors"] is None:
            data = {name: rows[0] for name, rows in data.items()}
        if images := [image for group in groups for image in group]:
            data.update(self._image_features(images, kwargs))
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes image processor, tokenizer, chat template, and the code that loads them without this package."""
        files = super().save_pretrained(save_directory, **kwargs)
        # transformers 5 keeps the image processor inside processor_config.json, where 4.x does not look
        self.image_processor.save_pretrained(save_directory)
        _make_readable_by_4x(save_directory)
        if not __name__.startswith("transformers_modules"):
            # as remote code, transformers itself copies the files beside this one
            importlib.import_module("..configuration.hub_export", __package__).export_code(save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, token=kwargs.get("token"))
        return files


def _as_list(images) -> list:
    return list(images) if isinstance(images, list | tuple) else [images]


def _image_source(part: dict):
    if part["type"] == "image_url":
        return part["image_url"]["url"]
    return next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)


def _split(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """A text cut at the borders of the spans, each piece with whether it lies in one."""
    pieces, start = [], 0
    for begin, end in spans:
        pieces += [(text[start:begin], False), (text[begin:end], True)]
        start = end
    return [(piece, supervised) for piece, supervised in [*pieces, (text[start:], False)] if piece]


def _padded_width(lengths: list[int], padding, max_length: int | None, multiple: int | None) -> int:
    """How long every row is to be at least, for the `padding` of transformers' tokenizers."""
    if padding is False or str(getattr(padding, "value", padding)) == "do_not_pad" or not lengths:
        return 0
    to_maximum = str(getattr(padding, "value", padding)) == "max_length" and max_length is not None
    width = max(max(lengths), max_length if to_maximum else 0)
    return -(-width // multiple) * multiple if multiple else width


def _pad(rows: list[list[int]], width: int, value: int, left: bool) -> list[list[int]]:
    fills = [[value] * (width - len(row)) for row in rows]
    return [fill + row if left else row + fill for fill, row in zip(fills, rows, strict=True)]


def _make_readable_by_4x(folder):
    """Renames what transformers 5 writes of a tokenizer to what 4.x and 5.x both read."""
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, ensure_ascii=False)


__all__ = ["PrefixVLMProcessor"]
