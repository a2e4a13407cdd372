"""Imports point one way: configuration <- modeling_vlm, processing <- inference <- train <- interface."""

import ast
import configparser
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAVELS = ("configuration", "modeling_vlm", "processing")  # to the Hub, with every checkpoint
MAY_TRAVEL = {"torch", "transformers", "numpy", "PIL"}
REPOSITORY_ONLY = {"tests", "benchmarks", "evidence"}
# what each room may import beside itself; `interface` stands for the modules of the package's own name
ALLOWED = {"configuration": set(), "modeling_vlm": {"configuration"}, "processing": {"configuration"}}
for _room in ("inference", "train.recipes", "train.data", "train.evaluation", "train.training", "interface"):
    ALLOWED[_room] = set(ALLOWED)


def rooms(root: Path) -> dict[Path, str]:
    """Every product file under `root` and the module that it is, as setup.cfg maps them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    places = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().split("\n"))
    found = {}
    for package, folder in places.items():
        for path in (root / folder).rglob("*.py"):
            inside = path.relative_to(root / folder).with_suffix("").parts
            found[path] = ".".join((package, *inside)).removesuffix(".__init__")
    return found


def room_of(module: str) -> str:
    inside = module.removeprefix("prefixvlm").removeprefix(".")
    return next((room for room in ALLOWED if f"{inside}.".startswith(f"{room}.")), "interface")


def imported(path: Path, module: str) -> Iterator[str]:
    """The modules that a file imports anywhere in it, relative ones by their full names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def full(name: str) -> str:
        inside = name.lstrip(".")
        level = len(name) - len(inside)
        return ".".join(filter(None, (package.rsplit(".", level - 1)[0] if level else "", inside)))

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from prefixvlm.train import data` imports a room, `from prefixvlm import X` the package itself
            yield from (f"{full('.' * node.level + (node.module or ''))}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (full(value.value) for value in node.args if isinstance(value, ast.Constant))


def wrong_arrows(root: Path) -> list[str]:
    wrong = []
    for path, module in rooms(root).items():
        room = room_of(module)
        for name in imported(path, module):
            top, line = name.partition(".")[0], f"{path.relative_to(root)} imports {name}"
            if top == "prefixvlm":
                if room_of(name) not in ALLOWED[room] | {room}:
                    wrong.append(line)
            elif top in REPOSITORY_ONLY or (room in TRAVELS and top not in MAY_TRAVEL | sys.stdlib_module_names):
                wrong.append(line)
    return wrong


def test_every_arrow_points_the_right_way():
    assert len(rooms(ROOT)) > 50
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("configuration/a.py", "from ..modeling_vlm import masking_prefix_vlm"),
        ("modeling_vlm/a.py", "from ..processing.images_prefix_vlm import load_image"),
        ("processing/a.py", "def late():\n    from prefixvlm.modeling_vlm import loss_prefix_vlm"),
        ("processing/a.py", "import datasets"),
        ("processing/a.py", "class A:\n    def f(self):\n        import yaml"),
        ("configuration/a.py", "import importlib\nimportlib.import_module('..inference.int8', __package__)"),
        ("inference/a.py", "import prefixvlm.train.recipes.schema"),
        ("inference/a.py", "from prefixvlm.cli import main"),
        ("inference/a.py", "from prefixvlm import PrefixVLMConfig"),
        ("inference/a.py", "from .. import __version__"),
        ("train/recipes/a.py", "from prefixvlm.train.data import sources"),
        ("train/data/a.py", "from ..evaluation.tasks import load"),
        ("train/evaluation/metrics/a.py", "import importlib\nimportlib.import_module('prefixvlm.train.training.run')"),
        ("train/training/a.py", "from prefixvlm.info import describe"),
        ("train/training/a.py", "from benchmarks import common"),
        ("interface/a.py", "from tests.helpers import tiny"),
    ],
)
def test_an_arrow_that_points_the_wrong_way_is_found(tmp_path, place, line):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(line + "\n")
    assert len(wrong_arrows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (
            "modeling_vlm/a.py",
            "from ..configuration.configuration_prefix_vlm import X\nfrom .b import Y\nimport torch.nn",
        ),
        ("train/evaluation/__init__.py", "from .metrics import intervals\nfrom ..data import sources\nimport datasets"),
        ("train/training/a.py", "from prefixvlm.train.evaluation import figures"),
        ("interface/a.py", "from prefixvlm.train.training import run\nfrom .info import describe"),
    ],
)
def test_an_arrow_that_points_the_right_way_is_left_alone(tmp_path, place, line):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(line + "\n")
    assert wrong_arrows(tmp_path) == []
