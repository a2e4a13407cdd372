"""Rows of many images, and the command that measures one amount of them."""

import json
import sys

import torch
from tiny import tiny_config, tiny_model

from benchmarks import images
from benchmarks.common import Setup


def test_each_image_is_followed_by_words_that_are_its_labels():
    made = images.row(image_token_id=7, images=3, device="cpu")
    is_image = made["input_ids"] == 7
    assert is_image[0].tolist() == ([True] * 256 + [False] * 32) * 3
    assert torch.equal(made["labels"] == -100, is_image)


def test_one_amount_is_measured_in_both_ways(monkeypatch, capsys):
    monkeypatch.setattr(images, "PATCHES", 4)
    monkeypatch.setattr(images, "WORDS", 3)
    monkeypatch.setattr(images.common, "prompt", lambda image, count, words, device: {"input_ids": prompt(count, words)})
    monkeypatch.setattr(images.common, "pixels", lambda setup, count, *_: torch.randn(count, 3, 16, 16))
    monkeypatch.setattr(images.common, "prefix_vlm", lambda setup, depth: tiny_model())
    monkeypatch.setattr(sys, "argv", ["images", "2", "0.0", "cpu", "float32"])
    images.main()
    found = json.loads(capsys.readouterr().out)
    for kind in ("prefill", "training"):
        assert len(found[kind]["seconds"]) == images.ROUNDS
        assert found[kind]["peak_bytes"] > 0


def prompt(count: int, words: int) -> torch.Tensor:
    return torch.tensor([[tiny_config().image_token_id] * count + [9] * words])


def test_the_results_have_time_and_memory_by_amount(monkeypatch):
    fake = {"seconds": [1.0, 2.0, 3.0], "peak_bytes": 2**30}
    monkeypatch.setattr(images.common, "in_process", lambda module, count, *_: {"prefill": fake, "training": fake})
    monkeypatch.setattr(images.common, "gemm_rate", lambda setup: 1e9)
    results = images.run(Setup(torch.device("cpu"), torch.float32, seconds=1e-9))
    assert [result["measurement"] for result in results] == [
        "cost by images in a row, prefill",
        "cost by images in a row, training",
    ]
    for result in results:
        assert result["amounts"] == list(images.IMAGES)
        assert result["peak_gib"] == [1.0] * 4
        assert result["gflop"] == sorted(result["gflop"])
