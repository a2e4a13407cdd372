"""What a run over many inputs has answered so far, in a folder: a line for each answer, a file for each process.

A run that was interrupted goes on from there, and of several processes the main one puts the files together.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from prefixvlm.configuration.writing import write_atomically

SETTINGS = "settings.json"
Answer = TypeVar("Answer")


class KeptAnswers(Generic[Answer]):
    """The answers of one run.

    Args:
        folder: of the files.
        stem: of their names; the main file is `stem.jsonl`.
        parse: a line's index and answer; `None`, or an error of a kind below, for one that is not of this run.
    """

    def __init__(self, folder: Path, stem: str, parse: Callable[[dict], tuple[int, Answer] | None]):
        self.folder, self.stem, self.parse = folder, stem, parse

    def file(self, process: int = 0) -> Path:
        """Where a process adds its lines."""
        return self.folder / (f"{self.stem}.{process}.jsonl" if process else f"{self.stem}.jsonl")

    def begin(self, settings: dict) -> None:
        """Notes the settings in a folder that is new or of the same run; to be called by the main process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / SETTINGS, json.dumps(settings, indent=2) + "\n")

    def refuse_another(self, settings: dict) -> None:
        """Raises a ValueError if the folder has answers of a run with other settings."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; choose a folder.")
        if not any(path.stat().st_size for path in self.folder.glob(f"{self.stem}*.jsonl")):
            return  # nothing to lose, nothing to mix up
        noted = self.folder / SETTINGS
        if not noted.exists():
            raise ValueError(f"{self.folder} has {self.stem} but no {SETTINGS} to say of what; choose another folder.")
        try:
            old = dict(json.loads(noted.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{noted} cannot be read; remove {self.folder}, or choose another folder.") from error
        changed = sorted(name for name in settings if settings[name] != old.get(name))
        if changed:
            raise ValueError(
                f"{self.folder} is of another run, with other settings of {', '.join(changed)}; choose another folder."
            )

    def read(self) -> dict[int, Answer]:
        """The answers of the main file, by index; what a kill has cut off is left out."""
        return self._read(self.file())

    def gather(self, line: Callable[[int, Answer], str]) -> dict[int, Answer]:
        """Puts the files of all processes together as the main one, in the order of indices, each once."""
        others = sorted(self.folder.glob(f"{self.stem}.*.jsonl"))
        found: dict[int, Answer] = {}
        for path in (self.file(), *others):
            found |= self._read(path)
        write_atomically(self.file(), "".join(line(index, found[index]) for index in sorted(found)))
        for path in others:
            os.unlink(path)
        return found

    def _read(self, path: Path) -> dict[int, Answer]:
        lines: Iterable[bytes] = path.read_bytes().split(b"\n") if path.exists() else []
        found: dict[int, Answer] = {}
        for line in lines:
            try:
                parsed = self.parse(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            if parsed is not None:
                found[parsed[0]] = parsed[1]
        return found


def identity_of_weights(name: str, model) -> list:
    """What changes when the weights do: a Hub commit, or the files' sizes and times."""
    folder = Path(name)
    if not folder.is_dir():
        return [getattr(model.config, "_commit_hash", None)]
    files = sorted(folder.glob("*.safetensors*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
