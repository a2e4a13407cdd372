"""What training would make of a data set: its format, what is used and what is not, and samples as they are learnt."""

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prefixvlm.configuration.configuration_prefix_vlm import IGNORE_INDEX
from prefixvlm.configuration.conversation_prefix_vlm import prepare
from prefixvlm.configuration.vision_backbone_prefix_vlm import siglip_image_processor
from prefixvlm.processing.images_prefix_vlm import load_image
from prefixvlm.processing.processing_prefix_vlm import PrefixVLMProcessor
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.forms import form_name
from prefixvlm.train.data.screening import screen
from prefixvlm.train.data.sources import LOOKED_AT, Samples, load
from prefixvlm.train.training.starting_model import train_tokenizer

CAPTION_FORMS = ("captions", "karpathy", "interleaved")  # for stages 0 to 2; all others are conversations
IMAGE_SIZE, IMAGE_TOKENS = 224, 256  # the paper's
BYTES = 300  # tokens of a vocabulary of single bytes and control tokens
QUANTILES = (0.05, 0.5, 0.95, 1.0)
THUMBNAIL = 224
SHOWN_PROBLEMS = 20  # on a page of text
MARKS = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;color:#222}img{border-radius:4px;margin:4px}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.8rem}mark{background:#cde8c9}li{margin:.3rem 0}"
)


@dataclass
class Inspection:
    """What was found.

    Attributes:
        format: the form's name.
        keys: the rows' own names of what is read, by option.
        unread: keys of the first rows that nothing reads.
        rows, used, reported: rows in all, those of which every sample is used, and the others.
        conversations, images, turns: in what is used.
        tokens: quantiles of a sample's length, by share; empty without a tokenizer.
        samples: as `_sample` has them.
        problems: where and why something is not used.
        shown: the conversations of `samples`.
    """

    format: str
    keys: dict[str, str]
    unread: list[str]
    rows: int
    used: int
    reported: int
    conversations: int
    images: int
    turns: int
    tokens: dict[str, int] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    shown: list[Conversation] = field(default_factory=list)


def inspect(path: str, source: str = "auto", limit: int = 3, tokenizer: str | None = None, **options) -> Inspection:
    """Reads all rows of a data set as training does, and writes some of them as training learns them.

    Args:
        path, options: as for a source in a recipe.
        source: of `SOURCES`; `auto` to find out.
        limit: samples that are written.
        tokenizer: folder or Hub id, which decides control tokens and lengths; by default ChatML on single bytes.

    Raises:
        ValueError: if the data set as a whole cannot be read.
    """
    data = load(source, path=path, **options)
    if not isinstance(data, Samples):
        raise ValueError(f"The source {source} is no data set of rows; inspect each of its parts.")
    name = form_name(data.form)
    collator = ConversationCollator(_processor(tokenizer), "caption" if name in CAPTION_FORMS else "conversation")
    verdict = screen(data, collator, measure=True)
    bad = {data.row(index) for index, _, _ in verdict.skipped}
    first = _first_rows(data)
    keys = data.form.read_keys(first[0]) if first else {}
    found = Inspection(
        format=name,
        keys=keys,
        unread=[key for key in dict.fromkeys(key for row in first for key in row) if key not in keys.values()],
        rows=len(data.rows),
        used=len(data.rows) - len(bad),
        reported=len(bad),
        conversations=len(verdict.indices),
        images=sum(_of_rows(data, verdict.indices, verdict.images)),
        turns=0,
        problems=[{"where": where, "why": why.removeprefix(f"{where}: ")} for _, where, why in verdict.skipped],
    )
    if tokenizer is not None and verdict.lengths:
        ordered = sorted(verdict.lengths)
        found.tokens = {f"{share:.0%}": ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in QUANTILES}
    for index in verdict.indices:
        conversation = data[index]
        found.turns += len(conversation.turns)
        if len(found.samples) < limit:
            found.samples.append(_sample(collator, conversation))
            found.shown.append(conversation)
    return found


def _processor(tokenizer: str | None) -> PrefixVLMProcessor:
    if tokenizer is None:
        made = train_tokenizer([], BYTES)
    else:
        try:
            made = prepare(AutoTokenizer.from_pretrained(tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The tokenizer {tokenizer} cannot be loaded ({' '.join(str(error).split())[:200]})."
            ) from error
    return PrefixVLMProcessor(siglip_image_processor(IMAGE_SIZE), made, num_image_tokens=IMAGE_TOKENS)


def _first_rows(data: Samples) -> list[dict]:
    rows = []
    for index in range(min(LOOKED_AT, len(data.rows))):
        try:
            rows.append(data.rows[index])
        except ValueError:
            continue  # it is among the problems
    return rows


def _of_rows(data: Samples, indices: list[int], images: list[int]) -> list[int]:
    """The images of each row, whose samples share them."""
    return list(dict(zip(map(data.row, indices), images, strict=True)).values())


def _sample(collator: ConversationCollator, conversation: Conversation) -> dict[str, Any]:
    """A sample as chat messages, its images, the text that is tokenized, and the parts of it that are learnt."""
    ((ids, labels),) = collator.without_pixels([conversation])
    learnt: list[list[int]] = [[]]
    for place, label in enumerate(labels):
        if label == IGNORE_INDEX or not place:  # nothing comes before the first token that could predict it
            learnt.append([])
        else:
            learnt[-1].append(label)
    turns = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": _shown(part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
            "supervised": turn.is_learnt,
        }
        for turn, message in zip(conversation.turns, conversation.messages(), strict=True)
    ]
    return {
        "name": conversation.name,
        "turns": turns,
        "images": [_shown(image) for image in conversation.images],
        "tokens": len(ids),
        "text": collator.written(conversation),
        "supervised": [collator.processor.tokenizer.decode(run) for run in learnt if run],
    }


def _shown(image) -> str:
    """How an image is named: its path or address, or what it is."""
    if isinstance(image, dict):
        image = image.get("path") or image.get("bytes")
    if isinstance(image, bytes):
        return f"({len(image):,} bytes)"
    text = str(image)
    return text if len(text) <= 300 else f"{text[:60]}... ({len(text):,} characters)"


def as_values(found: Inspection) -> dict:
    """All of it, but for `shown`."""
    return {name: value for name, value in vars(found).items() if name != "shown"}


def as_text(found: Inspection) -> str:
    """A page of text; what is learnt stands in double brackets."""
    lines = [*_summary(found), *(f"  {one['where']}: {one['why']}" for one in found.problems[:SHOWN_PROBLEMS])]
    if len(found.problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(found.problems) - SHOWN_PROBLEMS:,} more, which --json lists")
    for sample in found.samples:
        lines += ["", f"{sample['name']} ({', '.join(sample['images']) or 'no image'})", _marked(sample, *MARKS)]
    return "\n".join(lines)


def write_page(found: Inspection, path: Path) -> None:
    """A self-contained HTML page with the pictures; what is learnt is marked."""
    problems = "".join(f"<li>{html.escape(one['where'])}: {html.escape(one['why'])}" for one in found.problems)
    samples = ""
    for sample, conversation in zip(found.samples, found.shown, strict=True):
        pictures = "".join(map(_thumbnail, conversation.images))
        text = _marked({**sample, **{name: _escaped(sample[name]) for name in ("text", "supervised")}}, "<mark>", "</mark>")
        samples += f"<h2>{html.escape(sample['name'])}</h2>{pictures}<pre>{text}</pre>"
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Data</title><style>{STYLE}</style>'
        f"<p>{'<br>'.join(map(html.escape, _summary(found)))}</p><ul>{problems}</ul>{samples}</html>\n",
        encoding="utf-8",
    )


def _thumbnail(image) -> str:
    """A small picture, or what is wrong with it."""
    try:
        picture = load_image(image)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _summary(found: Inspection) -> list[str]:
    keys = ", ".join(f"{key} ({option})" if key != option else key for option, key in found.keys.items())
    lines = [
        f"Format {found.format}; keys read: {keys}" + (f"; not read: {', '.join(found.unread)}" if found.unread else ""),
        f"{found.rows:,} rows: {found.used:,} used, {found.reported:,} reported; {found.conversations:,} samples, "
        f"{found.images:,} images, {found.turns:,} turns",
    ]
    if found.tokens:
        lines.append("Tokens of a sample: " + ", ".join(f"{count:,} ({share})" for share, count in found.tokens.items()))
    return lines


def _escaped(value):
    return [html.escape(one) for one in value] if isinstance(value, list) else html.escape(value)


def _marked(sample: dict, before: str, after: str) -> str:
    """The text of a sample with marks around what is learnt."""
    text, place = sample["text"], 0
    for learnt in sample["supervised"]:
        begin = text.find(learnt, place)
        if begin < 0:  # a tokenizer that does not give back the text
            continue
        text = f"{text[:begin]}{before}{learnt}{after}{text[begin + len(learnt) :]}"
        place = begin + len(before) + len(learnt) + len(after)
    return text
