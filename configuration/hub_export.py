"""Turns a saved folder into a complete Hub repository: the code that loads it, and its model card.

transformers loads remote code from flat files beside the weights. This package's files live in folders, so relative
imports are rewritten on the way: `from ..configuration.configuration_prefix_vlm import X` becomes
`from .configuration_prefix_vlm import X`.
"""

import ast
import re
from functools import cache
from importlib import resources
from pathlib import Path

from .writing import write_atomically

PACKAGE = __name__.split(".", 1)[0]
ENTRY_MODULES = (
    "configuration.configuration_prefix_vlm",
    "modeling_vlm.modeling_prefix_vlm",
    "processing.processing_prefix_vlm",
)
# a sentence of the card that transformers' push_to_hub generates for a repository without one
EMPTY_CARD = "This model card has been automatically generated."


def export(model, folder) -> None:
    """Writes code and README.md for a saved model; a README.md written by hand is kept."""
    export_code(folder)
    card = Path(folder, "README.md")
    if not card.exists() or EMPTY_CARD in card.read_text(encoding="utf-8"):
        write_atomically(card, model_card(model))


def export_code(folder) -> list[str]:
    """Writes the flat files that `trust_remote_code=True` loads; returns their names."""
    sources, waiting = {}, list(ENTRY_MODULES)
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module] = _flatten(module)
            waiting += sources[module][1]
    names = {module: module.rsplit(".", 1)[-1] for module in sources}
    for module, (source, needs) in sources.items():
        if module in ENTRY_MODULES:
            # transformers 4.x copies only what an entry file itself imports from a local folder, not what those import
            hidden = sorted(_closure(module, sources) - set(needs) - {module})
            if hidden:
                source += "\n# named for transformers 4.x, which does not follow transitive imports in a local folder\n"
            for other in hidden:
                source += f"from .{names[other]} import __name__ as _{names[other]}  # noqa: E402, F401\n"
        write_atomically(Path(folder, f"{names[module]}.py"), source)
    return sorted(f"{name}.py" for name in names.values())


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


def _closure(module: str, sources: dict) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        for need in sources[waiting.pop()][1]:
            if need not in found:
                found.add(need)
                waiting.append(need)
    return found


def model_card(model) -> str:
    """The README.md of a checkpoint: `model_card.md` with this model's figures."""
    config = model.config
    count = {
        name: sum(parameter.numel() for parameter in getattr(model, name).parameters())
        for name in ("vision_tower", "projector", "language_model")
    }
    template = resources.files(f"{PACKAGE}.configuration").joinpath("model_card.md").read_text(encoding="utf-8")
    return template.format(
        vision_type=config.vision_config.model_type,
        vision_shape=f"{config.vision_config.num_hidden_layers} layers of {config.vision_config.hidden_size}",
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
