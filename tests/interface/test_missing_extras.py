"""Without an extra each command works, or says in a line which package, which extra and how to install it."""

import subprocess
import sys

import pytest
from tiny import save_tiny

from prefixvlm.cli import EXTRAS

# hides packages as if they were not installed, also from `find_spec`
SCRIPT = """
import importlib.machinery, sys
hidden = set(sys.argv.pop(1).split(","))
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in hidden else real(name, package)
from prefixvlm.cli import main
sys.exit(main(sys.argv[1:]))
"""

OF_TRANSFORMERS = {"tokenizers", "tqdm", "yaml"}  # which it brings itself


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    (folder / "texts.txt").write_text("a text\n")
    (folder / "rows.json").write_text('[{"image": "photo.png", "question": "what?", "answer": "red"}]')
    return folder


@pytest.mark.parametrize(
    ("extra", "arguments", "works"),
    [
        ("train", ("generate", "{saved}", "--image", "{saved}/photo.png", "--max-new-tokens", "2"), True),
        pytest.param("train", ("info", "{saved}"), True, marks=pytest.mark.slow),
        pytest.param("train", ("push", "{saved}/nothing", "a/b"), None, marks=pytest.mark.slow),
        ("train", ("train", "pathvqa_lora"), False),
        pytest.param("train", ("quickstart",), False, marks=pytest.mark.slow),
        pytest.param(
            "train",
            ("evaluate", "{saved}", "--task", "vqa", "--data", "{saved}/rows.json", "--output", "there"),
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "train",
            ("text-loss", "--model", "{saved}", "--text", "a={saved}/texts.txt", "--output", "there"),
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param("train", ("masks", "--output", "masks.png"), False, marks=pytest.mark.slow),
        pytest.param("train", ("merge", "{saved}", "--output", "there"), False, marks=pytest.mark.slow),
        pytest.param("eval", ("score", "{saved}/rows.json", "{saved}/rows.json"), False, marks=pytest.mark.slow),
        ("demo", ("demo", "{saved}"), False),
        ("serve", ("serve", "{saved}"), False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_command_without_an_extra_works_or_names_it(saved, tmp_path, extra, arguments, works):
    hidden = {package for name, packages in EXTRAS.items() if extra in ("train", name) for package in packages}
    hidden -= OF_TRANSFORMERS
    command = [sys.executable, "-c", SCRIPT, ",".join(hidden), *(argument.format(saved=saved) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=tmp_path, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    if works:
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith(f"prefixvlm {arguments[0]}: ")
    if works is False:
        assert "pip install 'prefixvlm[" in last
        assert "pip install -e '.[" in last
