"""A plain `pip install`: what the wheel holds, that it is the installed package that runs, and what works without extras.

The environment is a fresh one with the very distributions that a plain install brings, linked from the running one; what
extras bring is added only where a test names it.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from small_recipe import SMALL
from tiny import tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
# says where the package lay that a process has used, and adds what extras bring
SITE = """
import atexit, os, sys

def report():
    if "prefixvlm" in sys.modules and "REPORT" in os.environ:
        with open(os.environ["REPORT"], "a") as file:
            file.write(sys.modules["prefixvlm"].__file__ + "\\n")

atexit.register(report)
sys.path += filter(None, [os.environ.get("EXTRAS")])
"""
COMMANDS = """
import sys
from prefixvlm.cli import main

for line in sys.stdin.read().splitlines():
    print("exit code", main(line.split("|")), file=sys.stderr)
"""


def copy_of_the_checkout(folder: Path) -> Path:
    """The files that git knows or would, so that a build leaves nothing in the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def plain_requirements(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that these requirements bring, and theirs, without extras that nobody asked for."""
    found, waiting = {}, [(line, "") for line in requirements]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        wanted = [("", name), *((extra, f"{name}[{extra}]") for extra in requirement.extras)]
        for extra, key in wanted:
            if key not in found:
                found[key] = importlib.metadata.distribution(name)
                waiting += [(line, extra) for line in found[key].requires or []]
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel and a fresh environment that it is installed in."""
    folder = tmp_path_factory.mktemp("installed")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy_of_the_checkout(folder / "checkout"))
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own,) = site.glob("prefixvlm-*.dist-info")
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for distribution in plain_requirements(importlib.metadata.Distribution.at(own).requires).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (dependencies / top).exists():
                (dependencies / top).symlink_to(distribution.locate_file(top))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    (site / "sitecustomize.py").write_text(SITE)
    return SimpleNamespace(wheel=wheel, python=python, site=site)


@pytest.fixture
def run(installed, tmp_path):
    """Runs a command of the environment in the repository's root; the package that it used must be the installed one."""

    def run(*command, extras=False, given="", code=0) -> subprocess.CompletedProcess:
        report = tmp_path / "report"
        report.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "EXTRAS")}
        environment |= {"REPORT": str(report)} | ({"EXTRAS": str(running_site())} if extras else {})
        done = subprocess.run(
            [str(installed.python.parent / command[0]), *map(str, command[1:])],
            cwd=ROOT,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr[-3000:]
        used = set(report.read_text().splitlines())
        assert used == {str(installed.site / "prefixvlm" / "__init__.py")}
        return done

    return run


def running_site() -> Path:
    return Path(importlib.metadata.distribution("accelerate").locate_file("."))


@pytest.mark.slow
def test_a_type_checker_reads_the_types_of_the_installed_package(installed, tmp_path):
    script = tmp_path / "uses.py"
    script.write_text("from prefixvlm.train.recipes.checking import did_you_mean\nnumber: int = did_you_mean('a', ['b'])\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", installed.python, "--config-file", os.devnull, script]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert 'expression has type "str", variable has type "int"' in done.stdout, done.stdout
    assert "py.typed" not in done.stdout


def test_the_wheel_holds_every_room_and_nothing_else(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"prefixvlm"}
    rooms = {
        "": "interface",
        **{name: name for name in ("configuration", "modeling_vlm", "processing", "inference", "train")},
    }
    for place, room in rooms.items():
        files = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml", ".md")]
        expected = {"/".join(filter(None, ("prefixvlm", place, str(path.relative_to(ROOT / room))))) for path in files}
        assert expected <= set(names), room
    assert "prefixvlm/configuration/model_card.md" in names
    assert "prefixvlm/train/recipes/paper.yaml" in names
    assert "prefixvlm/train/recipes/accelerate/fsdp2.yaml" in names


def test_in_the_root_of_the_repository_the_installed_package_runs(run):
    assert "vision" in run("python", "-m", "prefixvlm", "info", "tiny").stdout


@pytest.mark.slow
def test_accelerate_launches_the_installed_package_in_the_root_of_the_repository(run, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "out")}))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    run("python", *launch, "-m", "prefixvlm", "train", path, "--stages", "0", extras=True)
    assert (tmp_path / "out" / "stage-0" / "model.safetensors").is_file()


def test_the_console_script_helps(run):
    assert "quickstart" in run("prefixvlm", "--help").stdout


def test_a_plain_install_answers_questions_and_each_other_command_says_which_extra_it_needs(run, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.png")
    (tmp_path / "texts.txt").write_text("a text\nanother\n")
    (tmp_path / "predictions.json").write_text('[{"image_id": 1, "caption": "a dog"}]')
    (tmp_path / "references.json").write_text(
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}'
    )
    model = str(tmp_path / "model")
    commands = {
        ("train", "quickstart"): "train",
        ("quickstart", "--output", str(tmp_path / "quickstart")): "train",
        ("masks", "--output", str(tmp_path / "masks.png")): "train",
        ("evaluate", model, "--task", "easy_vqa", "--output", str(tmp_path / "evaluation")): "(train|eval)",
        ("text-loss", "--model", model, "--text", f"a={tmp_path / 'texts.txt'}"): "(train|eval)",
        ("score", str(tmp_path / "predictions.json"), str(tmp_path / "references.json")): "eval",
        ("demo", model): "demo",
    }
    question = ("generate", model, "--image", str(tmp_path / "photo.png"), "--prompt", "what?", "--max-new-tokens", "4")
    done = run("python", "-c", COMMANDS, given="\n".join(map("|".join, (question, *commands))))
    assert done.stdout.strip()
    said = [line for line in done.stderr.splitlines() if line.startswith(("prefixvlm", "exit code"))]
    assert said[0] == "exit code 0"
    for place, (command, extra) in enumerate(commands.items()):
        sentence, code = said[1 + 2 * place : 3 + 2 * place]
        assert code == "exit code 2", command
        assert re.search(rf"^prefixvlm {command[0]}\b.*pip install 'prefixvlm\[{extra}\]'", sentence), sentence
