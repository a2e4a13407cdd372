"""What nobody can act on is not printed by commands; a library that is imported stays as it is."""

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import yaml
from PIL import Image
from small_recipe import SMALL
from tiny import tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.quiet import LOGGERS, UNTOLD, leave_out_noise


def run(*arguments, program=("-m", "prefixvlm"), code=0) -> tuple[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TQDM"))}
    environment = {**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *program, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe, its data and what it trained; and the output of the command that trained it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    for index in range(6):
        Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "texts": f"picture number {index}"} for index in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"data": {"source": "captions", "path": str(folder / "rows.jsonl")}, "batch_size": 2, "max_steps": 4}
    stage |= {"device_batch_size": 2, "language_model_lr": 1e-3}
    values = {
        "model": {**SMALL["model"], "tokenizer": str(folder / "tokenizer")},
        "stages": {
            1: stage,
            2: {**stage, "validation": {"share": 0.2, "every_steps": 1}},
        },
        # checkpoints less than a second apart, adapters, and what transformers 5 has renamed
        "save_steps": 1,
        "logging_steps": 2,
        "lora": {"r": 2},
        "gradient_checkpointing": True,
        "output": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder, run("train", folder / "recipe.yaml")


def test_training_says_what_it_does_and_nothing_else(trained):
    folder, (out, error) = trained
    assert error.splitlines() == [f"Reading {folder / 'recipe.yaml'}"]
    kinds = ("Stage 1: ", "Stage 2: ", "Held out: ", "step ", "Stage 2 ends with step ", "Saved to ")
    assert all(line.startswith(kinds) for line in out.splitlines())
    assert sum(line.startswith("step ") for line in out.splitlines()) == 2 + 2 + 4
    assert "\r" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "MODEL", "--image", "FOLDER/0.png", "--max-new-tokens", "2"),
        pytest.param(
            ("evaluate", "MODEL", "--task", "captions", "--data", "FOLDER/rows.jsonl", "--max-new-tokens", "2", "--output"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("text-loss", "--text", "a=FOLDER/rows.jsonl:texts", "--model", "MODEL"), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_says_what_it_loads_and_nothing_else(trained, tmp_path, arguments):
    folder, _ = trained
    model = str(folder / "out" / "stage-2")
    filled = [argument.replace("MODEL", model).replace("FOLDER", str(folder)) for argument in arguments]
    if "evaluate" in arguments:
        filled += [str(tmp_path / "out"), "--split", "train"]
    _, error = run(*filled)
    assert error.splitlines() == [f"Loading {model}"]


def test_a_warning_that_someone_can_act_on_is_told():
    says = """
import logging, sys, warnings
from prefixvlm import cli
def warn(options):
    logging.getLogger("transformers.trainer").warning("act on this")
    logging.getLogger("transformers.trainer").warning("The tokenizer has new PAD/BOS/EOS tokens that differ")
    warnings.warn("and on this")
    warnings.warn("mtime may not be reliable on this filesystem")
cli.masks = warn
sys.exit(cli.main())
"""
    _, error = run("masks", program=("-c", says))
    assert "act on this" in error
    assert "and on this" in error
    assert "new PAD" not in error
    assert "mtime" not in error


def test_calling_the_command_line_from_python_changes_no_logging(tmp_path, capsys):
    before = [list(logging.getLogger(name).filters) for name in LOGGERS], list(warnings.filters), dict(os.environ)
    assert main(["score", str(tmp_path / "gone"), "x"]) == 2
    assert before == (
        [list(logging.getLogger(name).filters) for name in LOGGERS],
        list(warnings.filters),
        dict(os.environ),
    )


def test_a_bar_delay_of_the_users_own_is_left(monkeypatch):
    monkeypatch.setattr("prefixvlm.quiet.LOGGERS", ())
    monkeypatch.setattr("prefixvlm.quiet.UNTOLD", ())
    monkeypatch.setenv("TQDM_DELAY", "7")
    leave_out_noise()
    assert os.environ["TQDM_DELAY"] == "7"


def test_nothing_is_left_out_by_an_empty_beginning():
    assert all(len(beginning) > 20 for beginning in UNTOLD)
