"""Mean next-token cross-entropy of a language model on sets of texts, such as people's and machines' (Fig. 5a).

A row is what is resampled and paired: a line of a file, with one text or several. Each text starts afresh. Its first token
is predicted from the tokenizer's BOS token; where there is none it is not counted, and neither are its characters.

Shapes: B windows of texts, T tokens, V vocabulary, R rows.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.auto import PrefixVLMConfig
from prefixvlm.inference.environment import versions
from prefixvlm.inference.loading import load
from prefixvlm.train.data.rows import parsed
from prefixvlm.train.evaluation.figures import save_text_losses
from prefixvlm.train.evaluation.metrics.intervals import bootstrap

MAX_TOKENS = 2048  # default window: the logits of longer ones take gigabytes where the vocabulary is large
BATCH_TOKENS = 2048
SEED, LEVEL, SAMPLES, DRAWS = 0, 0.95, 1_000, 10_000
# what is reported, each the quotient of two sums over rows
RATIOS = {
    "loss": ("nats", "tokens"),
    "loss_per_character": ("nats", "characters"),
    "mean_of_texts": ("text_means", "texts"),
}


@dataclass
class TextSet:
    """Texts of one file: `rows` holds those of each row, `where` says where each row stands."""

    name: str
    file: str
    key: str
    rows: list[list[str]]
    where: list[str]


@dataclass
class RowLosses:
    """Sums over the texts of each row, (R,) each.

    Attributes:
        nats: cross-entropy of the predicted tokens.
        tokens: predicted tokens.
        characters: those that the predicted tokens stand for.
        texts: how many there are.
        text_means: the sum of each text's mean nats per token.
        long_texts: how many did not fit into one window.
    """

    nats: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    texts: np.ndarray
    text_means: np.ndarray
    long_texts: np.ndarray


def compare(model: str, specifications: list[str], max_tokens: int | None = None) -> dict:
    """What the command does: reads the texts, runs the model, and reports.

    Args:
        model: folder or Hub id of a decoder language model, or of a PrefixVLM, whose decoder then reads without images.
        specifications: `NAME=FILE[:KEY]` for each set.
        max_tokens: as for `text_loss`.

    Returns:
        `summarise`'s dictionary, with the model, the settings, versions, and each set's file, key, and rows left out.

    Raises:
        ValueError: for files without the texts asked for, or what is no language model.
    """
    sets = [read_texts(specification) for specification in specifications]
    names = [texts.name for texts in sets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--text: the name {repeated[0]!r} stands for two sets; give each its own.")
    left_out = leave_out_empty_rows(sets)
    decoder, tokenizer = load_language_model(model)
    decoder.to("cuda" if torch.cuda.is_available() else "cpu")
    max_tokens = window(decoder, max_tokens)
    losses = {texts.name: text_loss(decoder, tokenizer, texts.rows, max_tokens, where=texts.where) for texts in sets}
    summary = summarise(losses)
    for texts in sets:
        summary["sets"][texts.name] |= {"file": texts.file, "key": texts.key, "left_out": left_out[texts.name]}
    start = tokenizer.bos_token
    return {
        "model": model,
        "command": " ".join(sys.argv),
        "seed": SEED,
        "interval": f"{LEVEL:.0%} bootstrap over rows, {SAMPLES} samples",
        "max_tokens": max_tokens,
        "first_token": "not counted" if start is None else f"predicted from {start}",
        "versions": versions(),
        **summary,
    }


def read_texts(specification: str) -> TextSet:
    """The texts of `NAME=FILE[:KEY]`.

    FILE is .txt, a text a line, or .jsonl or .json, rows whose KEY (default `text`) leads through objects by dots to a text
    or a list of texts. Blank lines are no rows; blank texts are dropped, which may leave a row without any.

    Raises:
        ValueError: if NAME, the file, a row, or its text is missing or not what it should be, saying which.
    """
    name, _, place = specification.partition("=")
    if not name or not place:
        raise ValueError(f"--text {specification}: expected NAME=FILE or NAME=FILE:KEY, such as human=texts.jsonl:human.")
    file, colon, key = place.rpartition(":")
    if Path(place).is_file() or not colon:  # the colon may be the path's own
        file, key = place, ""
    if not Path(file).is_file():
        raise ValueError(f"--text {name}: there is no file {place}{f', nor {file}' if file != place else ''}.")
    suffix = Path(file).suffix
    if suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(f"--text {name}: {file} is no .txt, .jsonl or .json file.")
    if suffix == ".txt" and key:
        raise ValueError(f"--text {name}: {file} has lines and no keys; leave out :{key}.")
    key = key or ("" if suffix == ".txt" else "text")
    try:
        content = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    rows = _json_rows(content, file) if suffix == ".json" else _lines(content)
    found = {}
    for number, row in rows:
        where = f"{file}, {'row' if suffix == '.json' else 'line'} {number}"
        try:
            found[where] = [row] if suffix == ".txt" else _texts(parsed(row) if suffix == ".jsonl" else row, key)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
    if not any(found.values()):
        raise ValueError(f"{file} holds no text.")
    return TextSet(name, file, key, list(found.values()), list(found))


def leave_out_empty_rows(sets: list[TextSet]) -> dict[str, int]:
    """Removes rows without text, from all sets if all have as many rows, so that pairs stay pairs; returns how many."""
    empty = {texts.name: {index for index, row in enumerate(texts.rows) if not row} for texts in sets}
    if len({len(texts.rows) for texts in sets}) == 1:
        empty = dict.fromkeys(empty, set.union(*empty.values()))
    for texts in sets:
        kept = [index for index in range(len(texts.rows)) if index not in empty[texts.name]]
        if not kept:
            raise ValueError(f"--text {texts.name}: no row of {texts.file} has a text in every set.")
        texts.rows, texts.where = [texts.rows[index] for index in kept], [texts.where[index] for index in kept]
    return {name: len(rows) for name, rows in empty.items()}


def load_language_model(name: str):
    """A decoder language model in float32, and its tokenizer.

    Args:
        name: folder or Hub id of what `AutoModelForCausalLM` loads, or of a PrefixVLM.

    Raises:
        ValueError: if that is no causal language model with all its weights and a tokenizer.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type == PrefixVLMConfig.model_type:
            model, processor = load(name)
            return model.language_model, processor.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many kinds
        raise ValueError(
            f"{name} is no language model that can be loaded ({' '.join(str(error).split())[:200]})."
        ) from error
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:  # transformers 5 makes up an empty one
        raise ValueError(f"{name} is no language model that can be loaded (it has no tokenizer).")
    if report["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"{name} lacks weights of a language model: {sorted(report['missing_keys'])[:3]}.")
    if config.is_encoder_decoder or not _is_causal(model):
        raise ValueError(f"{name} is of type {config.model_type!r}, which sees later tokens; choose a decoder.")
    return model, tokenizer


def window(model, max_tokens: int | None = None) -> int:
    """How many tokens the model reads at once: `max_tokens`, by default its context, but at most `MAX_TOKENS`.

    Raises:
        ValueError: if the model cannot read so many, or nothing could be predicted from so few.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_tokens is None:
        return min(context or MAX_TOKENS, MAX_TOKENS)
    if max_tokens < 2 or max_tokens > (context or max_tokens):
        raise ValueError(f"max_tokens is {max_tokens}; it must be from 2 to {context or 'any number'} for this model.")
    return max_tokens


@torch.inference_mode()
def text_loss(
    model,
    tokenizer,
    texts: list[list[str]],
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    where: list[str] | None = None,
) -> RowLosses:
    """Runs the model over all texts, in batches of like length; the result does not depend on the batches.

    Args:
        model: a decoder language model, or a PrefixVLM, whose decoder reads without images; put into evaluation mode.
        tokenizer: its tokenizer (of a PrefixVLM `processor.tokenizer`). It adds no special tokens but a leading BOS.
        texts: the texts of each row.
        max_tokens: the window, see `window`. A longer text is read in windows that overlap by half, and every token is
            counted once.
        batch_tokens: tokens in a batch, with padding; a longer window is a batch of its own.
        where: the name of each row in errors; by default its number from 1.

    Raises:
        ValueError: if there is nothing to predict in a text, the tokenizer is another model's, or a loss is not finite.
    """
    if model.config.model_type == PrefixVLMConfig.model_type:
        model = model.language_model
    model.eval()
    where = where or [f"row {number + 1}" for number in range(len(texts))]
    row_of_text = [row for row, members in enumerate(texts) for _ in members]
    if missing := sorted(set(range(len(texts))).difference(row_of_text)):
        raise ValueError(f"{where[missing[0]]}: there is no text.")
    if not texts:
        raise ValueError("There is no text.")
    width = window(model, max_tokens)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    flat = [text for members in texts for text in members]
    sequences, characters = [], []
    for text, ids in zip(flat, tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        sequences.append(start + ids)
        unpredicted = 0 if start else len(tokenizer.decode(ids[:1]))
        characters.append(max(1, len(text) - unpredicted))  # a character of several tokens may start before the first
    tokens = np.array([len(ids) - 1 for ids in sequences])
    if (tokens < 1).any():
        index = int(tokens.argmin())
        raise ValueError(
            f"{where[row_of_text[index]]}: in {flat[index][:40]!r} there is no token to predict, since the first has none "
            "before it; leave the row out."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if (largest := max(map(max, sequences))) >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {largest}, and the model knows {vocabulary}; they are not of one model."
        )

    nats = np.zeros(len(flat))
    pieces = [(index, *piece) for index, ids in enumerate(sequences) for piece in _windows(len(ids), width)]
    for batch in tqdm(list(_batches(pieces, batch_tokens)), desc="Reading", unit="batch"):
        for index, loss in _nats(model, sequences, batch):
            nats[index] += loss
    if not np.isfinite(nats).all():
        index = int(np.isfinite(nats).argmin())
        raise ValueError(f"{where[row_of_text[index]]}: the loss is {nats[index]}; the model's weights may be broken.")

    def per_row(values) -> np.ndarray:
        return np.bincount(row_of_text, values)

    return RowLosses(
        nats=per_row(nats),
        tokens=per_row(tokens).astype(int),
        characters=per_row(characters).astype(int),
        texts=np.bincount(row_of_text),
        text_means=per_row(nats / tokens),
        long_texts=per_row([len(ids) > width for ids in sequences]).astype(int),
    )


def summarise(losses: dict[str, RowLosses], seed: int = SEED, samples: int = SAMPLES) -> dict:
    """Numbers of each set and, where all have as many rows, of each set's rows against the first set's.

    Args:
        losses: of each set, by its name.
        seed: of bootstrap and permutation.
        samples: how often the rows are drawn anew.

    Returns:
        `sets`: by name `loss` (nats per token, over all tokens of the set), `loss_per_character` (nats), `mean_of_texts`
        (each text's nats per token, averaged over texts), `perplexity` (exp of `loss`), each with its 95% interval, and
        counts. `pairs`: for each set but the first the mean `difference` of its rows' nats per token to those of the first
        set, the interval, `p_value`, and `share_lower` of rows where it is lower, in [0, 1]; rows are paired by position.
    """
    sets = {}
    for name, rows in losses.items():
        count = len(rows.nats)
        intervals = bootstrap(partial(_scores, rows), count, samples, seed, LEVEL)
        sets[name] = {
            **_scores(rows, np.arange(count)),
            **{f"{key}_interval": [float(end) for end in interval] for key, interval in intervals.items()},
            "rows": count,
            **{field: int(getattr(rows, field).sum()) for field in ("texts", "tokens", "characters", "long_texts")},
        }
    pairs = []
    first, *others = losses
    if len({len(rows.nats) for rows in losses.values()}) == 1:
        for other in others:
            differences = losses[other].nats / losses[other].tokens - losses[first].nats / losses[first].tokens
            pairs.append({"first": first, "second": other, **_paired(differences, seed, samples)})
    return {"sets": sets, "pairs": pairs}


def sign_flip_p_value(differences: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> float:
    """How often a mean at least as far from 0 comes about when each difference gets a sign at random, two-sided.

    The differences as found count as one more draw, so that the value is never 0: (1 + extreme) / (1 + draws), as in
    Phipson and Smyth (2010), "Permutation p-values should never be zero".

    Args:
        differences: (R,), one for each pair.
    """
    generator = np.random.default_rng(seed)
    drawn = np.array([generator.choice((-1.0, 1.0), len(differences)) @ differences for _ in range(draws)])
    found = abs(differences.sum()) * (1 - 1e-9)  # sums of the same numbers round differently
    return float((1 + (abs(drawn) >= found).sum()) / (1 + draws))


def table(report: dict) -> str:
    """A report of `compare` in words."""
    lines = [
        f"{'set':<16}{'rows':>8}{'texts':>8}{'tokens':>10}  {'nats/token':<24}{'nats/character':<26}{'perplexity':>10}"
    ]
    for name, row in report["sets"].items():
        token, character = (_with_interval(row, key) for key in ("loss", "loss_per_character"))
        lines.append(
            f"{name:<16}{row['rows']:>8,}{row['texts']:>8,}{row['tokens']:>10,}  {token:<24}{character:<26}"
            f"{row['perplexity']:>10.2f}"
        )
    lines.append(f"Interval: {report['interval']}. First token of a text: {report['first_token']}.")
    for name, row in report["sets"].items():
        if row["left_out"]:
            lines.append(f"{row['left_out']:,} rows of {name} were left out, since they have no text in some set.")
        if row["long_texts"]:
            lines.append(
                f"{row['long_texts']:,} of {row['texts']:,} texts of {name} are longer than {report['max_tokens']:,} "
                "tokens and were read in windows that overlap by half."
            )
    for pair in report["pairs"]:
        lines.append(
            f"{pair['second']} - {pair['first']}, row by row: {_with_interval(pair, 'difference')} nats/token, "
            f"p = {pair['p_value']:.4f}, lower in {pair['share_lower']:.1%} of {pair['rows']:,} rows"
        )
    return "\n".join(lines)


def save(report: dict, folder: Path) -> list[Path]:
    """Writes text_loss.json and text_loss.png; returns their paths."""
    numbers, figure = folder / "text_loss.json", folder / "text_loss.png"
    write_atomically(numbers, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    save_text_losses(report["sets"], figure)
    return [numbers, figure]


def _lines(content: str) -> list[tuple[int, str]]:
    # not splitlines, which also cuts at characters that JSON strings may hold
    return [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]


def _json_rows(content: str, file: str) -> list[tuple[int, object]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of rows.")
    return list(enumerate(rows, start=1))


def _texts(row, key: str) -> list[str]:
    """The texts a row has at a dotted key, without blank ones.

    Raises:
        ValueError: if it has none there.
    """
    value = next(_at(row, key), None)
    if value is None:
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"it has nothing at {key!r}; there is {known}")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key!r} is neither a text nor a list of texts ({str(value)[:60]!r})")
    return [text for text in texts if text.strip()]


def _at(row, key: str):
    """Yields what lies at a dotted key; keys may have dots of their own, as in `machine.gpt-3.5`."""
    if not isinstance(row, dict):
        return
    if key in row:
        yield row[key]
    for place, sign in enumerate(key):
        if sign == ".":
            yield from _at(row.get(key[:place]), key[place + 1 :])


def _is_causal(model) -> bool:
    """Whether the first of two tokens is read alike, whatever the second is."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[0, 1], [0, 2]]), use_cache=False).logits
    return torch.allclose(logits[0, 0], logits[1, 0], atol=1e-4, equal_nan=True)


def _windows(length: int, width: int):
    """Yields (start, first predicted position, end) of the windows of a text, so that each position is predicted once."""
    end = min(length, width)
    yield 0, 1, end
    while end < length:
        predicted, end = end, min(length, end + width // 2)
        yield end - width, predicted, end


def _batches(pieces, batch_tokens: int):
    """Yields the windows in batches of like length, the longest first, so that a lack of memory shows at once."""
    pieces = sorted(pieces, key=lambda piece: piece[1] - piece[3])
    while pieces:
        _, start, _, end = pieces[0]
        count = max(1, batch_tokens // (end - start))
        yield pieces[:count]
        pieces = pieces[count:]


def _nats(model, sequences: list[list[int]], batch):
    """Yields for each window of a batch the text it belongs to, and the summed loss of what is predicted there."""
    width = max(end - start for _, start, _, end in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T), padded on the right, where nobody looks
    attention_mask = torch.zeros_like(input_ids)
    for row, (index, start, _, end) in enumerate(batch):
        input_ids[row, : end - start] = torch.tensor(sequences[index][start:end])
        attention_mask[row, : end - start] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    # window by window, since a copy of all logits may be gigabytes
    for row, (index, start, predicted, end) in enumerate(batch):
        first, last = predicted - start, end - start
        predictions = logits[row, first - 1 : last - 1].float()
        losses = functional.cross_entropy(predictions, input_ids[row, first:last], reduction="none")
        yield index, losses.double().sum().item()


def _scores(rows: RowLosses, indices: np.ndarray) -> dict[str, float]:
    """The numbers of a set made of these of its rows."""
    sums = {field: getattr(rows, field)[indices].sum() for pair in RATIOS.values() for field in pair}
    ratios = {key: float(sums[above] / sums[below]) for key, (above, below) in RATIOS.items()}
    return {**ratios, "perplexity": float(np.exp(ratios["loss"]))}


def _paired(differences: np.ndarray, seed: int, samples: int) -> dict:
    count = len(differences)
    interval = bootstrap(lambda indices: {"mean": float(differences[indices].mean())}, count, samples, seed, LEVEL)["mean"]
    return {
        "rows": count,
        "difference": float(differences.mean()),
        "difference_interval": [float(end) for end in interval],
        "p_value": sign_flip_p_value(differences, seed=seed),
        "share_lower": float((differences < 0).mean()),
    }


def _with_interval(numbers: dict, key: str) -> str:
    low, high = numbers[f"{key}_interval"]
    return f"{numbers[key]:.3f} [{low:.3f}, {high:.3f}]"
