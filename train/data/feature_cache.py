"""A frozen encoder's patch features of each image, computed once and kept on disk for later epochs and stages.

Shapes: I images, P image tokens, D width of the encoder, C channels, H height, W width.
"""

import hashlib
import os
import shutil
import sqlite3
import zlib
from pathlib import Path

import numpy as np
import torch

KEY_BYTES = 16


class FeatureCache:
    """Features on disk, found by the content of the image and the weights of the encoder.

    Each process appends to a file of its own and reads those of all through memory maps; an index (SQLite) says where
    each image's are. An entry is indexed after it is written and checked against its checksum when read, so a process may
    be killed at any moment.

    Args:
        folder: of the cache; features of other encoders in it are removed.
        encoder: the frozen vision tower, whose weights are part of the key.
        dtype: of the stored features. Under autocast the projector rounds them to its own dtype at once, so
            keeping that one loses nothing.
        max_bytes: the most that features may take on disk, over all processes; images beyond it are encoded every time.
        rank, processes: the index of this process, and how many there are.
    """

    def __init__(self, folder: Path, encoder, dtype: torch.dtype, max_bytes: int, rank: int = 0, processes: int = 1):
        self.encoder_key = weights_key(encoder, dtype)
        self.folder = Path(folder) / self.encoder_key
        self.dtype, self.rank = dtype, rank
        self.max_bytes = max_bytes // processes
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in Path(folder).iterdir():
            if other.name != self.encoder_key:
                shutil.rmtree(other, ignore_errors=True)
        self._process: int | None = None
        self._maps: dict[int, np.memmap] = {}

    def __getstate__(self):
        return {**self.__dict__, "_process": None, "_maps": {}, "_index": None}

    def look_up(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the cache holds for some images (I, C, H, W), as entries of a batch.

        Returns:
            `image_keys` (I, 16), `is_cached` (I,), `cached_features` (cached, P, D) if any, and `pixel_values` of the
            others if any.
        """
        keys = [image_key(image) for image in pixel_values]
        found = [self._read(key) for key in keys]
        is_cached = torch.tensor([features is not None for features in found])
        batch = {"image_keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
        batch["is_cached"] = is_cached
        if is_cached.any():
            batch["cached_features"] = torch.stack([features for features in found if features is not None])
        if not is_cached.all():
            batch["pixel_values"] = pixel_values[~is_cached]
        return batch

    def complete(self, batch: dict, encode) -> torch.Tensor:
        """Takes the entries of `look_up` out of a batch and returns the features (I, P, D) of all its images.

        Args:
            encode: pixel values to features, run on the images that are not cached yet; the results are then cached.
        """
        keys, is_cached = batch.pop("image_keys"), batch.pop("is_cached")
        cached, pixel_values = batch.pop("cached_features", None), batch.pop("pixel_values", None)
        if pixel_values is None:
            return cached
        with torch.no_grad():
            fresh = encode(pixel_values).to(self.dtype)
        self._write([bytes(key.tolist()) for key in keys[~is_cached].cpu()], fresh.cpu())
        if cached is None:
            return fresh
        features = fresh.new_empty(len(keys), *fresh.shape[1:])
        features[is_cached], features[~is_cached] = cached.to(fresh.device), fresh
        return features

    def _open(self) -> None:
        """Connections and maps belong to one process; a forked one makes its own."""
        if self._process != os.getpid():
            self._index = sqlite3.connect(self.folder / "index.sqlite", timeout=60, isolation_level=None)
            self._index.execute("PRAGMA journal_mode=WAL")
            columns = "key BLOB PRIMARY KEY, file INT, start INT, checksum INT, tokens INT, width INT"
            self._index.execute(f"CREATE TABLE IF NOT EXISTS entries ({columns})")
            self._process, self._maps = os.getpid(), {}

    def _read(self, key: bytes) -> torch.Tensor | None:
        self._open()
        row = self._index.execute("SELECT file, start, checksum, tokens, width FROM entries WHERE key=?", (key,)).fetchone()
        if row is None:
            return None
        file, start, checksum, tokens, width = row
        end = start + tokens * width * self.dtype.itemsize
        if file not in self._maps or len(self._maps[file]) < end:
            path = self._path(file)
            if not path.is_file() or path.stat().st_size < end:
                return None
            self._maps[file] = np.memmap(path, mode="r")
        data = bytearray(self._maps[file][start:end])
        if zlib.crc32(data) != checksum:
            return None
        return torch.frombuffer(data, dtype=self.dtype).view(tokens, width)

    def _write(self, keys: list[bytes], features: torch.Tensor) -> None:
        self._open()
        with self._path(self.rank).open("ab") as file:
            for key, entry in zip(keys, features, strict=True):
                data = entry.contiguous().view(torch.uint8).numpy().tobytes()
                start = file.tell()
                if start + len(data) > self.max_bytes:
                    return
                file.write(data)
                file.flush()
                values = (key, self.rank, start, zlib.crc32(data), *entry.shape)
                self._index.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", values)

    def _path(self, rank: int) -> Path:
        return self.folder / f"features-{rank}.bin"


def image_key(pixel_values: torch.Tensor) -> bytes:
    """A digest of one preprocessed image (C, H, W)."""
    digest = hashlib.blake2b(repr((tuple(pixel_values.shape), pixel_values.dtype)).encode(), digest_size=KEY_BYTES)
    digest.update(pixel_values.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def weights_key(module: torch.nn.Module, dtype: torch.dtype) -> str:
    """A digest of the names and values of a module's weights, and of a dtype."""
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=KEY_BYTES)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
