"""Held-out data: some pictures of a data set, with all that is said about them, which training never sees."""

import hashlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np
from PIL import Image

from prefixvlm.train.data.conversation import Conversation


class Part:
    """One of the two parts that `hold_out` makes of samples.

    Args:
        whole: samples by index: `Samples`, a `Mixture` or `InMemory`.
        split: of `whole`; both parts have the same.
        is_held_out: which part this is.
    """

    def __init__(self, whole, split: "_Split", is_held_out: bool):
        self.whole, self.split, self.is_held_out = whole, split, is_held_out

    @cached_property
    def indices(self) -> np.ndarray:
        """(samples,) those of `whole` that belong to this part, in order."""
        return np.flatnonzero(self.split.is_held_out == self.is_held_out)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    @property
    def fingerprint(self) -> str:
        parts = (self.whole.fingerprint, str(self.split.share), str(self.split.seed), str(self.is_held_out))
        return _digest(part.encode() for part in parts).hex()


class _Split:
    """Which samples are held out."""

    def __init__(self, whole, share: float, seed: int):
        self.whole, self.share, self.seed = whole, share, seed

    @cached_property
    def is_held_out(self) -> np.ndarray:
        """(samples,) bool. Pictures are taken in an order that the seed draws, until their samples reach the share."""
        keys = np.fromiter((self._key(index) for index in range(len(self.whole))), np.uint64, len(self.whole))
        pictures, picture, samples = np.unique(keys, return_inverse=True, return_counts=True)
        reached = np.searchsorted(np.cumsum(samples), self.share * len(self.whole))
        if reached + 1 >= len(pictures):
            raise ValueError(f"a share of {self.share:g} leaves none of its {len(pictures):,} pictures to train on.")
        return picture <= reached

    def _key(self, index: int) -> int:
        """A number drawn for the first picture of a sample; without one, for its texts."""
        try:
            sample = self.whole[index]
        except ValueError:  # screening reports it
            content = [self.whole.name(index).encode()]
        else:
            content = _content(sample.images[0]) if sample.images else [str(sample.said).encode(errors="surrogatepass")]
        return int.from_bytes(_digest([str(self.seed).encode(), *content])[:8], "big")


def hold_out(whole, share: float, seed: int) -> tuple[Part, Part]:
    """The samples to train on, and those held out: about `share` of them, in (0, 1), and at least one.

    All samples of a picture are in the same part. Data, share and seed decide which. Nothing is read before it is asked
    for; then a ValueError says where no picture would be left to train on.
    """
    split = _Split(whole, share, seed)
    return Part(whole, split, is_held_out=False), Part(whole, split, is_held_out=True)


def _content(image) -> list[bytes]:
    """What tells one picture from another: its path, its file's bytes, or its pixels."""
    if isinstance(image, dict):
        image = image.get("bytes")
    if isinstance(image, bytes):
        return [image]
    if isinstance(image, Image.Image):
        return [str((image.mode, image.size)).encode(), image.tobytes()]
    return [str(image).encode(errors="surrogatepass")]


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part + b"\0")
    return digest.digest()
