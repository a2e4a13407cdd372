"""The product runs on Windows and macOS too: no text in the locale's encoding, nothing that only POSIX has at import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("configuration", "modeling_vlm", "processing", "inference", "train", "interface")
FILES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_CALLS = {"os.fork", "os.getuid", "os.geteuid", "os.sched_getaffinity", "os.symlink", "os.mkfifo", "os.killpg"}


def without_encoding(source: str) -> list[int]:
    """The lines that read or write text in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        on = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        constants = [value.value for value in node.args if isinstance(value, ast.Constant)]
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_text = (
            name in ("read_text", "write_text")
            or (name == "open" and on not in ("Image", "os") and not any("b" in str(value) for value in constants))
            or "True" in (keywords.get("text"), keywords.get("universal_newlines"))
        )
        # `read_text(self)` and the like are somebody's own, and `read_text("utf-8")` names it by place
        if is_text and "encoding" not in keywords and "utf-8" not in constants:
            found.append(node.lineno)
    return found


def posix_only(source: str) -> list[str]:
    """Modules of POSIX alone that are imported as soon as a file is, and calls that Windows does not have."""
    tree = ast.parse(source)
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in at_import if isinstance(node, ast.ImportFrom)]
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted(POSIX_ONLY.intersection(names) | POSIX_CALLS.intersection(calls))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_for_every_platform(path):
    source = path.read_text(encoding="utf-8")
    assert not without_encoding(source)
    assert not posix_only(source)


def test_what_is_for_one_platform_is_found():
    assert without_encoding("p.read_text()\nopen(p)\nopen(p, 'rb')\nrun(x, text=True)\nopen(p, encoding='utf-8')") == [
        1,
        2,
        4,
    ]
    assert posix_only("import resource, os\nos.fork()\ndef f():\n    import fcntl") == ["os.fork", "resource"]
