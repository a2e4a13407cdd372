"""Data workers that are spawned, as on macOS and Windows: all that they are given can be pickled."""

import json
import multiprocessing
import pickle

import pytest
import yaml
from PIL import Image
from small_recipe import SMALL
from tiny import tiny_processor, tiny_tokenizer

from prefixvlm.cli import main
from prefixvlm.train.data import ConversationCollator, load

ROWS = 6
SOURCES = {
    "llava": {"path": "llava.jsonl"},
    "vqa": {"path": "vqa.json"},
    "captions": {"path": "captions.jsonl"},
    "karpathy": {"path": "karpathy.json"},
    "mixture": {"parts": [{"source": "vqa", "path": "vqa.json"}, {"source": "llava", "path": "llava.jsonl", "weight": 2}]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "teal"}]
    rows = {
        "llava.jsonl": {"image": "a.png", "conversations": turns},
        "vqa.json": {"image": "a.png", "question": "what?", "answer": "teal"},
        "captions.jsonl": {"image": "a.png", "texts": ["teal", "all teal"]},
        "karpathy.json": {"filename": "a.png", "split": "train", "sentences": [{"raw": "teal"}]},
    }
    for name, row in rows.items():
        content = [{**row, "number": number} for number in range(ROWS)]
        lines = json.dumps({"images": content} if name == "karpathy.json" else content)
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else lines)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_can_be_pickled(folder, source, streaming):
    options = json.loads(json.dumps(SOURCES[source]))
    if streaming and source == "karpathy":
        pytest.skip("Karpathy's files cannot be streamed.")
    for part in options.get("parts", [options]) if streaming else ():
        part["streaming"] = True
    samples = load(source, **options)
    copied = pickle.loads(pickle.dumps(samples))
    assert copied.fingerprint == samples.fingerprint
    pickle.dumps(ConversationCollator(tiny_processor(), "caption", noise=0.2))


@pytest.fixture
def spawned():
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("spawned")
def test_a_run_with_workers(folder, streaming):
    data = {"source": "captions", "path": "captions.jsonl", "streaming": streaming}
    stage = {"data": data, "batch_size": 2, "device_batch_size": 2, "max_steps": 2}
    values = {"model": {**SMALL["model"], "tokenizer": "tokenizer"}, "stages": {0: stage}, "workers": 1, "output": "out"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "recipe.yaml"]) == 0
    assert json.loads((folder / "out" / "stage-0" / "run.json").read_text())["steps"] == 2
