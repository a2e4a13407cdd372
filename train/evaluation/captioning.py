"""Captions, or answers to one question, of many pictures as a table: what `prefixvlm caption` does.

A run that was interrupted goes on from what is beside its output. Under accelerate each process captions its share.
"""

import csv
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from prefixvlm.inference.asking import generate_texts
from prefixvlm.inference.int8 import quantize_int8
from prefixvlm.inference.loading import load
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.forms import FORMS
from prefixvlm.train.data.pictures import PictureFinder
from prefixvlm.train.data.rows import RowStream, read_rows
from prefixvlm.train.evaluation.answering import prepared, processes_and_device
from prefixvlm.train.evaluation.kept_answers import KeptAnswers, identity_of_weights
from prefixvlm.train.recipes.evaluation import CaptionRun

COLUMNS = ("image", "caption", "error")
SUFFIXES = (".parquet", ".jsonl", ".csv")


class Captioned(NamedTuple):
    """A row of the table: what the picture is called, and its caption, or why there is none."""

    image: str
    caption: str | None
    error: str | None


class Pictures(ABC):
    """Pictures by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What a picture is called in the table."""

    @abstractmethod
    def images(self, index: int) -> list:
        """The picture, or the several of one row, as `load_image` opens them.

        Raises:
            ValueError: if it cannot be had.
        """


class PictureFiles(Pictures):
    """The picture files below a folder, or one file."""

    def __init__(self, path: Path):
        known = Image.registered_extensions()
        found = path.rglob("*") if path.is_dir() else [path]
        self.folder = path if path.is_dir() else path.parent
        self.files = sorted(file for file in found if file.suffix.lower() in known and file.is_file())

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].relative_to(self.folder).as_posix()

    def images(self, index: int) -> list:
        return [str(self.files[index])]


class PicturesOfRows(Pictures):
    """The pictures of the rows of a data set."""

    def __init__(self, run: CaptionRun):
        rows = read_rows(run.data, run.split)
        assert not isinstance(rows, RowStream)
        self.rows = rows
        beside = Path(run.data) if Path(run.data).is_dir() else Path(run.data).parent
        if run.images is not None and not Path(run.images).is_dir():
            raise ValueError(f"{run.images}: there is no such folder of images.")
        finder = PictureFinder(Path(run.images) if run.images is not None else beside, by_address=run.images is not None)
        self.form = FORMS["captions"](finder, {} if run.image is None else {"image": run.image})

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        try:
            row = self.rows[index]
        except ValueError:
            return self.rows.where(index)
        named = row.get(self.form.image_key(row) or "")
        named = named.get("path") if isinstance(named, dict) else named
        return named if isinstance(named, str) and not named.startswith("data:") else self.rows.where(index)

    def images(self, index: int) -> list:
        images = self.form.images(self.rows[index])
        if not images:
            raise ValueError("the row has no image")
        return images


def run_captioning(run: CaptionRun) -> dict:
    """Captions pictures, and leaves a table with the columns `COLUMNS` and a row for each, in their order.

    Returns:
        How many rows the table has, and how many of them have no caption.

    Raises:
        ValueError: for pictures that cannot be found, an output of another kind than `SUFFIXES`, one that is there, or what
            an interrupted run with other settings has left.
    """
    output = Path(run.output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if output.exists():
        raise ValueError(f"{output} is there already; choose another output.")
    pictures = _pictures(run)
    if not len(pictures):
        raise ValueError(f"{run.data} has no pictures.")
    processes, device = processes_and_device(run.device)
    model, processor = load(run.model, run.dtype, device=device)
    if run.int8:
        quantize_int8(model)
    settings = run.model_dump(exclude={"output", "device", "batch_size"}) | {"pictures": len(pictures)}
    settings["weights"] = identity_of_weights(run.model, model)
    kept: KeptAnswers[Captioned] = KeptAnswers(output.with_name(output.name + ".partial"), "captions", _parsed)
    kept.refuse_another(settings)
    processes.wait_for_everyone()
    if processes.is_main_process:
        kept.begin(settings)
        kept.gather(_line)
    processes.wait_for_everyone()
    done = kept.read()
    waiting = [index for index in range(len(pictures)) if index not in done]
    mine = waiting[processes.process_index :: processes.num_processes]
    processes.wait_for_everyone()
    with kept.file(processes.process_index).open("a", encoding="utf-8") as file:
        for index, captioned in _captioned(model, processor, run, pictures, mine, processes.is_main_process):
            file.write(_line(index, captioned))
            file.flush()
    processes.wait_for_everyone()
    found = kept.read() if not processes.is_main_process else kept.gather(_line)
    if processes.is_main_process:
        _write(output, kept.folder, [found[index] for index in range(len(pictures))])
        shutil.rmtree(kept.folder)
    processes.wait_for_everyone()
    failed = sum(one.error is not None for one in found.values())
    return {"saved": str(output), "pictures": len(pictures), "failed": failed}


def _pictures(run: CaptionRun) -> Pictures:
    path = Path(run.data)
    if path.suffix.lower() in Image.registered_extensions() or (path.is_dir() and not _has_rows(run.data)):
        if run.image is not None or run.images is not None:
            raise ValueError(f"{run.data} has pictures and no rows; leave --image and --images out.")
        return PictureFiles(path)
    return PicturesOfRows(run)


def _has_rows(folder: str) -> bool:
    """Whether a folder holds rows about its pictures, and not pictures alone."""
    try:
        read_rows(folder)
    except ValueError:
        return False
    return True


def _captioned(
    model, processor, run: CaptionRun, pictures: Pictures, mine: list[int], show_progress: bool
) -> Iterator[tuple[int, Captioned]]:
    """Yields a picture's index and row as they are done; the next batch is read while the model works on one."""
    if not mine:
        return
    decoding = {"num_beams": run.num_beams, "max_new_tokens": run.max_new_tokens}
    batches = [mine[start : start + run.batch_size] for start in range(0, len(mine), run.batch_size)]
    bar = tqdm(total=len(mine), desc="Captioning", unit=" pictures", disable=None if show_progress else True)
    with bar, ThreadPoolExecutor(1) as reader:
        following = reader.submit(_read, pictures, batches[0], processor, run.prompt)
        for number, batch in enumerate(batches):
            failed, good, inputs = following.result()
            if number + 1 < len(batches):
                following = reader.submit(_read, pictures, batches[number + 1], processor, run.prompt)
            texts = generate_texts(model, processor, inputs, **decoding) if good else []
            said = dict(zip(good, texts, strict=True))
            for index in batch:
                name = pictures.name(index)
                if index in failed:
                    yield index, Captioned(name, None, failed[index])
                else:
                    yield index, Captioned(name, said[index].strip(), None)
            bar.update(len(batch))


def _read(pictures: Pictures, batch: list[int], processor, prompt: str | None) -> tuple[dict[int, str], list[int], dict]:
    """Of a batch, why some cannot be used, by index; the others, and the model's inputs for them."""
    failed: dict[int, str] = {}
    asked: dict[int, Conversation] = {}
    for index in batch:
        try:
            asked[index] = Conversation.about(pictures.images(index), [("user", prompt or "")])
        except ValueError as error:
            failed[index] = str(error)
    try:
        return failed, list(asked), prepared(processor, list(asked.values())) if asked else {}
    except ValueError:
        for index in list(asked):
            try:
                prepared(processor, [asked[index]])
            except ValueError as error:
                failed[index] = str(error)
                del asked[index]
    return failed, list(asked), prepared(processor, list(asked.values())) if asked else {}


def _line(index: int, captioned: Captioned) -> str:
    return json.dumps({"index": index, **captioned._asdict()}) + "\n"


def _parsed(row: dict) -> tuple[int, Captioned]:
    return row["index"], Captioned(*(row[name] for name in COLUMNS))


def _write(output: Path, folder: Path, rows: list[Captioned]) -> None:
    """Writes the table, in a folder first, so that it is whole or absent."""
    partial = folder / output.name
    if output.suffix == ".parquet":
        import datasets

        features = datasets.Features({name: datasets.Value("string") for name in COLUMNS})  # also of one without any text
        table = datasets.Dataset.from_list([row._asdict() for row in rows], features)
        with partial.open("wb") as file:
            table.to_parquet(file)
    else:
        with partial.open("w", encoding="utf-8", newline="") as file:
            if output.suffix == ".csv":
                csv.writer(file).writerows([COLUMNS, *rows])
            else:
                file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, output)
