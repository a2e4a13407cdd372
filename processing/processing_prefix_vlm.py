"""Images and text to the tensors the model reads, and to the labels it learns from.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and its own siblings.

Shapes: B batch, T tokens, P image tokens, I images in the batch.
"""

import importlib
import json
import os
import re
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import PaddingStrategy
from transformers.utils.chat_template_utils import render_jinja_template

from ..configuration.configuration_prefix_vlm import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    PUSH_KWARGS,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
)
from .images_prefix_vlm import load_image

IMAGE_PARTS = ("image", "image_url")  # of a message

# the arguments that transformers accepts for tokenizers and image processors
TEXT_KWARGS = frozenset(ProcessingKwargs.__annotations__["text_kwargs"].__annotations__)
IMAGE_KWARGS = frozenset(ProcessingKwargs.__annotations__["images_kwargs"].__annotations__) | {"do_convert_rgb"}

# ChatML, with the image before the first turn as the paper's sequence has it: <im>*P INST1 ans1 INST2 ans2 (section III-D).
# Of several images, those that open the first message move to the front; the others stay in place.
# message['role'], not message.role: attribute access is slow in Jinja's sandbox.
CHAT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif -%}
{%- set front = namespace(message=-1, images=0) -%}
{%- for message in messages -%}
  {%- if front.message < 0 and message['content'] is not string -%}
    {%- set seen = namespace(images=0, leading=0, text=false) -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ('image', 'image_url') -%}
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
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] in ('image', 'image_url') -%}
          {%- if skip.images %}{% set skip.images = skip.images - 1 %}{% else %}{{ 'IMAGE_TOKEN' }}{% endif -%}
        {%- elif part['type'] == 'text' -%}
          {{- part['text'] -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {{- 'TURN_START' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- body + 'TURN_END' -}}{%- endgeneration -%}
  {%- else -%}
    {{- body + 'TURN_END' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'TURN_STARTassistant\\n' }}{% endif -%}
"""


def default_chat_template(image_token: str = IMAGE_TOKEN) -> str:
    """The Jinja chat template for a tokenizer whose image token is `image_token`."""
    template = CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token)
    return template.replace("TURN_START", TURN_START_TOKEN).replace("TURN_END", TURN_END_TOKEN)


def siglip_image_processor(image_size: int, **kwargs):
    """SigLIP's image processor for square images of `image_size` pixels; needs no torchvision."""
    # on transformers 5 the plain name is the class for torchvision, and merely accessing it warns
    has_pil_class = hasattr(transformers, "SiglipImageProcessorPil")
    image_processor = transformers.SiglipImageProcessorPil if has_pil_class else transformers.SiglipImageProcessor
    return image_processor(size={"height": image_size, "width": image_size}, **kwargs)


class PrefixVLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: a tokenizer that knows `image_token`.
        chat_template: Jinja; by default ChatML with the image in front.
        num_image_tokens: P, tokens per image.
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
        """The processor that matches `PrefixVLMForConditionalGeneration.from_backbones(vision, text)`.

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

        `image_token` in the text marks the place of one image. If a text does not have exactly one per image, its images go
        in front, and the image tokens in it are kept as typed words. Turn tokens are left alone, since rendered
        conversations are passed here too; `apply_chat_template` guards against typed ones.

        Args:
            images: one image, a list (distributed to the texts in order), or a list of lists, one for each text; in any
                form that `load_image` opens.
            text: one text or a list.
            return_labels: also return labels, the ids of all text tokens, -100 at images and padding.
            kwargs: those of the tokenizer and the image processor (`padding`, `return_tensors`, ...), also by modality
                (`text_kwargs`, `images_kwargs`).

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (I, C, H, W), `labels` (B, T) if requested; one
            text gives a batch of one, as with the processors of transformers.

        Raises:
            ValueError: for an unusable image, images that cannot be distributed to the texts, or a `max_length` that would
                cut through an image.
        """
        if images is None and text is None:
            raise ValueError("Give the processor images, text or both.")
        text_kwargs, image_kwargs, unknown = self._sorted_kwargs(kwargs)
        # evaluation suites pass lists of videos and audios to every processor, even empty ones
        if unused := [name for name, value in unknown.items() if not (value is None or value == [])]:
            raise TypeError(f"The processor does not take the argument(s) {', '.join(unused)}; leave them out.")
        if text is None:
            return self._image_features(images, image_kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        groups = self._images_by_text(images, texts)
        texts = [self._with_images(sample, len(group)) for sample, group in zip(texts, groups, strict=True)]
        bos = self.tokenizer.bos_token
        if bos and texts and texts[0].startswith(bos):  # rendered already, with all its special tokens
            text_kwargs["add_special_tokens"] = False
        samples = [[(sample, True)] for sample in texts]
        return self._encode(samples, groups, text_kwargs, image_kwargs, return_labels)

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
        """Renders conversations with images and, with `tokenize`, tokenizes them.

        Control tokens typed by a user are kept as words, so that they can neither insert an image nor end a turn.

        Args:
            conversation: messages `{"role": ..., "content": text or parts}`, or a list of such conversations. An image part
                is `{"type": "image", "image" | "url" | "path" | "base64": ...}`; without a source it stands for one of
                `images`, given as to `__call__`.
            return_labels: with `tokenize` and `return_dict`, also return labels: the assistant's answers and their end
                tokens, -100 elsewhere.
            return_assistant_tokens_mask: also return `assistant_masks`, the same positions as a mask of 0 and 1.
            processor_kwargs, kwargs: arguments of the tokenizer and the image processor; all others go to the
                template (`add_generation_prompt`, `continue_final_message`, ...).

        Returns:
            The text, or `input_ids`, or with `return_dict` what `__call__` returns.

        Raises:
            ValueError: as `__call__`; for a message part that is neither text nor image; or if labels are requested with
                a template that does not mark the answers.
        """
        text_kwargs, image_kwargs, template_kwargs = self._sorted_kwargs({**kwargs, **(processor_kwargs or {})})
        images = template_kwargs.pop("images", None)
        chat_template = chat_template or self.chat_template
        marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
        with_labels = return_labels or return_assistant_tokens_mask
        if with_labels and not marks_answers:
            raise ValueError("This chat template does not mark the answers with {% generation %}; add it to get labels.")
        if template_kwargs.get("continue_final_message") and template_kwargs.get("add_generation_prompt"):
            raise ValueError("Either continue the final message or add a generation prompt, not both.")
        alone = not (conversation and isinstance(conversation[0], list | tuple))
        cleaned = [self._clean(messages) for messages in ([conversation] if alone else conversation)]
        texts, spans = render_jinja_template(
            conversations=[messages for messages, _ in cleaned],
            chat_template=chat_template,
            return_assistant_tokens_mask=marks_answers,
            **{**self.tokenizer.special_tokens_map, **template_kwargs},
        )
        if not tokenize:
            return texts[0] if alone else texts
        groups = [sources for _, sources in cleaned]
        if images is not None:
            if any(groups):
                raise ValueError("Images are given both in the messages and as `images`; choose one.")
            groups = self._images_by_text(images, texts)
        text_kwargs["add_special_tokens"] = False
        samples = [_split(text, answers) for text, answers in zip(texts, spans or [[]] * len(texts), strict=True)]
        encoded = self._encode(samples, groups, text_kwargs, image_kwargs, with_labels)
        if return_assistant_tokens_mask:
            labels = encoded["labels"] if return_labels else encoded.pop("labels")
            encoded["assistant_masks"] = _is_supervised(labels)
        return encoded if return_dict else encoded["input_ids"]

    def _clean(self, messages):
        """A copy of a conversation with typed control tokens neutralised, and its images in the template's order."""
        cleaned, images = [], []
        for message in messages:
            content = message.get("content") or ""
            if isinstance(content, str):
                content = self.as_typed(content)
            else:
                content = self._clean_parts(content)
                sources = [_image_source(part) for part in content if part["type"] in IMAGE_PARTS]
                images += [source for source in sources if source is not None]
            cleaned.append({**message, "content": content})
        return cleaned, images

    def _clean_parts(self, parts: list[dict]) -> list[dict]:
        cleaned, before = [], ""
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                text = self.as_typed(part.get("text") or "")
                if before and self.as_typed(before + text) != before + text:  # a token split across two parts
                    text = " " + text
                before += text
                part = {"type": "text", "text": text}
            elif kind not in IMAGE_PARTS:
                raise ValueError(f"A message part is of type {kind!r}; only text and image parts can be read.")
            cleaned.append(part)
        return cleaned

    def as_typed(self, text: str) -> str:
        """The text with its control tokens broken up into plain words."""
        for token in (self.image_token, TURN_START_TOKEN, TURN_END_TOKEN):
            text = _broken_up(text, token)
        return text

    def _with_images(self, text: str, images: int) -> str:
        """A raw text with one image token for each of its images."""
        if text.count(self.image_token) == images:
            return text
        bos = self.tokenizer.bos_token
        start = bos if bos and text.startswith(bos) else ""
        return start + self.image_token * images + _broken_up(text.removeprefix(start), self.image_token)

    def _sorted_kwargs(self, kwargs: dict) -> tuple[dict, dict, dict]:
        """Arguments for the tokenizer, for the image processor, and for neither."""
        common = kwargs.pop("common_kwargs", None) or {}
        text_kwargs = {**common, **(kwargs.pop("text_kwargs", None) or {})}
        image_kwargs = {**common, **(kwargs.pop("images_kwargs", None) or {})}
        others = {}
        for name, value in kwargs.items():
            if name == "return_tensors" or name in TEXT_KWARGS:
                text_kwargs[name] = value
            elif name in IMAGE_KWARGS:
                image_kwargs[name] = value
            else:
                others[name] = value
        image_kwargs["return_tensors"] = text_kwargs.pop("return_tensors", None) or image_kwargs.get("return_tensors")
        return text_kwargs, image_kwargs, others

    def _images_by_text(self, images, texts: list[str]) -> list[list]:
        images = [] if images is None else _as_list(images)
        if not images:
            return [[] for _ in texts]
        if all(isinstance(group, list | tuple) for group in images):
            if len(images) != len(texts):
                raise ValueError(
                    f"There are {len(texts)} texts, but {len(images)} groups of images; give one group per text."
                )
            return [list(group) for group in images]
        if len(texts) == 1:
            return [images]
        counts = [text.count(self.image_token) for text in texts]
        if sum(counts) != len(images):
            if len(images) != len(texts):
                raise ValueError(
                    f"{len(images)} images cannot be distributed to {len(texts)} texts; give a list of images per text."
                )
            counts = [1] * len(texts)
        left = iter(images)
        return [[next(left) for _ in range(count)] for count in counts]

    def _image_features(self, images, image_kwargs: dict) -> BatchFeature:
        """The pixels of one image, a list, or a list of lists."""
        images = [image for group in _as_list(images) for image in _as_list(group)]
        if not images:
            raise ValueError("The list of images is empty; give at least one image.")
        images = [load_image(image, f"image {index + 1} of {len(images)}") for index, image in enumerate(images)]
        return self.image_processor([_rows_repeated(image) for image in images], **image_kwargs)

    def _encode(self, samples, groups, text_kwargs: dict, image_kwargs: dict, with_labels: bool) -> BatchFeature:
        """Tokenizes samples of (text, supervised) pieces, pads them and adds the images.

        The pieces of a sample are tokenized one by one, so that no token spans the boundary of an answer.
        """
        truncation = text_kwargs.get("truncation") not in (None, False, "do_not_truncate")
        max_length: Any = text_kwargs.get("max_length")
        if truncation and max_length is None:
            max_length = self.tokenizer.model_max_length
        pieces = [piece for sample in samples for piece, _ in sample]
        special = text_kwargs.get("add_special_tokens", True)
        piece_ids = iter(self.tokenizer(pieces, add_special_tokens=special)["input_ids"] if pieces else [])
        rows, labels = [], []
        for number, (sample, group) in enumerate(zip(samples, groups, strict=True), start=1):
            ids, targets = [], []
            for _, supervised in sample:
                for token in next(piece_ids):
                    is_image = token == self.image_token_id
                    length = self.num_image_tokens if is_image else 1
                    ids += [token] * length
                    targets += [token if supervised and not is_image else IGNORE_INDEX] * length
            found, needed = ids.count(self.image_token_id), len(group) * self.num_image_tokens
            if found != needed:
                raise ValueError(
                    f"Text {number} has {found // self.num_image_tokens} {self.image_token} token(s) but {len(group)} "
                    "image(s); give one image per token."
                )
            if truncation and len(ids) > max_length:
                kept = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
                ids, targets = ids[kept], targets[kept]
                if ids.count(self.image_token_id) != needed:
                    raise ValueError(
                        f"max_length={max_length} would cut through the {needed} image tokens of text {number}; raise it."
                    )
            rows.append(ids)
            labels.append(targets)
        width = _padded_width(
            [len(row) for row in rows], text_kwargs.get("padding"), max_length, text_kwargs.get("pad_to_multiple_of")
        )
        left = (text_kwargs.get("padding_side") or self.tokenizer.padding_side) == "left"
        pad_token_id = self.tokenizer.pad_token_id
        data = {
            "input_ids": _pad(rows, width, pad_token_id if pad_token_id is not None else 0, left),
            "attention_mask": _pad([[1] * len(row) for row in rows], width, 0, left),
        }
        if with_labels:
            data["labels"] = _pad(labels, width, IGNORE_INDEX, left)
        if any(groups):
            data.update(self._image_features(groups, image_kwargs))
        return BatchFeature(data=data, tensor_type=image_kwargs["return_tensors"])

    def save_pretrained(self, save_directory, push_to_hub: bool = False, repo_id: str | None = None, **kwargs):
        """Writes image processor, tokenizer, chat template, and the code that loads them without this package."""
        push_kwargs = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs}
        files = super().save_pretrained(save_directory, **kwargs)
        # transformers 5 keeps the image processor inside processor_config.json, where 4.x does not look
        self.image_processor.save_pretrained(save_directory)
        _make_readable_by_4x(save_directory)
        if not __name__.startswith("transformers_modules"):
            # as remote code, transformers copies the files beside this one itself
            importlib.import_module("..configuration.hub_export", __package__).export(save_directory)
        if push_to_hub:
            # only now that every file is there
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **push_kwargs)
        return files


def _as_list(images) -> list:
    return list(images) if isinstance(images, list | tuple) else [images]


def _rows_repeated(image):
    """Stretches an image one or three pixels high, whose rows transformers would mistake for channels."""
    return image.resize((image.width, 4 * image.height), resample=0) if image.height in (1, 3) else image


def _image_source(part: dict):
    """The source of an image part, or `None` for a placeholder."""
    if part["type"] == "image_url":
        source = part["image_url"]
        return source["url"] if isinstance(source, dict) else source
    if part.get("base64") is not None:
        return "data:;base64," + part["base64"]
    return next((part[key] for key in ("image", "url", "path") if part.get(key) is not None), None)


def _broken_up(text: str, token: str) -> str:
    return text.replace(token, f"{token[0]} {token[1:]}")


def _is_supervised(labels):
    """1 where there is a label, in the form of the labels: an array, a tensor, a list or a list of lists."""
    if hasattr(labels, "shape"):
        return (labels != IGNORE_INDEX) * 1
    return [_is_supervised(label) if isinstance(label, list) else int(label != IGNORE_INDEX) for label in labels]


def _split(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """A text split at the span boundaries into (piece, whether it lies in a span)."""
    pieces, start = [], 0
    for begin, end in spans:
        pieces += [(text[start:begin], False), (text[begin:end], True)]
        start = end
    return [(piece, supervised) for piece, supervised in [*pieces, (text[start:], False)] if piece]


def _padded_width(lengths: list[int], padding, max_length: int | None, multiple: int | None) -> int:
    """The minimum length of every row, for the `padding` of transformers' tokenizers."""
    strategy = PaddingStrategy.LONGEST if padding is True else PaddingStrategy(padding or "do_not_pad")
    if strategy == PaddingStrategy.DO_NOT_PAD or not lengths:
        return 0
    width = max(lengths)
    if strategy == PaddingStrategy.MAX_LENGTH:
        if max_length is None:
            raise ValueError("padding='max_length' needs a max_length.")
        width = max(width, max_length)
    return -(-width // multiple) * multiple if multiple else width


def _pad(rows: list[list[int]], width: int, value: int, left: bool) -> list[list[int]]:
    fills = [[value] * (width - len(row)) for row in rows]
    return [fill + row if left else row + fill for fill, row in zip(fills, rows, strict=True)]


def _make_readable_by_4x(folder):
    """Renames the tokenizer settings that transformers 5 writes to names that 4.x and 5.x both read."""
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
