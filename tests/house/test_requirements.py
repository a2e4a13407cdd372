"""What the product imports is what setup.cfg says it needs, no less and no more."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixvlm.cli import EXTRAS

ROOT = Path(__file__).parents[2]
BASE_ROOMS = ("configuration", "modeling_vlm", "processing", "inference", "interface")
IMPORT_NAMES = {"easy-vqa": "easy_vqa", "pillow": "PIL", "pyyaml": "yaml"}
NOT_IMPORTED = {
    "easy_vqa": "train/data/easy_vqa.py reads its files without importing it",
    "jinja2": "transformers renders chat templates with it",
}
TOOLS = {
    "bitsandbytes": "the tests of QLoRA are skipped without it, by importorskip",
    "mypy": "`make lint` checks types with it",
    "pytest-xdist": "`make test` runs processes side by side with it",
    "ruff": "`make lint` checks style with it",
    "shtab": "the tests of the extra [completion] are skipped without it, by importorskip",
    "tensorboard": "what `report_to: tensorboard` of a recipe writes for",
    "trl": "tests/optional/test_trl.py is skipped without it, by importorskip",
}
NOT_DECLARED = {
    "bitsandbytes": "only for QLoRA; inference/loading.py says what to install",
    "lmms_eval": "train/evaluation/lmms_eval.py is loaded by lmms-eval itself",
}


def requirements() -> dict[str, set[str]]:
    """The import names of what setup.cfg asks for: `base`, and each extra with the extras it contains."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = {"base": config["options"]["install_requires"], **config["options.extras_require"]}
    found = {}
    for name, text in lists.items():
        found[name] = set()
        for line in text.split("\n"):
            if own := re.fullmatch(r"prefixvlm\[(.*)\]", line):
                found[name] |= {package for extra in own[1].split(",") for package in found[extra]}
            elif line:
                package = re.match(r"[\w-]+", line)[0]
                found[name].add(IMPORT_NAMES.get(package, package))
    return found


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """The packages that a file imports, and whether it does so inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield child.module.partition(".")[0], inside
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return ((name, inside) for name, inside in walk(ast.parse(source), False) if name not in OWN)


OWN = {*sys.stdlib_module_names, "prefixvlm"}
FILES = {path: list(imports(path.read_text())) for room in (*BASE_ROOMS, "train") for path in (ROOT / room).rglob("*.py")}
NEEDS = requirements()


def allowed(room: str, inside: bool) -> set[str]:
    if room == "train":
        return NEEDS["base"] | NEEDS["train"] | NEEDS["eval"]
    return NEEDS["base"] | (set().union(*NEEDS.values()) if room == "interface" and inside else set())


@pytest.mark.parametrize("room", [*BASE_ROOMS, "train"])
def test_what_is_imported_is_declared(room):
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, found in FILES.items()
        if path.relative_to(ROOT).parts[0] == room
        for name, inside in found
        if name not in allowed(room, inside) | NOT_DECLARED.keys()
    }
    assert not undeclared


def test_what_is_declared_is_imported():
    imported = {name for found in FILES.values() for name, _ in found}
    declared = set().union(*(NEEDS[extra] for extra in ("base", *EXTRAS)))
    assert declared - imported == NOT_IMPORTED.keys()
    assert NOT_DECLARED.keys() <= imported - declared


def test_the_tools_of_developers_are_imported_by_tests_or_have_a_reason():
    tests = {name for path in (ROOT / "tests").rglob("*.py") for name, _ in imports(path.read_text())}
    assert NEEDS["dev"] - NEEDS["base"] - NEEDS["eval"] - NEEDS["serve"] - tests == TOOLS.keys()


def test_the_command_line_knows_what_each_extra_brings():
    known = {extra: set(packages) for extra, packages in EXTRAS.items()}
    alone = {extra: NEEDS[extra] for extra in ("train", "demo", "serve", "completion")}
    assert known == {**alone, "eval": NEEDS["eval"] - NEEDS["train"]}


def test_an_import_inside_a_function_is_told_from_one_outside():
    source = "import torch.nn\nfrom . import x\ndef f():\n    from gradio import y\n    import os\n"
    assert list(imports(source)) == [("torch", False), ("gradio", True)]
