"""A saved folder is a complete Hub repository: it loads, and works the same, where this package is not installed."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments
from travelling import CODE

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.configuration.configuration_prefix_vlm import AUTO_MAP

DATA = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
VERSION_OWN = {"special_tokens_map.json"}  # 4.x alone
LORA = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)


def train(model, processor, output, steps: int):
    """Plain transformers training, with a checkpoint at each step."""
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (9, 9), "red")}]}]
    messages.append({"role": "assistant", "content": "red"})

    def collate(rows):
        return dict(
            processor.apply_chat_template(
                [messages] * len(rows),
                tokenize=True,
                return_dict=True,
                return_labels=True,
                return_tensors="pt",
                padding=True,
            )
        )

    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[0] * 8, data_collator=collate, processing_class=processor)
    trainer.train()


@pytest.fixture(scope="module")
def world(tmp_path_factory, run_clean, measure, photo):
    """Everything saved here, and what this process and the clean ones say of it."""
    root = tmp_path_factory.mktemp("saved")
    folders = {name: root / name for name in ("final", "sharded", "merged", "adapter", "resaved", "user-repo")}
    processor = tiny_processor()
    model = tiny_model()
    reference = {"final": measure(model, processor, photo)}
    for name, options in (("final", {}), ("sharded", {"max_shard_size": "100KB"})):
        model.save_pretrained(folders[name], **options)
        processor.save_pretrained(folders[name])

    train(model, processor, root / "training", steps=2)
    folders["checkpoint"] = root / "training" / "checkpoint-1"
    load = PrefixVLMForConditionalGeneration.from_pretrained
    reference["checkpoint"] = measure(load(folders["checkpoint"], dtype=torch.float32), processor, photo)

    adapted = get_peft_model(load(folders["final"], dtype=torch.float32), LORA)
    train(adapted, processor, root / "adapting", steps=1)
    adapted.eval()
    adapted.save_pretrained(folders["adapter"])
    reference["adapter"] = measure(adapted, processor, photo)
    merged = adapted.merge_and_unload()
    reference["merged"] = measure(merged, processor, photo)
    merged.save_pretrained(folders["merged"])
    processor.save_pretrained(folders["merged"])

    shutil.copytree(folders["final"], folders["user-repo"])
    Image.open(photo).convert("RGB").save(folders["user-repo"] / "photo.jpg")

    names = {name: str(folder) for name, folder in folders.items()}
    first = run_clean(
        {
            "folders": {name: names[name] for name in ("final", "sharded", "checkpoint", "merged")},
            "every_auto_class": names["final"],
            "pipeline": names["final"],
            "resave": {"from": names["final"], "to": names["resaved"]},
        }
    )
    second = run_clean(
        {
            "blocked": ["prefixvlm", "datasets", "matplotlib"],
            "folders": {"resaved": names["resaved"]},
            "every_auto_class": names["resaved"],
            "adapter": {"base": names["final"], "folder": names["adapter"]},
            "card": names["user-repo"],
            "repository": names["final"],
        }
    )
    reference["resaved"] = reference["sharded"] = reference["repository"] = reference["final"]
    return SimpleNamespace(root=root, folders=folders, reference=reference, first=first, second=second)


@pytest.mark.parametrize("name", ["final", "repository", "sharded", "checkpoint", "merged", "resaved", "adapter"])
def test_a_clean_process_sees_the_same_model(world, name):
    here, there = world.reference[name], {**world.first, **world.second}[name]
    assert here.keys() == there.keys()
    assert torch.equal(here["input_ids"], there["input_ids"])
    assert torch.equal(here["attention_mask"], there["attention_mask"])
    assert torch.equal(here["pixel_values"], there["pixel_values"])
    valid = here["attention_mask"].bool()
    torch.testing.assert_close(there["logits"][valid], here["logits"][valid], rtol=0, atol=1e-6)
    assert torch.equal(here["generated"], there["generated"])
    assert here["answers"] == there["answers"]


def test_the_folders_are_of_different_models(world):
    """Otherwise the test above could pass with the first weights for all."""
    logits = [world.reference[name]["logits"][0, -1] for name in ("final", "checkpoint", "adapter")]
    for i in range(3):
        assert not torch.allclose(logits[i], logits[i - 1], atol=1e-3)
    torch.testing.assert_close(world.reference["merged"]["logits"][0, -1], logits[2], rtol=0, atol=1e-3)
    assert len(set(world.reference["final"]["answers"])) == 2


@pytest.mark.parametrize("process", ["first", "second"])
def test_every_auto_class_loads(world, process):
    expected = {name: reference.rsplit(".")[-1] for name, reference in AUTO_MAP.items() if hasattr(transformers, name)}
    assert len(expected) >= 5
    assert getattr(world, process)["loaded"] == expected


def test_the_pipeline_answers_as_the_model_does(world):
    assert world.first["pipeline"] == world.reference["final"]["answers"]


def test_the_code_of_the_model_card_runs(world):
    question = [
        {"type": "image", "path": world.folders["user-repo"] / "photo.jpg"},
        {"type": "text", "text": "What is this?"},
    ]
    inputs = tiny_processor().apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(world.second["card"], tiny_model().generate(**inputs, max_new_tokens=64))


@pytest.mark.parametrize("name", ["final", "merged", "resaved"])
def test_what_is_in_a_folder(world, name):
    found = {str(path.relative_to(world.folders[name])) for path in world.folders[name].rglob("*")} - VERSION_OWN
    # who re-saves without this package has no card to fill in
    assert found == CODE | DATA - ({"README.md"} if name == "resaved" else set())


def test_what_is_in_a_checkpoint(world):
    found = {str(path.relative_to(world.folders["checkpoint"])) for path in world.folders["checkpoint"].rglob("*")}
    assert found >= CODE | DATA


def test_a_sharded_folder_has_only_safetensors(world):
    names = {path.name for path in world.folders["sharded"].iterdir()} - VERSION_OWN - CODE - DATA
    assert "model.safetensors.index.json" in names
    shards = sorted(names - {"model.safetensors.index.json"})
    assert len(shards) > 1
    assert all(re.fullmatch(r"model-0000\d-of-0000\d\.safetensors", shard) for shard in shards)


@pytest.mark.parametrize("name", ["final", "checkpoint", "merged", "sharded", "resaved"])
def test_the_configuration_names_the_code_of_the_folder(world, name):
    config = json.loads((world.folders[name] / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["model_type"] == "prefix_vlm"
    assert config["architectures"] == ["PrefixVLMForConditionalGeneration"]
    for reference in config["auto_map"].values():
        module, name_of_class = reference.split(".")
        assert f"class {name_of_class}(" in (world.folders[name] / f"{module}.py").read_text()
    processor = json.loads((world.folders[name] / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}


@pytest.mark.parametrize("name", ["final", "checkpoint", "merged", "sharded", "resaved"])
def test_no_file_tells_of_the_machine_it_was_written_on(world, name):
    for path in world.folders[name].iterdir():
        if path.suffix in (".json", ".py", ".md", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert str(world.root) not in text, path.name
            assert "/tmp" not in text, path.name


def test_weights_are_saved_once_and_under_the_same_names_everywhere(world):
    """Names of 4.x and 5.x alike, and no second copy of the tied head."""
    names = set(load_file(world.folders["final"] / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"vision_tower", "projector", "language_model"}
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert not any("lm_head" in name for name in names)


def test_the_card_has_the_figures_of_the_model(world):
    card = (world.folders["final"] / "README.md").read_text()
    model = tiny_model()
    for count in (
        sum(p.numel() for p in model.parameters()),
        *(
            sum(p.numel() for p in part.parameters())
            for part in (model.vision_tower, model.projector, model.language_model)
        ),
    ):
        assert f" {count:,} |" in card
    assert "2 layers of 32, images of 16 x 16" in card
    assert "2 layers of 48" in card
    assert "4 tokens an image, attention mode `prefix`" in card
    assert "`siglip_vision_model`" in card
    assert "`qwen2`" in card
    assert not re.search(r"\{\w*\}|\{\{|\}\}", card)
    metadata = card.split("---\n")[1]
    assert "library_name: transformers\npipeline_tag: image-text-to-text\n" in metadata


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_it_loads_back_here_too(world, measure, photo):
    """With the package installed no `trust_remote_code` is needed."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(world.folders["resaved"], dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(world.folders["resaved"])
    assert type(model) is PrefixVLMForConditionalGeneration
    assert type(processor) is PrefixVLMProcessor
    torch.testing.assert_close(measure(model, processor, photo)["logits"], world.reference["final"]["logits"])
    base = PrefixVLMForConditionalGeneration.from_pretrained(world.folders["resaved"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, world.folders["adapter"])
    torch.testing.assert_close(measure(adapted, processor, photo)["logits"], world.reference["adapter"]["logits"])
