"""The flat files that travel with a checkpoint, read as transformers reads them, and what is pushed to the Hub."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import tiny_model, tiny_processor
from transformers import dynamic_module_utils
from transformers.utils import hub
from travelling import CODE

from prefixvlm import PrefixVLMProcessor
from prefixvlm.configuration import hub_export
from prefixvlm.configuration.hub_export import EMPTY_CARD, ENTRY_MODULES, export, export_code, write_atomically
from prefixvlm.modeling_vlm import modeling_prefix_vlm

ENTRIES = {f"{module.rsplit('.')[-1]}.py" for module in ENTRY_MODULES}
MAY_IMPORT = {"torch", "transformers", "numpy", "PIL"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("code")
    assert export_code(path) == sorted(file.name for file in path.iterdir())
    return path


def relative_imports(tree: ast.AST) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and "." not in node.module for node in nodes)
    return {f"{node.module}.py" for node in nodes}


def test_every_file_parses_and_needs_only_files_that_are_there(folder):
    files = {file.name for file in folder.iterdir()}
    assert files == CODE
    for file in folder.iterdir():
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source, feature_version=(3, 10))
        compile(tree, file.name, "exec")
        assert relative_imports(tree) <= files
        assert not re.search(r"^\s*(from|import)\s+\.\.", source, flags=re.MULTILINE)
        # transformers finds the siblings by searching lines, so a docstring must not look like an import
        assert {f"{name}.py" for name in dynamic_module_utils.get_relative_imports(file)} == relative_imports(tree)


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_an_entry_file_names_all_others(folder, entry):
    """transformers copies and saves what an entry file names; a processor saved alone must save the model's code too."""
    assert relative_imports(ast.parse((folder / entry).read_text(encoding="utf-8"))) == CODE - {entry}


def test_imports_of_imports_are_named_in_the_entry_file(tmp_path, monkeypatch):
    """As 4.x needs as soon as a sibling imports a sibling of its own."""
    sources = {
        "upper/entry.py": "from ..lower.middle import MIDDLE\n\nENTRY = MIDDLE\n",
        "lower/middle.py": "def late():\n    from .last import (\n        LAST,\n    )\n    return LAST\nMIDDLE = late()\n",
        "lower/last.py": "LAST = 'reached'\n",
    }
    for name, source in sources.items():
        path = tmp_path / "three_files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hub_export, "PACKAGE", "three_files")
    monkeypatch.setattr(hub_export, "ENTRY_MODULES", ("upper.entry",))
    flat = tmp_path / "flat"
    flat.mkdir()
    assert export_code(flat) == ["entry.py", "last.py", "middle.py"]
    assert set(dynamic_module_utils.get_relative_imports(flat / "entry.py")) == {"middle", "last"}
    assert set(dynamic_module_utils.get_relative_imports(flat / "middle.py")) == {"last"}
    assert importlib.import_module("flat.entry").ENTRY == "reached"


def test_the_code_asks_for_no_package_beyond_the_allowed_ones(folder):
    for file in folder.iterdir():
        imported = {name for name in dynamic_module_utils.get_imports(file) if name not in sys.stdlib_module_names}
        assert imported <= MAY_IMPORT, file.name


def test_only_imports_differ_from_the_package(folder):
    """The numbers of lines stay, so that a traceback of remote code points at the right line of the source."""
    with open(modeling_prefix_vlm.__file__, encoding="utf-8") as file:
        source = file.read().splitlines()
    exported = (folder / "modeling_prefix_vlm.py").read_text(encoding="utf-8").splitlines()[: len(source)]
    changed = [line for line, original in zip(exported, source, strict=True) if line != original]
    assert changed
    assert all(line.startswith("from .") for line in changed)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.py"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert "a.py" in {file.name for file in tmp_path.iterdir()}


# what goes to the Hub


class Hub:
    """Stands in for the Hub: keeps what is uploaded, and how."""

    def __init__(self, monkeypatch):
        self.files, self.calls = {}, []
        # 4.x calls functions, 5.x the methods of an object
        for name in ("create_repo", "create_branch", "create_commit"):
            monkeypatch.setattr(hub, name, getattr(self, name), raising=False)
        monkeypatch.setattr(hub, "hf_api", lambda: self, raising=False)
        monkeypatch.setattr(hub.ModelCard, "load", self.load_card)

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, **kwargs):
        self.calls.append(("create_branch", kwargs["branch"], {}))

    def create_commit(self, repo_id, operations, **kwargs):
        self.calls.append(("create_commit", repo_id, kwargs))
        self.files |= {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}

    def load_card(self, *args, **kwargs):
        if "README.md" not in self.files:
            raise LocalEntryNotFoundError("no card")
        return ModelCard(self.files["README.md"].decode())

    def commits(self) -> list:
        return [call for call in self.calls if call[0] == "create_commit"]


SAVERS = {"model": tiny_model, "processor": tiny_processor}
NEEDED = {
    "model": {"model.safetensors", "config.json", "generation_config.json", "README.md"},
    "processor": {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"},
}


@pytest.mark.parametrize("kind", SAVERS)
def test_everything_is_uploaded_in_one_commit(kind, tmp_path, monkeypatch):
    there, saver = Hub(monkeypatch), SAVERS[kind]()
    saver.save_pretrained(tmp_path / "vlm", push_to_hub=True, repo_id="someone/vlm")
    assert len(there.commits()) == 1
    assert set(there.files) >= NEEDED[kind] | CODE
    saver.push_to_hub("someone/vlm")
    assert len(there.commits()) == 2


@pytest.mark.parametrize("kind", SAVERS)
def test_arguments_of_the_push_are_passed_on(kind, tmp_path, monkeypatch):
    there, saver = Hub(monkeypatch), SAVERS[kind]()
    arguments = {"private": True, "commit_message": "m", "revision": "draft", "create_pr": True}
    saver.save_pretrained(tmp_path / "vlm", push_to_hub=True, repo_id="someone/vlm", **arguments)
    assert there.calls[0][2]["private"] is True
    [(_, _, commit)] = there.commits()
    assert {name: commit[name] for name in ("commit_message", "revision", "create_pr")} == {
        name: arguments[name] for name in ("commit_message", "revision", "create_pr")
    }


def test_the_card_on_the_hub_is_ours_unless_somebody_wrote_one(monkeypatch):
    there, model, processor = Hub(monkeypatch), tiny_model(), tiny_processor()
    processor.push_to_hub("someone/vlm")  # transformers makes up a card
    model.push_to_hub("someone/vlm")
    assert b"# A PrefixVLM checkpoint" in there.files["README.md"]
    there.files["README.md"] = b"---\nlicense: mit\n---\n# Mine\n"
    model.push_to_hub("someone/vlm")
    processor.push_to_hub("someone/vlm")
    assert b"# Mine" in there.files["README.md"]


def test_the_card_that_transformers_makes_up_is_replaced(tmp_path):
    model, card = tiny_model(), tmp_path / "README.md"
    card.write_text(f"# Model\n{EMPTY_CARD}\n")
    model.save_pretrained(tmp_path)
    export(tmp_path)
    assert "# A PrefixVLM checkpoint" in card.read_text()


def test_what_5x_writes_of_a_tokenizer_can_be_read_by_4x(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|image_pad|>", "<|im_start|>", "<|im_end|>"]
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    image_processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert image_processor["image_processor_type"] == "SiglipImageProcessor"
    # twice the same, also through a round trip
    PrefixVLMProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again["additional_special_tokens"] == config["additional_special_tokens"]


@pytest.mark.parametrize("content", ["# Zürich\n".encode("latin-1"), None], ids=["not UTF-8", "a folder"])
def test_a_readme_that_cannot_be_read_is_kept_and_named(tmp_path, content):
    card = tmp_path / "README.md"
    card.mkdir() if content is None else card.write_bytes(content)
    for saver in (tiny_model(), tiny_processor()):
        with pytest.warns(UserWarning, match=re.escape(f"{card} is kept")):
            saver.save_pretrained(tmp_path)
    assert card.is_dir() if content is None else card.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "tokenizer.json"} | CODE


def test_a_processor_completes_the_card_of_the_model_beside_it(tmp_path):
    """As in what a Trainer uploads of an unfinished run: weights are copied there, and only the processor is saved."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    written = (tmp_path / "README.md").read_bytes()
    (tmp_path / "README.md").unlink()
    tiny_processor().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == written
    tiny_processor().save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "README.md").exists()


@pytest.mark.parametrize("config", ['{"model_type": "qwen2"}', "{", "[]"])
def test_a_processor_beside_another_model_writes_no_card(tmp_path, config):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "config.json").write_text(config)
    tiny_processor().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
