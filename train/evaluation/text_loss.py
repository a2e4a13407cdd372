"""Mean next-token cross-entropy of a language model on sets of texts, such as human and machine-written ones (Fig. 5a).

A row, one record of a file with one or more texts, is the unit of resampling and pairing. Texts are read independently. A
text's first token is predicted from the tokenizer's BOS token; without one, that token and its characters are not counted.

Shapes: B windows of texts, T tokens, V vocabulary, R rows.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.auto import PrefixVLMConfig
from prefixvlm.inference.environment import choose_device, versions
from prefixvlm.inference.loading import load, one_line, refuse_missing_path
from prefixvlm.train.evaluation.figures import save_text_losses
from prefixvlm.train.evaluation.row_statistics import row_interval, sign_flip_p_value
from prefixvlm.train.evaluation.text_sets import leave_out_empty_rows, read_texts

MAX_TOKENS = 2048  # default window: the logits of longer ones take gigabytes where the vocabulary is large
BATCH_TOKENS = 2048
SEED, LEVEL, RESAMPLES = 0, 0.95, 1_000
SCORES = ("loss", "loss_per_character", "mean_of_texts", "perplexity")


class RowLosses(NamedTuple):
    """Sums over the texts of each row, (R,) each."""

    nats: np.ndarray  # cross-entropy of the predicted tokens
    tokens: np.ndarray  # predicted tokens
    characters: np.ndarray  # of the predicted tokens
    texts: np.ndarray  # number of texts
    text_means: np.ndarray  # each text's mean nats per token
    long_texts: np.ndarray  # number of texts longer than one window


def compare(model: str, specifications: list[str], max_tokens: int | None = None, device: str | None = None) -> dict:
    """Reads the texts, runs the model and reports, as the command does.

    Args:
        model: folder or Hub id of a decoder language model, or of a PrefixVLM, whose decoder then reads without images.
        specifications: `NAME=FILE[:KEY]` for each set.
        max_tokens: as for `text_loss`.
        device: as for `choose_device`; the weights are in float32 on all of them, since their rounding is part of a loss.

    Returns:
        `summarise`'s dictionary, with the model, the settings, versions, and each set's file, key, and rows left out.

    Raises:
        ValueError: for files that lack the texts asked for, or a model that is not a language model.
    """
    sets = [read_texts(specification) for specification in specifications]
    names = [texts.name for texts in sets]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--text: two sets are named {repeated[0]!r}; give each its own name.")
    left_out = leave_out_empty_rows(sets)
    there = choose_device(device)
    decoder, tokenizer = load_language_model(model)
    decoder.to(there)
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
        "interval": f"{LEVEL:.0%} bootstrap over rows, {RESAMPLES} samples",
        "max_tokens": max_tokens,
        "first_token": "not counted" if start is None else f"predicted from {start}",
        "versions": versions(),
        **summary,
    }


def load_language_model(name: str):
    """A decoder language model in float32, and its tokenizer.

    Args:
        name: folder or Hub id of what `AutoModelForCausalLM` loads, or of a PrefixVLM.

    Raises:
        ValueError: if it is not a causal language model with all its weights and a tokenizer.
    """
    refuse_missing_path(name)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type == PrefixVLMConfig.model_type:
            model, processor = load(name)
            return model.language_model, processor.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many kinds
        raise ValueError(f"{name} cannot be loaded as a language model ({one_line(error)}).") from error
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:  # transformers 5 makes up an empty one
        raise ValueError(f"{name} cannot be loaded as a language model (it has no tokenizer).")
    if report["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"{name} lacks weights of a language model: {sorted(report['missing_keys'])[:3]}.")
    if config.is_encoder_decoder or not _is_causal(model):
        raise ValueError(f"{name} is a {config.model_type!r}, which attends to later tokens; choose a decoder.")
    return model, tokenizer


def window(model, max_tokens: int | None = None) -> int:
    """The number of tokens the model reads at once: `max_tokens`, or by default its context, at most `MAX_TOKENS`.

    Raises:
        ValueError: if that is more than the model can read, or too few to predict anything.
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
    """Runs the model over all texts, in batches of similar length; the result does not depend on the batching.

    Args:
        model: a decoder language model, or a PrefixVLM, whose decoder reads without images; put into evaluation mode.
        tokenizer: its tokenizer (of a PrefixVLM `processor.tokenizer`). No special token but a leading BOS is added.
        texts: the texts of each row.
        max_tokens: the window, see `window`. A longer text is read in windows that overlap by half, and every token is
            counted once.
        batch_tokens: tokens per batch, including padding; a longer window is a batch of its own.
        where: the name of each row in error messages; by default its number, from 1.

    Raises:
        ValueError: if there is nothing to predict in a text, the tokenizer is another model's, or a loss is not finite.
    """
    if model.config.model_type == PrefixVLMConfig.model_type:
        model = model.language_model
    model.eval()
    where = where or [f"row {number + 1}" for number in range(len(texts))]
    if not texts or not all(texts):
        raise ValueError("There is no text." if not texts else f"{where[texts.index([])]}: there is no text.")
    width = window(model, max_tokens)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    row_of_text = [row for row, members in enumerate(texts) for _ in members]
    flat = [text for members in texts for text in members]
    sequences = [start + ids for ids in tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"]]
    tokens = np.array([len(ids) - 1 for ids in sequences])
    if (tokens < 1).any():
        index = int(tokens.argmin())
        raise ValueError(
            f"{where[row_of_text[index]]}: in {flat[index][:40]!r} there is no token to predict, since the first has none "
            "before it; leave the row out."
        )
    unpredicted = [0 if start else len(tokenizer.decode(ids[:1])) for ids in sequences]
    # a character of several tokens may begin before the first predicted token
    characters = [max(1, len(text) - first) for text, first in zip(flat, unpredicted, strict=True)]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if (largest := max(map(max, sequences))) >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model has {vocabulary}; the two do not belong together."
        )
    nats = np.zeros(len(flat))
    pieces = [(index, *piece) for index, ids in enumerate(sequences) for piece in _windows(len(ids), width)]
    for batch in tqdm(list(_batches(pieces, batch_tokens)), desc="Reading", unit="batch", disable=None):
        for index, loss in _nats(model, sequences, batch):
            nats[index] += loss
    if not np.isfinite(nats).all():
        index = int(np.isfinite(nats).argmin())
        raise ValueError(f"{where[row_of_text[index]]}: the loss is {nats[index]}; the model's weights may be broken.")
    per_text = [nats, tokens, characters, np.ones(len(flat)), nats / tokens, tokens + 1 > width]
    return RowLosses(*(np.bincount(row_of_text, values) for values in per_text))


def summarise(losses: dict[str, RowLosses], seed: int = SEED, resamples: int = RESAMPLES) -> dict:
    """Scores each set and, if all have the same number of rows, compares each set's rows with the first set's.

    Args:
        losses: of each set, by its name.
        seed: of bootstrap and permutations.
        resamples: the number of bootstrap resamples.

    Returns:
        `sets`: by name `loss` (nats per token, over all tokens of the set), `loss_per_character` (nats), `mean_of_texts`
        (each text's nats per token, averaged over texts), `perplexity` (exp of `loss`), each with its 95% interval, and
        counts. `pairs`: for each set but the first, the mean `difference` of its rows' nats per token from the first set's,
        its interval, the `p_value`, and `share_lower`, the share of rows where it is lower; rows are paired by position.
    """
    sets = {}
    for name, rows in losses.items():
        low, high = row_interval(_scores, rows, resamples, seed, LEVEL)
        sets[name] = {
            **dict(zip(SCORES, _scores(*rows).tolist(), strict=True)),
            **{f"{score}_interval": ends for score, *ends in zip(SCORES, low.tolist(), high.tolist(), strict=True)},
            "rows": len(rows.nats),
            **{field: int(getattr(rows, field).sum()) for field in ("texts", "tokens", "characters", "long_texts")},
        }
    first, *others = losses
    if len({len(rows.nats) for rows in losses.values()}) > 1:
        others = []
    return {"sets": sets, "pairs": [_paired(first, other, losses, seed, resamples) for other in others]}


def table(report: dict) -> str:
    """A report of `compare` as text for the terminal."""
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
            lines.append(f"{row['left_out']:,} rows of {name} were left out, because they have no text in some set.")
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


def _is_causal(model) -> bool:
    """Whether the first token's output is independent of the second token."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[0, 1], [0, 2]]), use_cache=False).logits
    return torch.allclose(logits[0, 0], logits[1, 0], atol=1e-4, equal_nan=True)


def _windows(length: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Yields (start, first predicted position, end) of the windows of a text, so that each position is predicted once."""
    end = min(length, width)
    yield 0, 1, end
    while end < length:
        predicted, end = end, min(length, end + width // 2)
        yield end - width, predicted, end


def _batches(pieces: list[tuple[int, int, int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yields batches of windows of similar length, longest first, so that running out of memory shows at once."""
    pieces = sorted(pieces, key=lambda piece: piece[1] - piece[3])
    while pieces:
        _, start, _, end = pieces[0]
        count = max(1, batch_tokens // (end - start))
        yield pieces[:count]
        pieces = pieces[count:]


def _nats(model, sequences: list[list[int]], batch: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, float]]:
    """Yields, for each window of a batch, the index of its text and the summed loss of its predicted tokens."""
    ids = [torch.tensor(sequences[index][start:end], device=model.device) for index, start, _, end in batch]
    input_ids = pad_sequence(ids, batch_first=True)  # (B, T), right-padded, which no real token of a decoder attends to
    attention_mask = pad_sequence([torch.ones_like(window) for window in ids], batch_first=True)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    # window by window, because a float32 copy of all logits may take gigabytes
    for row, (index, start, predicted, end) in enumerate(batch):
        first, last = predicted - start, end - start
        predictions = logits[row, first - 1 : last - 1].float()
        losses = functional.cross_entropy(predictions, input_ids[row, first:last], reduction="none")
        yield index, losses.double().sum().item()


def _scores(*fields: np.ndarray, axis: int = -1) -> np.ndarray:
    """`SCORES`, from the fields of `RowLosses` with rows along `axis`."""
    sums = RowLosses(*(values.sum(axis) for values in fields))
    loss = sums.nats / sums.tokens
    return np.array([loss, sums.nats / sums.characters, sums.text_means / sums.texts, np.exp(loss)])


def _paired(first: str, second: str, losses: dict[str, RowLosses], seed: int, resamples: int) -> dict:
    differences = losses[second].nats / losses[second].tokens - losses[first].nats / losses[first].tokens
    interval = row_interval(np.mean, [differences], resamples, seed, LEVEL)
    return {
        "first": first,
        "second": second,
        "rows": len(differences),
        "difference": float(differences.mean()),
        "difference_interval": [float(end) for end in interval],
        "p_value": sign_flip_p_value(differences, seed=seed),
        "share_lower": float((differences < 0).mean()),
    }


def _with_interval(numbers: dict, key: str) -> str:
    low, high = numbers[f"{key}_interval"]
    return f"{numbers[key]:.3f} [{low:.3f}, {high:.3f}]"
