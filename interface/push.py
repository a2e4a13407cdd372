"""Uploads a saved model to the Hub: the files that a model repository consists of, and no others."""

import json
import posixpath
import re
import sys
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import HfApi

from prefixvlm.configuration.hub_export import code_files

# a list of what is uploaded, not of what is not: who knows what else lies in a folder
REPOSITORY = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "*.spm",
    "*.tiktoken",
    "README.md",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
)
FOLDERS = ("", "adapter/")  # a stage leaves its adapter beside the model it was merged into
FIGURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
FIGURE_IN_CARD = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]+src\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)


def upload(
    folder: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> tuple[str, list[str]]:
    """Uploads the files of a model repository that a folder has. Weights that have arrived are not sent a second time.

    Args:
        private: of a repository that is created; one that is there stays as it is.
        revision: the branch, which is created if it is not there; by default `main`.
        create_pr: propose the change, to be merged by who owns the repository.

    Returns:
        The repository's address, and what was left out; a folder of which nothing was uploaded is named as a whole.

    Raises:
        ValueError: if the folder holds no saved model or adapter, or a file does not arrive.
    """
    weights = {"config.json": "model*.safetensors", "adapter_config.json": "adapter_model.safetensors"}
    if not any((folder / config).is_file() and any(folder.glob(files)) for config, files in weights.items()):
        what = "config.json" if not (folder / "config.json").is_file() else "weights (model.safetensors)"
        raise ValueError(f"{folder} is not the folder of a saved model: it has no {what}.")
    chosen, left_out = sorted_files(folder)
    for name in chosen:
        if name.endswith("adapter_config.json"):
            _warn_of_a_local_base(folder / name)
    api = HfApi()
    url = str(api.create_repo(repo, private=private, exist_ok=True))
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    try:
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[escape(name) for name in chosen],
            revision=revision,
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            create_pr=create_pr,
        )
    except RuntimeError as error:  # what huggingface_hub makes of a file that does not arrive
        raise ValueError(f"{error} The same command goes on with what is missing.") from error
    return (str(done.pr_url) if create_pr else f"{url}/tree/{revision}" if revision else url), left_out


def sorted_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that belong on the Hub, by their paths in the folder, and the files and folders that do not."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    patterns = [prefix + pattern for prefix in FOLDERS for pattern in (*REPOSITORY, *code_files())]
    figures = {figure for prefix in FOLDERS for figure in _figures(folder, prefix)}
    # an asterisk would also match a slash
    chosen = [
        name
        for name in names
        if name in figures
        or any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]
    used = {name.split("/", 1)[0] for name in chosen if "/" in name}
    rest = {name for name in names if name not in chosen}
    return chosen, sorted(
        {name if name.split("/", 1)[0] in used or "/" not in name else name.split("/", 1)[0] + "/" for name in rest}
    )


def _figures(folder: Path, prefix: str) -> set[str]:
    """The pictures in the folder that its card shows."""
    card = folder / prefix / "README.md"
    if not card.is_file():
        return set()
    links = {
        unquote(first or second) for first, second in FIGURE_IN_CARD.findall(card.read_text("utf-8", errors="replace"))
    }
    names = {posixpath.normpath(prefix + link) for link in links if link.lower().endswith(FIGURES)}
    return {name for name in names if not name.startswith(("../", "/"))}


def _warn_of_a_local_base(config: Path) -> None:
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return
    if isinstance(base, str) and (Path(base).exists() or base.startswith(("/", ".")) or base.count("/") != 1):
        print(
            f"{config} names its base model by a path, {base}, where nobody else finds it; put a Hub id there.",
            file=sys.stderr,
        )
