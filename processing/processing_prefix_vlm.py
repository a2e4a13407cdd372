"""Images and text to the tensors the model reads, and to the labels it learns from.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and its own siblings.

Shapes: B batch, T tokens, P image tokens, I images in the batch.
"""

import importlib
import inspect
import json
import os
import re
from collections.abc import Callable
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..configuration.configuration_prefix_vlm import (
    HUB_KWARGS,
    IGNORE_INDEX,
    IMAGE_TOKEN,
    PUSH_KWARGS,
    TURN_START_TOKEN,
    image_tokens,
)
from ..configuration.conversation_prefix_vlm import blanks_before_answers, chat_template_of, load_tokenizer
from ..configuration.vision_backbone_prefix_vlm import vision_backbone
from .answers_prefix_vlm import answer_spans, refuse_dropped
from .images_prefix_vlm import load_image
from .text_prefix_vlm import ControlTokens

logger = logging.get_logger(__name__)

IMAGE_PARTS = ("image", "image_url")  # of a message

# the arguments that transformers accepts for tokenizers and image processors
TEXT_KWARGS = frozenset(ProcessingKwargs.__annotations__["text_kwargs"].__annotations__) | {"return_tensors"}
TEXT_KWARGS |= {"return_text_replacement_offsets"}  # which 4.x does not know
IMAGE_KWARGS = frozenset(ProcessingKwargs.__annotations__["images_kwargs"].__annotations__) | {"do_convert_rgb"}
# dictionaries of arguments
KWARGS_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs")
# of the tokenizer's arguments, those that are used here
USED_TEXT_KWARGS = {"add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "truncation"}
USED_TEXT_KWARGS |= {"return_attention_mask", "return_mm_token_type_ids", "return_tensors", "verbose"}
USED_TEXT_KWARGS |= {"return_text_replacement_offsets"}
RENDERING_KWARGS = ("add_generation_prompt", "continue_final_message")  # used outside of the template


class PrefixVLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: a tokenizer that knows `image_token`.
        chat_template: `chatml`, with the image in front; `own`, the tokenizer's, with images where they stand; or Jinja.
            By default `own` if there is one that does not frame turns as ChatML does.
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
    ):
        self.auto_map = {"AutoProcessor": "processing_prefix_vlm.PrefixVLMProcessor"}
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no token {image_token!r}; add it, or use PrefixVLMProcessor.from_backbones."
            )
        self._control: ControlTokens | None = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template_of(tokenizer, chat_template, image_token))

    @classmethod
    def from_backbones(
        cls,
        vision: str = "google/siglip-so400m-patch14-224",
        text: str = "Qwen/Qwen2.5-0.5B",
        image_size: int | None = None,
        center_crop: bool = False,
        pixel_shuffle: int = 1,
        mean_pooling: int = 1,
        chat_template: str | None = None,
        **kwargs,
    ) -> "PrefixVLMProcessor":
        """The processor that matches `PrefixVLMForConditionalGeneration.from_backbones(vision, text)`.

        Adds the image token, and with ChatML its turn tokens, where the tokenizer lacks them, and pads on the left, as
        batched generation needs (training collators choose their own side).

        Args:
            vision, text: Hub ids or folders.
            image_size, pixel_shuffle, mean_pooling: as given for the model.
            center_crop: prepare pictures as the vision model's own preprocessor does even where that cuts off their edges;
                by default whole pictures are resized, and a line says so.
            chat_template: as for this class.
            kwargs: arguments of this class, and of transformers for the Hub (`cache_dir`, `revision`, `token`, ...).

        Raises:
            ValueError: for an unusable vision model or image size, or a compression that does not divide its patches.
        """
        hub = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        backbone = vision_backbone(vision, image_size, **hub)
        tokenizer = load_tokenizer(text, chat_template, **hub)
        if tokenizer is None:
            raise ValueError(f"{text} has no tokenizer; add its files, or name a model that has one.")
        return cls(
            backbone.image_processor(center_crop),
            tokenizer,
            tokenizer.chat_template,
            num_image_tokens=image_tokens(backbone.patch_grid, pixel_shuffle, mean_pooling),
            **kwargs,
        )

    if not hasattr(ProcessorMixin, "image_token_ids"):  # which 5.x has

        @property
        def image_token_ids(self) -> list[int]:
            """The tokens that stand for images, as inference engines ask for them."""
            return [self.image_token_id]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """How many tokens images (height, width) take, and into how many pieces they are cut, as vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, return_labels: bool = False, **kwargs) -> BatchFeature:
        """Prepares images and raw text.

        `image_token` in a text marks the place of one image; the images of a text without any go in front. Other control
        tokens in it are control tokens, too, since rendered conversations are passed here; `as_typed` makes words of them.

        Args:
            images: one image, a list (distributed to the texts in order), or a list of lists, one for each text; in any
                form that `load_image` opens.
            text: one text or a list; or one conversation, to be answered or, if it ends with an answer, continued.
            return_labels: also return labels, the ids of all text tokens, -100 at images and padding.
            kwargs: those of the tokenizer and the image processor (`padding`, `return_tensors`, ...), also by modality
                (`text_kwargs`, `images_kwargs`). As in transformers, defaults are those stored with the tokenizer.

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (I, C, H, W), `labels` (B, T) if requested; one
            text gives a batch of one, as with the processors of transformers. `return_mm_token_type_ids` adds
            `mm_token_type_ids` (B, T), 1 at images; `return_text_replacement_offsets` adds where the images stand in
            each text, as processors of transformers 5 say it.

        Raises:
            ValueError: for an unusable image, a text with image tokens but not one for each of its images, a `max_length`
                that would cut through an image, or an argument that is given twice with different values.
            TypeError: for an argument that has no effect here.
        """
        if images is None and text is None:
            raise ValueError("Give the processor images, text or both.")
        if _is_conversation(text):  # a pipeline of transformers 4 passes those of a generator here
            is_open = text[-1]["role"] == "assistant"
            how = {"add_generation_prompt": not is_open, "continue_final_message": is_open, "images": images}
            return self.apply_chat_template(
                text, tokenize=True, return_dict=True, return_labels=return_labels, **how, **kwargs
            )
        text_kwargs, image_kwargs, unknown = self._sorted_kwargs(kwargs)
        # evaluation suites pass lists of videos and audios to every processor, even empty ones
        if unused := [name for name, value in unknown.items() if not _is_nothing(value)]:
            raise TypeError(f"The processor does not take the argument(s) {', '.join(unused)}; leave them out.")
        if text is None:
            return self._image_features(images, image_kwargs, text_kwargs.get("return_tensors"))
        texts = list(text) if hasattr(text, "__iter__") and not isinstance(text, str) else [text]
        if not all(isinstance(sample, str) for sample in texts):
            raise TypeError("`text` must be a string or a list of strings.")
        control_tokens = self._control_tokens()
        counts = [control_tokens.count_images(sample) for sample in texts]
        groups = self._images_by_text(images, counts)
        bos = self.tokenizer.bos_token
        for index, (sample, count, group) in enumerate(zip(texts, counts, groups, strict=True)):
            if not count:
                start = bos if bos and bos != TURN_START_TOKEN and sample.startswith(bos) else ""
                texts[index] = start + self.image_token * len(group) + sample.removeprefix(start)
        samples = [[(sample, True)] for sample in texts]
        encoded = self._encode(samples, groups, text_kwargs, image_kwargs, return_labels)
        if text_kwargs.get("return_text_replacement_offsets"):
            encoded["text_replacement_offsets"] = [self._replacements(sample) for sample in texts]
        return encoded

    def _replacements(self, text: str) -> list[dict]:
        """Where the images stand in a text, and where their tokens will: `span` and `new_span`, (start, end) characters."""
        expanded = self.image_token * self.num_image_tokens
        found: list[dict] = []
        for match in self._control_tokens().find(text):
            if match[0] == self.image_token:
                start = match.start() + len(found) * (len(expanded) - len(self.image_token))
                spans = {"span": match.span(), "new_span": (start, start + len(expanded))}
                found.append({"type": "image", "text": self.image_token, "replacement": expanded, **spans})
        return found

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_labels: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """Renders conversations with images and, with `tokenize`, tokenizes them.

        Control tokens in the messages are words, to the letter, so that nothing typed can insert an image or end a turn.
        Only the template writes control tokens. In a rendered text, an invisible mark tells them apart; `__call__` and
        `text_ids` read it, but the tokenizer alone does not.

        Args:
            conversation: messages `{"role": ..., "content": text or parts}`, or a list of such conversations. An image part
                is `{"type": "image", "image" | "url" | "path" | "base64": ...}`; without a source it stands for one of
                `images`, given as to `__call__`. An assistant's message may have a `weight`: 0 gives it no labels.
            return_labels: with `tokenize` and `return_dict`, also return labels: what the template marks by
                `{% generation %}`, or else the assistant's answers and the tokens that close them; -100 elsewhere.
            return_assistant_tokens_mask: also return `assistant_masks`, the same positions as a mask of 0 and 1.
            processor_kwargs, kwargs: arguments of the tokenizer and the image processor; all others go to the
                template (`add_generation_prompt`, `continue_final_message`, ...).
            sanitize_control_tokens: as in transformers 5, but always on.

        Returns:
            The text, or `input_ids`, or with `return_dict` what `__call__` returns.

        Raises:
            ValueError: as `__call__`; for a message part that is neither text nor image, or a weight that is neither 0
                nor 1; for image parts that are not one for each image; for what the template refuses or leaves out; or if
                labels are requested, and the template closes an answer with no control token.
            TypeError: for an argument that neither the template nor anything else uses.
        """
        text_kwargs, image_kwargs, template_kwargs = self._sorted_kwargs(kwargs, processor_kwargs or {})
        images = template_kwargs.pop("images", None)
        chat_template = chat_template or self.chat_template
        marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
        with_labels = return_labels or return_assistant_tokens_mask
        if with_labels and not (tokenize and return_dict):
            raise ValueError("Labels and masks of the answers need tokenize=True and return_dict=True.")
        if template_kwargs.get("continue_final_message") and template_kwargs.get("add_generation_prompt"):
            raise ValueError("Either continue the final message or add a generation prompt, not both.")
        if not sanitize_control_tokens:
            raise ValueError("Control tokens that are typed always stay words; leave out sanitize_control_tokens=False.")
        if text_kwargs.get("add_special_tokens"):
            raise ValueError("The chat template writes the special tokens itself; leave out add_special_tokens=True.")
        if not tokenize and (images is not None or text_kwargs or image_kwargs):
            unused = [*text_kwargs, *image_kwargs, *([] if images is None else ["images"])]
            raise ValueError(f"Without tokenize=True, {', '.join(unused)} would have no effect; leave it out.")
        for name, value in template_kwargs.items():
            is_used = name in RENDERING_KWARGS or re.search(rf"\b{re.escape(name)}\b", chat_template)
            if not is_used and value is not False and not _is_nothing(value):
                raise TypeError(f"Neither the processor nor the chat template uses the argument {name}; leave it out.")
        alone = not (conversation and isinstance(conversation[0], list | tuple))
        control_tokens = self._control_tokens()
        cleaned = [_clean(messages, control_tokens.escape) for messages in ([conversation] if alone else conversation)]
        special_tokens = self.tokenizer.special_tokens_map
        for name in template_kwargs.keys() - special_tokens.keys():
            template_kwargs[name] = _with_texts(template_kwargs[name], control_tokens.escape)
        template_kwargs = {**special_tokens, **template_kwargs}

        def render(messages, marks_answers=False):
            texts, spans = render_jinja_template(
                [messages], chat_template=chat_template, return_assistant_tokens_mask=marks_answers, **template_kwargs
            )
            return texts[0], spans[0] if marks_answers else None

        blanks = blanks_before_answers(self.tokenizer, chat_template) if with_labels and not marks_answers else ""
        is_open = bool(template_kwargs.get("continue_final_message"))
        texts, spans = [], []
        for number, (messages, sources, weights) in enumerate(cleaned, start=1):
            try:
                text, answers = render(messages, marks_answers)
                written = control_tokens.count_images(text)
                if written < len(sources):
                    raise ValueError(
                        f"it has {len(sources)} image(s), but the chat template wrote {written} {self.image_token} "
                        "token(s); use one that writes a token for each image"
                    )
                refuse_dropped(messages, text)
                if with_labels and not marks_answers:
                    answers = answer_spans(messages, text, lambda other: render(other)[0], control_tokens, blanks, is_open)
                if answers and not all(weights):
                    answers = _weighted(answers, weights)
            except Exception as error:  # of any kind that a template may raise
                raise ValueError(f"Conversation {number} cannot be written: {str(error).rstrip('.')}.") from error
            texts.append(text)
            spans.append(answers or [])
        groups = [[source for source in sources if source is not None] for _, sources, _ in cleaned]
        if not tokenize:
            return texts[0] if alone else texts
        if images is not None:
            if any(groups):
                raise ValueError("Images are given both in the messages and as `images`; choose one.")
            groups = self._images_by_text(images, [control_tokens.count_images(text) for text in texts])
        text_kwargs["add_special_tokens"] = False
        samples = [_split(text, answers) for text, answers in zip(texts, spans, strict=True)]
        encoded = self._encode(samples, groups, text_kwargs, image_kwargs, with_labels)
        if return_assistant_tokens_mask:
            labels = encoded["labels"] if return_labels else encoded.pop("labels")
            encoded["assistant_masks"] = _is_supervised(labels)
        return encoded if return_dict else encoded["input_ids"]

    def as_typed(self, text: str) -> str:
        """Text whose control tokens are words when the processor reads it, also as a part of a longer text."""
        return self._control_tokens().escape(text)

    def text_ids(self, text: str) -> list[int]:
        """The ids of a rendered conversation, each image one token."""
        return self._control_tokens().encode([text])[0]

    def _control_tokens(self) -> ControlTokens:
        if self._control is None or not self._control.are_those_of(self.tokenizer):
            self._control = ControlTokens(self.tokenizer, self.image_token)
        return self._control

    def _sorted_kwargs(self, *given: dict) -> tuple[dict, dict, dict]:
        """Arguments for the tokenizer, for the image processor, and for neither.

        Raises:
            ValueError: for an argument that is given twice, with different values.
            TypeError: for one that would have no effect.
        """
        merged: dict[str, Any] = {}
        text_kwargs: dict[str, Any] = {}
        image_kwargs: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for kwargs in given:
            flat = {name: value for name, value in kwargs.items() if name not in KWARGS_GROUPS}
            for group in (flat, *(kwargs.get(name) or {} for name in KWARGS_GROUPS)):
                for name, value in group.items():
                    if merged.get(name) is None:
                        merged[name] = value
                    elif value is not None and repr(value) != repr(merged[name]):
                        raise ValueError(f"{name} is given twice, as {merged[name]!r} and as {value!r}; give it once.")
        known = _parameters(self.image_processor)
        for name, value in merged.items():
            if name not in TEXT_KWARGS and name not in IMAGE_KWARGS | known:
                others[name] = value
            elif value is not None:
                (text_kwargs if name in TEXT_KWARGS else image_kwargs)[name] = value
        refused = [name for name, value in text_kwargs.items() if value and name not in USED_TEXT_KWARGS]
        # `load_image` has found the channels already, and the model reads RGB
        refused += image_kwargs.keys() - known | image_kwargs.keys() & {"input_data_format"}
        refused += ["do_convert_rgb"] * (image_kwargs.get("do_convert_rgb") is False)
        if refused:
            raise TypeError(f"The processor cannot use the argument(s) {', '.join(sorted(refused))}; leave them out.")
        return text_kwargs, image_kwargs, others

    def _stored_kwargs(self) -> dict:
        """The arguments that the tokenizer was made with, which are defaults here as in transformers' processors."""
        stored = self.tokenizer.init_kwargs
        kwargs = {name: getattr(self.tokenizer, name, stored[name]) for name in TEXT_KWARGS & stored.keys()}
        # a stride does nothing without what it is for
        if unused := [name for name in kwargs.keys() - USED_TEXT_KWARGS - {"stride"} if kwargs[name]]:
            raise TypeError(
                f"The tokenizer was made with {', '.join(unused)}, which the processor cannot use; load it without."
            )
        return {name: value for name, value in kwargs.items() if value is not None}

    def _images_by_text(self, images, counts: list[int]) -> list[list]:
        """The images of each text; `counts` are its image tokens."""
        images = [] if images is None else _as_list(images)
        if images and all(isinstance(group, list | tuple) for group in images):
            if len(images) != len(counts):
                raise ValueError(
                    f"There are {len(counts)} texts, but {len(images)} groups of images; give one group per text."
                )
            return [list(group) for group in images]
        if len(counts) == 1:
            return [images]
        if sum(counts) != len(images):
            if len(images) != len(counts):
                raise ValueError(
                    f"{len(images)} images cannot be distributed to {len(counts)} texts with {sum(counts)} "
                    f"{self.image_token} token(s); give one image per token, or a list of images per text."
                )
            counts = [1] * len(counts)
        left = iter(images)
        return [[next(left) for _ in range(count)] for count in counts]

    def _image_features(self, images, image_kwargs: dict, return_tensors) -> BatchFeature:
        """The pixels of one image, a list, or a list of lists."""
        images = [image for group in _as_list(images) for image in _as_list(group)]
        if not images:
            raise ValueError("The list of images is empty; give at least one image.")
        images = [load_image(image, f"image {index + 1} of {len(images)}") for index, image in enumerate(images)]
        return self.image_processor(
            [_rows_repeated(image) for image in images], return_tensors=return_tensors, **image_kwargs
        )

    def _encode(self, samples, groups, text_kwargs: dict, image_kwargs: dict, with_labels: bool) -> BatchFeature:
        """Tokenizes samples of (text, supervised) pieces, pads them and adds the images.

        The pieces of a sample are tokenized one by one, so that no token spans the boundary of an answer.
        """
        text_kwargs = {**self._stored_kwargs(), **text_kwargs}
        limit = self._limit(text_kwargs)
        pieces = self._control_tokens().encode_pieces(
            [[piece for piece, _ in sample] for sample in samples],
            add_special_tokens=text_kwargs.get("add_special_tokens", True),
            verbose=text_kwargs.get("verbose", True),
        )
        rows, labels = [], []
        for number, (sample, encoded, group) in enumerate(zip(samples, pieces, groups, strict=True), start=1):
            ids, targets = [], []
            for (_, supervised), piece_ids in zip(sample, encoded, strict=True):
                for token in piece_ids:
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
            if limit is not None and len(ids) > limit:
                kept = slice(len(ids) - limit, None) if self.tokenizer.truncation_side == "left" else slice(limit)
                ids, targets = ids[kept], targets[kept]
                if ids.count(self.image_token_id) != needed:
                    raise ValueError(
                        f"max_length={limit} would cut through the {needed} image tokens of text {number}; raise it."
                    )
            rows.append(ids)
            labels.append(targets)
        width = _padded_width(
            [len(row) for row in rows],
            text_kwargs.get("padding"),
            text_kwargs.get("max_length"),
            text_kwargs.get("pad_to_multiple_of"),
        )
        left = (text_kwargs.get("padding_side") or self.tokenizer.padding_side) == "left"
        pad_token_id = self.tokenizer.pad_token_id
        data = {"input_ids": _pad(rows, width, pad_token_id if pad_token_id is not None else 0, left)}
        if text_kwargs.get("return_attention_mask", True):
            data["attention_mask"] = _pad([[1] * len(row) for row in rows], width, 0, left)
        if text_kwargs.get("return_mm_token_type_ids"):
            is_image = [[int(token == self.image_token_id) for token in row] for row in rows]
            data["mm_token_type_ids"] = _pad(is_image, width, 0, left)
        if with_labels:
            data["labels"] = _pad(labels, width, IGNORE_INDEX, left)
        return_tensors = text_kwargs.get("return_tensors")
        if any(groups):
            data.update(self._image_features(groups, image_kwargs, return_tensors))
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _limit(self, text_kwargs: dict) -> int | None:
        """The most tokens of a text, `None` if it is not cut."""
        truncation, max_length = text_kwargs.get("truncation"), text_kwargs.get("max_length")
        if truncation is None and max_length is not None and not text_kwargs.get("padding"):
            logger.warning_once(
                "max_length without truncation or padding cuts longer texts, as in transformers' tokenizers."
            )
            truncation = True
        strategy = TruncationStrategy("longest_first" if truncation is True else truncation or "do_not_truncate")
        if strategy == TruncationStrategy.ONLY_SECOND:
            raise ValueError("truncation='only_second' is for pairs of texts; the processor takes single ones.")
        if strategy == TruncationStrategy.DO_NOT_TRUNCATE:
            return None
        return self.tokenizer.model_max_length if max_length is None else max_length

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


def _is_conversation(text) -> bool:
    return isinstance(text, list | tuple) and bool(text) and all(isinstance(one, dict) and "role" in one for one in text)


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


def _clean(messages, as_typed: Callable) -> tuple[list[dict], list, list[int]]:
    """A copy of a conversation with its texts as typed, its images in order, `None` for a placeholder, and the weight of
    each answer."""
    cleaned, images, weights = [], [], []
    for message in messages:
        weight = message.get("weight")
        message = {name: value for name, value in message.items() if name != "weight"}
        if weight not in (None, 0, 1):
            raise ValueError(f"The weight of a message is {weight!r}; it must be 0 or 1.")
        if message["role"] == "assistant":
            weights.append(1 if weight is None else int(weight))
        content = message.get("content") or ""
        if not isinstance(content, str):
            images += [_image_source(part) for part in content if part.get("type") in IMAGE_PARTS]
            content = [_readable(part) for part in content]
        cleaned.append(_with_texts({**message, "content": content}, as_typed))
    return cleaned, images, weights


def _weighted(answers: list[tuple[int, int]], weights: list[int]) -> list[tuple[int, int]]:
    """The answers whose weight is not 0."""
    if len(answers) != len(weights):
        raise ValueError(
            f"the chat template marks {len(answers)} answers of {len(weights)}, so none can be left out by its weight"
        )
    return [answer for answer, weight in zip(answers, weights, strict=True) if weight]


def _with_texts(value, change: Callable):
    """A copy of a value of any kind with its texts changed; image parts stay as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_with_texts(one, change) for one in value]
    if isinstance(value, dict) and value.get("type") not in IMAGE_PARTS:
        return {name: _with_texts(one, change) for name, one in value.items()}
    return value


def _readable(part: dict) -> dict:
    """A message part, without the keys that a column of `datasets` adds to every text."""
    if part.get("type") == "text":
        return {"type": "text", "text": part.get("text") or ""}
    if part.get("type") not in IMAGE_PARTS:
        raise ValueError(f"A message part is of type {part.get('type')!r}; only text and image parts can be read.")
    return part


def _is_nothing(value) -> bool:
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _parameters(image_processor) -> set[str]:
    """The names of the arguments that an image processor uses."""
    named = inspect.signature(getattr(image_processor, "preprocess", image_processor)).parameters.values()
    names = {one.name for one in named if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)} - {"images"}
    return names | set(getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", ()))


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
