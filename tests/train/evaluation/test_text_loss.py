"""Losses of texts: as computed one text at a time, whatever the batch; and every bad input in one line."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, Qwen2ForSequenceClassification

from prefixvlm.cli import main
from prefixvlm.train.evaluation import text_loss as module
from prefixvlm.train.evaluation.text_loss import (
    RowLosses,
    load_language_model,
    summarise,
    text_loss,
)

TEXTS = [["a man in a kitchen"], ["two", "a café, with people", "three dogs run"], ["x" * 70], ["in the end it rained"]]
TOKENIZER = tiny_tokenizer()


def language_model(seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config().text_config).eval()


def tokenizer_with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def by_hand(model, tokenizer, text: str) -> tuple[float, int]:
    """Summed loss and predicted tokens of one text, in one forward pass without padding or mask."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([start + tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tokenizer_with_bos()], ids=["no bos", "bos"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_sums_are_those_of_one_text_at_a_time(tokenizer, batch_tokens):
    model = language_model()
    found = text_loss(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
    for row, texts in enumerate(TEXTS):
        nats, tokens = zip(*(by_hand(model, tokenizer, text) for text in texts), strict=True)
        assert found.nats[row] == pytest.approx(sum(nats), rel=1e-5)
        assert found.tokens[row] == sum(tokens)
        assert found.text_means[row] == pytest.approx(sum(n / t for n, t in zip(nats, tokens, strict=True)), rel=1e-5)
        assert found.texts[row] == len(texts)
        first = 0 if tokenizer.bos_token else 1  # letters of one byte stand at each text's start
        assert found.characters[row] == sum(len(text) - first for text in texts)


# a control token is one token however long; its name is a text that hypothesis tries, too
SEVERAL_TOKENS = st.text(min_size=2, max_size=40).filter(lambda text: len(TOKENIZER(text)["input_ids"]) > 1)


@settings(max_examples=20, deadline=None)
@given(st.lists(SEVERAL_TOKENS, min_size=1, max_size=9), st.integers(1, 300))
def test_a_text_has_the_loss_it_has_alone(texts, batch_tokens):
    model = language_model()
    together = text_loss(model, TOKENIZER, [[text] for text in texts], batch_tokens=batch_tokens)
    alone = [text_loss(model, TOKENIZER, [[text]]).nats[0] for text in texts]
    np.testing.assert_allclose(together.nats, alone, rtol=1e-5)


@given(st.integers(2, 60), st.integers(2, 20))
def test_windows_predict_each_position_once_with_half_a_window_before_it(length, width):
    predicted = []
    for start, first, end in module._windows(length, width):
        assert 0 <= start < first < end <= length
        assert end - start <= width
        assert start == 0 or first - start >= width - width // 2
        predicted += range(first, end)
    assert predicted == list(range(1, length))


def test_a_text_longer_than_the_window_is_read_in_halves():
    model, text = language_model(), "the quick brown fox"
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    expected = 0.0
    for start, first in ((0, 1), (4, 8), (8, 12), (11, 16)):
        with torch.no_grad():
            logits = model(input_ids=ids[:, start : start + 8]).logits[0]
        targets = ids[0, first : start + 8]
        expected += functional.cross_entropy(logits[first - start - 1 : -1], targets, reduction="sum").item()
    found = text_loss(model, TOKENIZER, [[text], ["short"]], max_tokens=8)
    assert found.nats[0] == pytest.approx(expected, rel=1e-5)
    assert found.tokens[0] == len(text) - 1
    assert found.long_texts.tolist() == [1, 0]


def test_the_window_is_the_models_context_and_not_more():
    model = language_model()
    assert module.window(model) == 512
    for wrong in (1, 513):
        with pytest.raises(ValueError, match="from 2 to 512"):
            module.window(model, wrong)
    model.config.max_position_embeddings = 100_000
    assert module.window(model) == module.MAX_TOKENS


@pytest.mark.parametrize("mode", ["prefix", "bidirectional"])
def test_a_prefix_vlm_reads_text_as_its_decoder_does(mode):
    model = tiny_model(mode)
    inner = text_loss(model.language_model, TOKENIZER, TEXTS)
    np.testing.assert_array_equal(text_loss(model, TOKENIZER, TEXTS).nats, inner.nats)
    assert inner.nats[0] == pytest.approx(by_hand(model.language_model, TOKENIZER, TEXTS[0][0])[0], rel=1e-5)


def test_dropout_is_off():
    model = tiny_model()
    model.language_model.config.attention_dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = [text_loss(model.train(), TOKENIZER, TEXTS).nats for _ in range(2)]
    np.testing.assert_array_equal(*found)


def losses(nats, tokens=None, texts=1) -> RowLosses:
    nats = np.array(nats, dtype=float)
    tokens = np.ones_like(nats) if tokens is None else np.array(tokens)
    return RowLosses(nats, tokens, 4 * tokens, np.full(len(nats), texts), nats / tokens, np.zeros(len(nats), dtype=int))


def test_numbers_of_a_set_known_by_hand():
    numbers = summarise({"a": losses([2.0, 12.0], [2, 3])})["sets"]["a"]
    assert numbers["loss"] == pytest.approx(14 / 5)
    assert numbers["loss_per_character"] == pytest.approx(14 / 20)
    assert numbers["mean_of_texts"] == pytest.approx((1 + 4) / 2)
    assert numbers["perplexity"] == pytest.approx(np.exp(14 / 5))
    assert (numbers["rows"], numbers["texts"], numbers["tokens"], numbers["characters"]) == (2, 2, 5, 20)
    # two rows: a quarter of the draws holds only the first, and a quarter only the second
    assert numbers["loss_interval"] == pytest.approx([1, 4])
    assert numbers["perplexity_interval"] == pytest.approx([np.exp(1), np.exp(4)])


def test_the_interval_has_the_width_of_the_standard_error():
    nats = np.random.default_rng(3).normal(5, 1, 400)
    low, high = summarise({"a": losses(nats)})["sets"]["a"]["loss_interval"]
    assert low < nats.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * nats.std() / 20, rel=0.1)


def test_pairs_known_by_hand():
    report = summarise({"human": losses([1, 2, 3, 4]), "ai": losses([0.5, 1.5, 2.5, 3.5]), "tied": losses([0, 1, 3, 4])})
    ai, tied = report["pairs"]
    assert (ai["first"], ai["second"], ai["rows"]) == ("human", "ai", 4)
    assert ai["difference"] == pytest.approx(-0.5)
    assert ai["difference_interval"] == pytest.approx([-0.5, -0.5])
    assert ai["share_lower"] == 1
    assert ai["p_value"] == pytest.approx(2 / 16, abs=0.02)  # all four signs alike
    assert tied["difference"] == pytest.approx(-0.5)
    assert tied["share_lower"] == 0.5  # a tie is not lower
    assert tied["p_value"] == pytest.approx(1 / 2, abs=0.02)  # two signs alike


def test_a_row_is_paired_by_its_mean_over_tokens():
    (pair,) = summarise({"a": losses([10, 10], [5, 2]), "b": losses([9, 8], [3, 8])})["pairs"]
    assert pair["difference"] == pytest.approx(((3 - 2) + (1 - 5)) / 2)


def test_sets_of_other_lengths_are_not_paired():
    assert summarise({"a": losses([1, 2]), "b": losses([1, 2, 3])})["pairs"] == []


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models good and bad, and files good and bad."""
    folder = tmp_path_factory.mktemp("text_loss")
    language_model().save_pretrained(folder / "lm")
    tiny_model().save_pretrained(folder / "vlm")
    tiny_processor().save_pretrained(folder / "vlm")
    text_config = tiny_config().text_config
    text_config.tie_word_embeddings = False  # else the embeddings would make it a language model
    Qwen2ForSequenceClassification(text_config).save_pretrained(folder / "classifier")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=264, **sizes)).save_pretrained(folder / "bert")
    tiny_config().vision_config.save_pretrained(folder / "vision")
    text_config.vocab_size = 100
    AutoModelForCausalLM.from_config(text_config).save_pretrained(folder / "small")
    for name in ("lm", "classifier", "bert", "vision", "small"):
        TOKENIZER.save_pretrained(folder / name)
    language_model().save_pretrained(folder / "no_tokenizer")
    broken = language_model()
    broken.model.norm.weight.data[0] = torch.nan
    broken.save_pretrained(folder / "nan")
    TOKENIZER.save_pretrained(folder / "nan")
    rows = [{"human": ["a dog", "the dog"], "machine": {"a.b": "a dog runs", "n": 7}, "blank": " "} for _ in range(3)]
    write(folder / "rows.jsonl", rows)
    write(folder / "hole.jsonl", [*rows, {"ai": "no human"}])
    write(folder / "letter.jsonl", [{"text": "many"}, {"text": "a"}])
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "broken.json").write_text('[{"text": "fine"}')
    (folder / "object.json").write_text('{"text": "fine"}')
    (folder / "list.jsonl").write_text('["text"]')
    (folder / "empty.txt").write_text("\n \n")
    (folder / "empty_list.jsonl").write_text('{"text": []}')
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "plain.txt").write_text("a dog\n")
    (folder / "table.csv").write_text("text\nfine\n")
    return folder


@pytest.mark.parametrize("name", ["lm", "vlm"])
def test_the_command_reports_and_writes(saved, tmp_path, capsys, name):
    sets = [f"human={saved}/rows.jsonl:human", f"ai={saved}/rows.jsonl:machine.a.b"]
    arguments = ["text-loss", "--model", f"{saved}/{name}", "--text", sets[0], "--text", sets[1], "--max-tokens", "6"]
    assert main([*arguments, "--output", str(tmp_path / "new" / "out")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "new/out/text_loss.json").read_text())
    model, tokenizer = load_language_model(f"{saved}/{name}")
    nats = text_loss(model, tokenizer, [["a dog", "the dog"]], max_tokens=6).nats[0]
    assert report["sets"]["human"]["loss"] == pytest.approx(nats / 10, rel=1e-5)
    assert report["sets"]["human"] | {"rows": 3, "texts": 6, "tokens": 30, "long_texts": 3} == report["sets"]["human"]
    assert report["sets"]["ai"]["key"] == "machine.a.b"
    assert (report["seed"], report["max_tokens"], report["first_token"]) == (0, 6, "not counted")
    assert report["versions"].keys() == {"torch", "transformers", "python"}
    assert report["pairs"][0]["rows"] == 3
    assert f"{report['sets']['ai']['loss']:.3f}" in out
    assert "3 of 6 texts of human are longer than 6 tokens" in out
    for file in ("text_loss.json", "text_loss.png"):
        assert f"Saved to {tmp_path / 'new' / 'out' / file}" in out
    with Image.open(tmp_path / "new/out/text_loss.png") as figure:
        assert figure.width > 500
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["text_loss.json", "text_loss.png"]
    assert main(arguments) == 0
    assert "Saved" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "texts", "words"),
    [
        ("lm", ["rows.jsonl:human"], ["NAME"]),
        ("lm", ["=x.txt"], ["NAME"]),
        ("lm", ["a="], ["NAME"]),
        ("lm", ["a={0}/nothing.jsonl:human"], ["--text a", "no file", "nothing.jsonl"]),
        ("lm", ["a={0}"], ["--text a", "no file"]),
        ("lm", ["a={0}/table.csv"], ["table.csv", ".jsonl"]),
        ("lm", ["a={0}/plain.txt:human"], ["plain.txt", "keys", "human"]),
        ("lm", ["a={0}/latin.txt"], ["latin.txt", "UTF-8"]),
        ("lm", ["a={0}/broken.jsonl"], ["broken.jsonl, row 2", "JSON"]),
        ("lm", ["a={0}/broken.json"], ["broken.json", "JSON"]),
        ("lm", ["a={0}/object.json"], ["object.json", "list"]),
        ("lm", ["a={0}/list.jsonl"], ["list.jsonl, row 1", "object"]),
        ("lm", ["a={0}/hole.jsonl:human"], ["hole.jsonl, row 4", "'human'", "ai"]),
        ("lm", ["a={0}/rows.jsonl:machine.b"], ["rows.jsonl, row 1", "'machine.b'"]),
        ("lm", ["a={0}/rows.jsonl:machine.n"], ["rows.jsonl, row 1", "'machine.n'", "7"]),
        ("lm", ["a={0}/rows.jsonl:machine"], ["rows.jsonl, row 1", "neither a text"]),
        ("lm", ["a={0}/rows.jsonl:blank"], ["rows.jsonl", "no text"]),
        ("lm", ["a={0}/empty.txt"], ["empty.txt", "no text"]),
        ("lm", ["a={0}/empty_list.jsonl"], ["empty_list.jsonl", "no text"]),
        ("lm", ["a={0}/letter.jsonl"], ["letter.jsonl, row 2", "no token to predict"]),
        ("lm", ["a={0}/plain.txt", "a={0}/rows.jsonl:human"], ["two sets", "'a'"]),
        ("nothing", ["a={0}/plain.txt"], ["nothing: there is no such file or folder"]),
        ("vision", ["a={0}/plain.txt"], ["vision cannot be loaded as a language model"]),
        ("no_tokenizer", ["a={0}/plain.txt"], ["no_tokenizer cannot be loaded as a language model"]),
        ("classifier", ["a={0}/plain.txt"], ["classifier", "lacks weights"]),
        ("bert", ["a={0}/plain.txt"], ["bert", "later tokens"]),
        ("small", ["a={0}/plain.txt"], ["token", "100", "the two do not belong together"]),
        ("nan", ["a={0}/plain.txt"], ["plain.txt, line 1", "nan"]),
        ("lm", ["a={0}/plain.txt", "--max-tokens=1"], ["max_tokens is 1"]),
        ("lm", ["a={0}/plain.txt", "--output={0}/plain.txt"], ["plain.txt"]),
    ],
)
def test_bad_input_is_one_line_that_says_what_and_where(saved, capfd, model, texts, words):
    arguments = [text if text.startswith("--") else f"--text={text}" for text in texts]
    assert main(["text-loss", "--model", f"{saved}/{model}", *[text.format(saved) for text in arguments]]) == 2
    captured = capfd.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("prefixvlm text-loss: ")]
    assert not captured.out
    assert "Traceback" not in captured.err
    for word in words:
        assert word in line


def test_no_texts_in_memory_are_refused_too():
    with pytest.raises(ValueError, match="no text"):
        text_loss(language_model(), TOKENIZER, [])
    with pytest.raises(ValueError, match="row 2"):
        text_loss(language_model(), TOKENIZER, [["fine"], []])


def test_without_matplotlib_the_plot_says_what_to_install_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["text-loss", "--model", f"{saved}/lm", "--text", f"a={saved}/plain.txt"]
    assert main(arguments) == 0
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "pip install 'prefixvlm[train]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_scipy_what_to_install_is_said_before_the_work(saved, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for loaded in (module.__name__, "prefixvlm.train.evaluation.row_statistics"):
        monkeypatch.delitem(sys.modules, loaded)
    assert main(["text-loss", "--model", f"{saved}/lm", "--text", f"a={saved}/plain.txt"]) == 2
    err = capfd.readouterr().err
    assert "pip install 'prefixvlm[eval]'" in err
    assert "Reading" not in err


def test_a_model_without_a_stated_context_has_a_window_too():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert module.window(model) == module.MAX_TOKENS
    assert module.window(model, 9999) == 9999
