"""Conversations to training batches: tensors, labels, packed rows, and the noise of stage 0.

Shapes: B rows, T tokens, S samples in the batch, I images in the batch, C channels, H height, W width.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.processing.text_prefix_vlm import ESCAPE
from prefixvlm.train.data.conversation import Conversation, Picture
from prefixvlm.train.data.noise import Noise
from prefixvlm.train.data.packing import pack
from prefixvlm.train.recipes.stages import NoiseToken

ANY_IMAGE = Image.new("RGB", (16, 16))  # where only the number of images matters
TURN_TOKENS = 32  # more than a template puts around the text of a turn; what it writes in front of all comes to it


@dataclass
class Encoded:
    """One sample of `length` tokens.

    input_ids, labels, is_noised: (length,).
    pixel_values: (images, C, H, W); `None` without images.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    is_noised: torch.Tensor
    pixel_values: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.input_ids)


class ConversationCollator:
    """Makes one batch, padded on the right, of `Conversation`s.

    Args:
        processor: a `PrefixVLMProcessor`.
        text_format: `caption` or `conversation`, as in `Stage`.
        noise: share of the input text tokens that become noise; special, image and padding tokens never do.
        noise_token: what they become; see `Noise`.
        augment: mirror and rotate images at random; for images without a canonical orientation.
        seed: for the randomness of samples without a seed of their own. By default it comes from torch's generator, as
            `Trainer` seeds it, in each dataloader worker and epoch anew.
        max_tokens_per_row: pack several samples into rows of at most this many tokens, each seeing only itself; 0 gives
            every sample its own row.
        context: the most tokens that the decoder reads; a sample with more cannot be used. `None` for no limit.
        feature_cache: a `FeatureCache` to read the features of known images from.
        pad_failures: replace a sample that cannot be used by a padding sample instead of raising.

    A batch holds `input_ids`, `attention_mask`, `labels` (B, T), `pixel_values` (I, C, H, W) if there are images,
    `document_ids` (B, T) of packed rows and, with noise, `is_noised` (B, T), true where the input token was replaced. With
    `pad_failures` a batch may have `failed`, the (seed, name, reason) of each sample that was replaced.
    """

    def __init__(
        self,
        processor,
        text_format: str,
        noise: float = 0.0,
        noise_token: NoiseToken = "auto",
        augment: bool = False,
        seed: int | None = None,
        max_tokens_per_row: int = 0,
        context: int | None = None,
        feature_cache=None,
        pad_failures: bool = False,
    ):
        self.processor = processor
        self.text_format = text_format
        self.noise = Noise(processor.tokenizer, noise, noise_token)
        self.augment = augment
        self.seed = seed
        self.max_tokens_per_row = max_tokens_per_row
        self.context = context
        self.feature_cache = feature_cache
        self.pad_failures = pad_failures
        self.frame: int | None = None  # tokens that the template writes around nothing
        self.random = random.Random(seed)

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        if not self.pad_failures:
            return self.collate(self.encoded(conversations))
        try:
            return self.collate(self.encoded(conversations))
        except ValueError:  # one by one, to find which one fails
            samples, failed = [], []
            for sample in conversations:
                try:
                    samples += self.encoded([sample])
                except ValueError as error:
                    samples += self.encoded([sample.as_padding_sample()])
                    failed += [(sample.seed, sample.name, str(error))]
            return {**self.collate(samples), "failed": failed}

    def encoded(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Each sample's tensors.

        Raises:
            ValueError: naming the sample or the image that cannot be used.
        """
        sources = [self._source(sample) for sample in conversations]
        try:
            batch = self._processed(self.processor, conversations)
        except ValueError as error:
            names = " to ".join(dict.fromkeys((conversations[0].name, conversations[-1].name)))
            raise ValueError(f"{names}: {str(error).removeprefix(f'{names}: ')}") from error
        images = iter(batch.get("pixel_values", ()))
        samples = []
        for sample, source, ids, labels in zip(conversations, sources, batch["input_ids"], batch["labels"], strict=True):
            self.refuse_too_long(sample, len(ids))
            input_ids, labels = torch.tensor(ids), torch.tensor(labels)
            labels[0] = IGNORE_INDEX  # nothing comes before it that could predict it, also in a packed row
            if sample.is_padding_sample:
                labels[:] = IGNORE_INDEX
            pictures = [torch.from_numpy(np.asarray(next(images))) for _ in sample.images]
            if self.augment:
                pictures = [_turned(picture, source) for picture in pictures]
            input_ids, is_noised = self.noise(input_ids, source)
            samples.append(Encoded(input_ids, labels, is_noised, torch.stack(pictures) if pictures else None))
        return samples

    def collate(self, samples: list[Encoded]) -> dict[str, torch.Tensor]:
        """The batch: one sample per row, or several."""
        rows = [[index] for index in range(len(samples))]
        if self.max_tokens_per_row:
            rows = pack([len(sample) for sample in samples], self.max_tokens_per_row)
        shape = (len(rows), max(sum(len(samples[index]) for index in row) for row in rows))
        pad_token_id = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.full(shape, pad_token_id if pad_token_id is not None else 0),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        if self.noise.share:
            batch["is_noised"] = torch.zeros(shape, dtype=torch.bool)
        if self.max_tokens_per_row:
            batch["document_ids"] = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            start = 0
            for document, index in enumerate(row, start=1):
                sample = samples[index]
                place = slice(start, start + len(sample))
                batch["input_ids"][number, place] = sample.input_ids
                batch["labels"][number, place] = sample.labels
                batch["attention_mask"][number, place] = 1
                if self.noise.share:
                    batch["is_noised"][number, place] = sample.is_noised
                if self.max_tokens_per_row:
                    batch["document_ids"][number, place] = document
                start = place.stop
        pictures = [samples[index].pixel_values for row in rows for index in row]
        present = [pixel_values for pixel_values in pictures if pixel_values is not None]
        if present:
            images = torch.cat(present)
            batch |= self.feature_cache.look_up(images) if self.feature_cache else {"pixel_values": images}
        return batch

    def lengths(self, conversations: Sequence[Conversation]) -> list[tuple[int, int]]:
        """The tokens of each sample, and how many of them are supervised. Images are counted, but not opened.

        Raises:
            ValueError: for a text that cannot be used.
        """
        rows = self.without_pixels(conversations)
        return [(len(labels), sum(label != IGNORE_INDEX for label in labels[1:])) for _, labels in rows]

    def without_pixels(self, conversations: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
        """(input ids, labels) of each sample, whose images are not opened.

        Raises:
            ValueError: for a text that cannot be used.
        """
        if not conversations:
            return []
        processor = copy.copy(self.processor)
        processor.image_processor = _no_pixels
        batch = self._processed(processor, [one.with_images([ANY_IMAGE] * len(one.images)) for one in conversations])
        return list(zip(batch["input_ids"], batch["labels"], strict=True))

    def written(self, sample: Conversation) -> str:
        """What a sample becomes before it is tokenized, each image one token."""
        if self.text_format == "caption":
            text = self._caption(sample)
        else:
            text = self.processor.apply_chat_template(sample.messages())
        return text.replace(ESCAPE, "")

    def refuse_too_long(self, sample: Conversation, tokens: int) -> None:
        """Raises a ValueError for a sample with more tokens than the decoder reads."""
        if self.context is not None and tokens > self.context:
            raise ValueError(f"{sample.name}: it has {tokens} tokens, the decoder reads at most {self.context}.")

    def may_be_too_long(self, sample: Conversation) -> bool:
        """Whether a sample may have more tokens than the decoder reads, by its size: a token is a byte or more."""
        if self.context is None:
            return False
        if self.frame is None:
            empty = [{"role": role, "content": ""} for role in ("user", "assistant")]
            self.frame = len(self.processor.text_ids(self.processor.apply_chat_template(empty)))
        text = self.frame + sum(TURN_TOKENS + len(text.encode(errors="surrogatepass")) for _, text in sample.said)
        return len(sample.images) * self.processor.num_image_tokens + text > self.context

    def _source(self, sample: Conversation) -> random.Random:
        """Where the randomness of a sample comes from, if it has any."""
        if sample.seed is not None:
            return random.Random(sample.seed)
        if not self.noise.share and not self.augment:
            return self.random
        if self.seed is not None and torch.utils.data.get_worker_info() is None:
            return self.random
        # a worker has a copy of this object, but its own state of torch's generator, in every epoch a new one; processes
        # that share a state have different samples
        drawn = int(torch.randint(2**63 - 1, ()))
        return random.Random(f"{self.seed} {drawn} {sample.name} {sample.said}")

    def _processed(self, processor, conversations: Sequence[Conversation]):
        if self.text_format == "caption":
            texts = [self._caption(sample) for sample in conversations]
            return processor(images=[sample.images for sample in conversations], text=texts, return_labels=True)
        messages = [sample.messages() for sample in conversations]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_labels=True)

    def _caption(self, sample: Conversation) -> str:
        parts = (
            self.processor.image_token if isinstance(part, Picture) else self.processor.as_typed(part)
            for part in sample.caption_parts()
        )
        return "".join(parts) + self.processor.tokenizer.eos_token


def _no_pixels(images, **kwargs) -> dict:
    """Stands in for an image processor where only text is needed."""
    return {}


def _turned(image: torch.Tensor, source: random.Random) -> torch.Tensor:
    """A square picture (C, H, W) in a random one of its eight orientations."""
    if source.random() < 0.5:
        image = image.flip(-1)
    return image.rot90(source.randrange(4), dims=(-2, -1))
