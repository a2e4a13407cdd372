"""Where everything of the runs on real halves lies, the command that they are run by, and results that are kept."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from evidence.data import lines, write_lines
from evidence.real.questions import conversations
from prefixvlm.configuration.writing import write_atomically
from prefixvlm.train.evaluation.predictions import read_predictions
from prefixvlm.train.evaluation.tasks import spread

BUILD = Path("build/real")
# as recipe.yaml names them
GIVEN, QUESTIONS = BUILD / "given", BUILD / "data" / "questions.jsonl"
RESULTS, RUNS = BUILD / "results", BUILD / "runs"
HALVES = ("smollm2", "vit-s-14")
RECIPE = Path(__file__).with_name("recipe.yaml")
CAPTIONS, ANSWERS = "ucm_captions/captions.jsonl", "vqa_rad/qa.jsonl"
KIBIBYTES_A_GIB = 2**20


def prefixvlm(arguments: list[str], log: Path) -> tuple[float, float]:
    """Runs a command of `prefixvlm`; returns its seconds and its peak memory in GiB.

    Raises:
        ValueError: if it fails, with its last line.
    """
    print(f"prefixvlm {shlex.join(arguments)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", "prefixvlm", *arguments], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # which also says what the process took
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise ValueError(f"`prefixvlm {arguments[0]}` failed ({last}); see {log}.")
    kibibytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(time.perf_counter() - started, 1), round(kibibytes / KIBIBYTES_A_GIB, 2)


def prepare(data: Path, needed: tuple[str, ...] = (CAPTIONS, ANSWERS)) -> None:
    """Makes the given data reachable where the recipe names them, and writes the questions of stage 3.

    Raises:
        ValueError: for missing data or halves.
    """
    for name in needed:
        if not (data / name).is_file():
            raise ValueError(f"{data} has no {name}; docs/REAL.md says what --data must hold.")
    for name in HALVES:
        if not (BUILD / name).is_dir():
            raise ValueError(
                f"There is no {BUILD / name}; `make real` converts it, or python -m evidence.real.halves {BUILD}"
            )
    if GIVEN.is_symlink():
        GIVEN.unlink()
    GIVEN.symlink_to(data.resolve(), target_is_directory=True)
    QUESTIONS.parent.mkdir(exist_ok=True)
    write_lines(QUESTIONS, conversations(lines(data / CAPTIONS)))


def is_kept(name: str, settings: dict) -> bool:
    """Whether the result of a job is there.

    Raises:
        ValueError: if that is of other settings.
    """
    file = result_file(name)
    if not file.exists():
        return False
    if read_json(file)["settings"] != settings:
        raise ValueError(f"{file} is of another recipe or other settings; remove it and {RUNS / name}.")
    return True


def keep(name: str, settings: dict, result: dict) -> None:
    """Writes the result of a job, with the settings that decide it."""
    file = result_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"settings": settings, **result}, indent=1) + "\n")


def result_file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def said(folder: Path) -> list[str]:
    """The predictions that `prefixvlm evaluate` left in a folder."""
    return [row["prediction"] for row in read_predictions(folder)]


def test_rows(name: str, limit: int | None) -> list[dict]:
    """The test rows of a given file; with a limit, those that `prefixvlm evaluate --limit` takes."""
    rows = [row for row in lines(GIVEN / name) if row["split"] == "test"]
    return rows if limit is None else spread(rows, limit)
