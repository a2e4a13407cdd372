"""`prefixvlm push` uploads what a model repository consists of, and nothing else that lies in the folder."""

import json

import pytest
from huggingface_hub import HfApi
from tiny import tiny_model, tiny_processor
from travelling import CODE

from prefixvlm.cli import main

PRIVATE = (
    ".env",
    ".git/config",
    "checkpoint-7/model.safetensors",
    "checkpoint-7/optimizer.pt",
    "features/0.bin",
    "history.json",
    "loss.png",
    "model.safetensors.backup",
    "notes.md",
    "optimizer.pt",
    "run.json",
    "skipped.jsonl",
    "train.py",
    "training_args.bin",
    "adapter/training_args.bin",
)


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_processor().save_pretrained(tmp_path)
    for name in PRIVATE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"private")
    for name in ("adapter_model.safetensors", "LICENSE", "merges.txt", "tokenizer.model"):
        (tmp_path / "adapter" / name if name.startswith("adapter") else tmp_path / name).write_bytes(b"public")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/base"}))
    return tmp_path


@pytest.fixture
def uploads(monkeypatch) -> dict:
    """What would be uploaded, and where."""
    seen = {}

    def create_commit(self, repo_id, operations, **options):
        seen["files"] = {operation.path_in_repo for operation in operations}

    def create_repo(self, repo, **options):
        seen["repo"] = (repo, options["private"])
        return f"hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
        operations = self._prepare_upload_folder_additions(
            folder_path=folder_path, path_in_repo="", allow_patterns=allow_patterns, repo_type="model"
        )
        create_commit(self, repo_id, operations)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **options: None)
    return seen


def test_only_the_files_of_a_model_repository_are_uploaded(folder, uploads, capsys):
    (folder / "README.md").write_text("# Mine\n![shapes](loss.png) ![x](../outside.png) <img src='fig/a%20b.svg'>\n")
    (folder / "fig").mkdir()
    (folder / "fig" / "a b.svg").write_text("<svg/>")
    (folder / "fig" / "patient.svg").write_text("<svg/>")
    assert main(["push", str(folder), "somebody/model", "--private"]) == 0
    assert uploads["repo"] == ("somebody/model", True)
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    needed = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    needed |= {"chat_template.jinja", "processor_config.json", "LICENSE", "merges.txt", "tokenizer.model", "README.md"}
    needed |= {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "loss.png", "fig/a b.svg"}
    assert uploads["files"] >= needed | shards | CODE
    assert not uploads["files"] & (set(PRIVATE) - {"loss.png"} | {"fig/patient.svg"})
    said = capsys.readouterr()
    assert "hub/somebody/model" in said.out
    (left_out,) = (line for line in said.out.splitlines() if line.startswith("Left out"))
    for name in (".env", "checkpoint-7/", "features/", "optimizer.pt", "run.json", "skipped.jsonl", "fig/patient.svg"):
        assert name in left_out
    assert "/home/me/base" in said.err  # nobody else finds an adapter's base model there


def test_a_file_that_is_named_like_a_pattern_is_one_file(folder, uploads):
    (folder / "a[b].png").write_bytes(b"")
    (folder / "ab.png").write_bytes(b"")
    (folder / "README.md").write_text("![](a[b].png)")
    assert main(["push", str(folder), "somebody/model"]) == 0
    assert "a[b].png" in uploads["files"]
    assert "ab.png" not in uploads["files"]


@pytest.mark.parametrize("missing", ["config.json", "model*.safetensors"])
def test_a_folder_that_holds_no_model_is_refused(folder, uploads, capsys, missing):
    for path in folder.glob(missing):
        path.unlink()
    assert main(["push", str(folder), "somebody/model"]) == 2
    assert "is not the folder of a saved model" in capsys.readouterr().err
    assert not uploads
