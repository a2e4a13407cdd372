"""The pretrained halves: every weight under its name, nothing kept that is of no use, nothing half-converted."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from evidence.real import halves

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def node(op_type: str, inputs: list[str], output: str) -> SimpleNamespace:
    return SimpleNamespace(op_type=op_type, input=inputs, output=[output])


def exported(encoder: Dinov2Model) -> SimpleNamespace:
    """The graph of an encoder as the exporter writes it, as far as names go."""
    constants, nodes = {}, []
    state = encoder.state_dict()
    positions = state.pop("embeddings.position_embeddings")
    del state["embeddings.mask_token"]
    constants |= {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:]}
    for number, (name, value) in enumerate(state.items()):
        bias = name.removesuffix(".weight") + ".bias"
        if name.endswith(".weight") and value.ndim == 2:
            matrix = f"onnx::MatMul_{number}"
            constants[matrix] = value.T
            nodes.append(node("MatMul", ["features", matrix], f"product {number}"))
            nodes.append(node("Add", [f"backbone.{bias}", f"product {number}"], f"sum {number}"))
        else:
            constants[f"backbone.{name}"] = value
    nodes.append(node("MatMul", ["queries", "keys"], "scores"))  # without weights
    tensors = [SimpleNamespace(name=name, value=value.numpy()) for name, value in constants.items()]
    return SimpleNamespace(initializer=tensors, node=nodes)


@pytest.fixture
def onnx(monkeypatch) -> ModuleType:
    """As much of the package as conversion needs, which tests do without."""
    fake = ModuleType("onnx")
    fake.numpy_helper = SimpleNamespace(to_array=lambda tensor: tensor.value)
    monkeypatch.setitem(sys.modules, "onnx", fake)
    return fake


@pytest.fixture
def encoder() -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))


def test_every_weight_of_the_graph_gets_its_name(onnx, encoder, tmp_path, monkeypatch):
    onnx.load = lambda file: SimpleNamespace(graph=exported(encoder))
    monkeypatch.setattr(halves, "_difference", lambda encoder, graph: 1e-5)
    assert halves.convert_encoder(Path("x.onnx"), tmp_path) == {"largest_difference": 1e-5}
    loaded = Dinov2Model.from_pretrained(tmp_path)
    assert loaded.config.image_size == 518
    for name, value in encoder.state_dict().items():
        if name != "embeddings.mask_token":
            assert torch.equal(value, loaded.state_dict()[name]), name


def test_an_encoder_that_differs_from_its_graph_is_refused(onnx, encoder, tmp_path, monkeypatch):
    onnx.load = lambda file: SimpleNamespace(graph=exported(encoder))
    for difference in (0.5, float("nan")):
        monkeypatch.setattr(halves, "_difference", lambda encoder, graph, difference=difference: difference)
        with pytest.raises(ValueError, match="differs from the graph by"):
            halves.convert_encoder(Path("x.onnx"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_graph_of_another_encoder_is_refused(onnx, tmp_path):
    other = Dinov2Model(Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    onnx.load = lambda file: SimpleNamespace(graph=exported(other))
    with pytest.raises(ValueError, match=r"x\.onnx does not have the weights of a ViT-S/14"):
        halves.convert_encoder(Path("x.onnx"), tmp_path)


def as_read() -> PreTrainedTokenizerFast:
    """A tokenizer as transformers reads it from the GGUF file: one of Llama's, which begins every text."""
    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_tokenizer_is_as_published(tmp_path):
    halves.smollm2_tokenizer(as_read()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("a  1234\n\u2581b")["input_ids"]) == "a  1234\n\u2581b"  # nothing put before
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12")]
    assert pieces == ["a", "1", "2"]


def test_a_decoder_that_does_not_know_paris_is_refused(tmp_path, monkeypatch):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **options: decoder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *given, **options: as_read())
    with pytest.raises(ValueError, match="goes on from 'The capital of France is' with"):
        halves.convert_decoder(Path("x.gguf"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with converters that write one file; returns which were called, and the exit status."""

    def run(fail_at: str = "") -> tuple[list[str], int]:
        called = []

        def convert(name: str, file, folder: Path) -> dict:
            called.append(name)
            (folder / "weights").write_text(name)
            if name == fail_at:
                raise ValueError("it is of no use")
            return {}

        monkeypatch.setattr(halves, "carried", lambda package, file: Path(file))
        monkeypatch.setattr(halves, "version", lambda package: "1.0")
        monkeypatch.setattr(halves, "convert_encoder", lambda *given: convert("encoder", *given))
        monkeypatch.setattr(halves, "convert_decoder", lambda *given: convert("decoder", *given))
        monkeypatch.setattr(sys, "argv", ["halves", str(tmp_path)])
        return called, halves.main()

    return run


def test_a_conversion_that_broke_off_is_done_again_and_a_whole_one_is_kept(command, tmp_path, capsys):
    assert command(fail_at="decoder") == (["encoder", "decoder"], 1)
    assert capsys.readouterr().err == "python -m evidence.real.halves: it is of no use\n"
    assert not (tmp_path / "smollm2").exists()
    assert command() == (["decoder"], 0)
    assert command() == ([], 0)


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="The package no-such-package is not installed"):
        halves.carried("no-such-package", "x")
