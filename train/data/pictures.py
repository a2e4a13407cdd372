"""Where the images are that rows name: below the data's folder, by an id, inside the row, or at an address."""

import binascii
import os
import re
from base64 import b64decode
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

# of images that a data set knows by a number or an id, in COCO's years, TextVQA, GQA and others
NAMES_BY_ID: tuple[str, ...] = (
    "COCO_train2014_{:0>12}.jpg",
    "COCO_val2014_{:0>12}.jpg",
    "COCO_test2015_{:0>12}.jpg",
    "{:0>12}.jpg",
)
NAMES_BY_ID += ("{}.jpg", "{}.png", "{}.jpeg", "{}")
SHORTEST_BASE64 = 100  # characters; no file name is so long without a dot
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


class PictureFinder:
    """From what a row has for an image to what `load_image` opens.

    Args:
        folder: of the images that rows name by path.
        by_address: images that rows name by address are the files of that name in the folder.
        hosts: whose addresses may be fetched while training.
    """

    def __init__(self, folder: Path, by_address: bool = False, hosts: Sequence[str] = ()):
        self.folder, self.by_address, self.hosts = folder, by_address, tuple(hosts)
        # `datasets` names the images of a folder that is reached by a link as they are without it
        self._roots = tuple(f"{root}{os.sep}" for root in {os.path.abspath(folder), os.path.realpath(folder)})

    def __call__(self, image):
        """One image.

        Raises:
            ValueError: for an address that may not be fetched, a path outside of the folder, or nothing at all.
        """
        if isinstance(image, dict):
            if image.get("bytes") is not None:
                return image
            if image.get("path") is None:
                raise ValueError("an image has neither bytes nor a path")
            image = image["path"]
        if not isinstance(image, str) or image.startswith("data:"):
            return image
        if "://" in image[:16]:
            return self._at(image)
        if len(image) > SHORTEST_BASE64 and "." not in image and BASE64.fullmatch(image):
            try:
                return b64decode(image)
            except binascii.Error:
                pass  # a long name
        path = image.replace("\\", "/")
        if image.startswith(self._roots) and ".." not in path.split("/"):
            return image
        path = self._inside(path)
        return self.by_id(image) if "." not in image and not os.path.isfile(path) else path

    def by_id(self, identifier) -> str:
        """The file of an image that a data set knows by an id.

        Raises:
            ValueError: if it is neither a number nor a text, or the folder has none of the usual names.
        """
        if not isinstance(identifier, str | int):
            raise ValueError(f"the id of an image is {identifier!r}; it must be a number or a text")
        self._inside(str(identifier))
        names = [name.format(identifier) for name in NAMES_BY_ID]
        for folder in self._folders:
            for name in names:
                path = os.path.join(folder, name)
                if os.path.isfile(path):
                    return path
        raise ValueError(f"{self.folder} has no image with the id {identifier}: neither {', nor '.join(names[:-1])}")

    def _inside(self, path: str) -> str:
        """A path below the folder; by hand, since pathlib takes longer than all the rest of a row."""
        if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/"):
            raise ValueError(f"the image {path} lies outside {self.folder}; give a path below it")
        if "\0" in path:
            raise ValueError(f"the image {path!r} has a character that no file name has")
        return os.path.join(self.folder, path)

    @cached_property
    def _folders(self) -> list[str]:
        """The folder and those in it, such as COCO's years."""
        inner = sorted(entry.path for entry in os.scandir(self.folder) if entry.is_dir())
        return [str(self.folder), *inner]

    def _at(self, address: str) -> str:
        parts = urlsplit(address)
        if self.by_address:
            return os.path.join(self.folder, unquote(parts.path).rsplit("/", 1)[-1])
        if parts.scheme in ("http", "https") and parts.hostname in self.hosts:
            return address
        raise ValueError(
            f"the image {address} is not on this machine; give the folder of such files as `images`, or name "
            f"{parts.hostname or 'its host'} in `hosts` to fetch it"
        )

    def __repr__(self) -> str:
        return f"PictureFinder({self.by_address}, {self.hosts})"
