"""Turns a saved folder into a complete Hub repository: the code that loads it, and its model card.

transformers loads remote code from flat files beside the weights. This package's files live in folders, so relative
imports are rewritten on the way: `from ..configuration.configuration_prefix_vlm import X` becomes
`from .configuration_prefix_vlm import X`.
"""

import ast
import json
import math
import re
import warnings
from functools import cache
from importlib import resources
from pathlib import Path

from .configuration_prefix_vlm import PrefixVLMConfig
from .writing import write_atomically

PACKAGE = __name__.split(".", 1)[0]
ENTRY_MODULES = (
    "configuration.configuration_prefix_vlm",
    "modeling_vlm.modeling_prefix_vlm",
    "processing.processing_prefix_vlm",
    "processing.pipeline_prefix_vlm",
)
PARTS = ("vision_tower", "projector", "language_model")
# a sentence of the card that transformers' push_to_hub generates for a repository without one
EMPTY_CARD = "This model card has been automatically generated."


def export(folder) -> None:
    """Writes the code and, where the folder holds a model, README.md; a README.md written by hand is kept.

    A processor calls this too: what a Trainer uploads of an unfinished run is completed by nothing else.
    """
    export_code(folder)
    card = model_card(folder)
    if card is not None and _may_write(Path(folder, "README.md")):
        write_atomically(Path(folder, "README.md"), card)


def export_code(folder) -> list[str]:
    """Writes the flat files that `trust_remote_code=True` loads; returns their names."""
    sources = _sources()
    names = {module: module.rsplit(".", 1)[-1] for module in sources}
    for module, (source, needs) in sources.items():
        if module in ENTRY_MODULES:
            # transformers fetches, caches and saves the files that a file names: 4.x only those of the entry file itself,
            # and all versions only those of the class that is loaded or saved, be it the processor alone
            source += "\nif False:\n"
            for other in sorted(sources.keys() - set(needs) - {module}):
                source += f"    from .{names[other]} import __name__ as _{names[other]}  # noqa: F401\n"
        write_atomically(Path(folder, f"{names[module]}.py"), source)
    return sorted(f"{name}.py" for name in names.values())


def code_files() -> list[str]:
    """The names of the files that `export_code` writes."""
    return sorted(f"{module.rsplit('.', 1)[-1]}.py" for module in _sources())


def _sources() -> dict[str, tuple[str, list[str]]]:
    """What `_flatten` says of each module that travels."""
    sources: dict[str, tuple[str, list[str]]] = {}
    waiting = list(ENTRY_MODULES)
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module] = _flatten(module)
            waiting += sources[module][1]
    return sources


@cache
def _flatten(module: str) -> tuple[str, list[str]]:
    """A module's source with flat relative imports, and the modules of this package that it needs."""
    folder, name = module.rsplit(".", 1)
    source = resources.files(f"{PACKAGE}.{folder}").joinpath(f"{name}.py").read_text(encoding="utf-8")
    lines, needs = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            needs.append(node.module if node.level == 2 else f"{folder}.{node.module}")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(r"from \.+[\w.]*", f"from .{node.module.rsplit('.', 1)[-1]}", line, count=1)
    return "".join(lines), needs


def _may_write(card: Path) -> bool:
    """Whether there is no README.md that somebody wrote; warns of one that cannot be read."""
    try:
        return EMPTY_CARD in card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(
            f"{card} is kept, but it cannot be read as UTF-8 text ({error}); save it as UTF-8, which the Hub needs, or "
            "remove it to get a model card.",
            stacklevel=2,
        )
        return False


def model_card(folder) -> str | None:
    """The README.md of a saved model: `model_card.md` with its figures; `None` if the folder holds no PrefixVLM."""
    config, count = _config(folder), parameter_counts(folder)
    if config is None or count is None:
        return None
    template = resources.files(f"{PACKAGE}.configuration").joinpath("model_card.md").read_text(encoding="utf-8")
    return template.format(
        vision_type=config.vision_config.model_type,
        vision_shape=_vision_shape(config),
        image_size=config.vision_config.image_size,
        num_image_tokens=config.num_image_tokens,
        text_type=config.text_config.model_type,
        text_shape=f"{config.text_config.num_hidden_layers} layers of {config.text_config.hidden_size}",
        attention_mode=config.attention_mode,
        projector_act=config.projector_hidden_act,
        vision_parameters=f"{count['vision_tower']:,}",
        projector_parameters=f"{count['projector']:,}",
        text_parameters=f"{count['language_model']:,}",
        total_parameters=f"{sum(count.values()):,}",
    )


def _vision_shape(config: PrefixVLMConfig) -> str:
    vision, layers = config.vision_config, config.num_vision_layers
    if layers is None:
        return f"{vision.architecture}, {vision.hidden_size} wide"
    of = "" if layers == vision.num_hidden_layers else f" of {vision.num_hidden_layers}"
    return f"{layers}{of} layers, {vision.hidden_size} wide" if of else f"{layers} layers of {vision.hidden_size}"


def _config(folder) -> PrefixVLMConfig | None:
    try:
        values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(values, dict) and values.get("model_type") == PrefixVLMConfig.model_type
    return PrefixVLMConfig.from_pretrained(folder) if is_ours else None


def parameter_counts(folder) -> dict[str, int] | None:
    """The number of parameters of each of `PARTS`, from the heads of the safetensors files; `None` if there are none."""
    whole, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    if whole.is_file():
        files = {whole.name}
    elif index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        return None
    counts = dict.fromkeys(PARTS, 0)
    for name in files:
        with Path(folder, name).open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for tensor, about in head.items():
            part = tensor.partition(".")[0]
            if part in counts:
                counts[part] += math.prod(about["shape"])
    return counts
