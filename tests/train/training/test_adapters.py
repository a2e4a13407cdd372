"""What an adapter was trained in and on comes back, whichever way it is loaded, merged or saved again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_recipe import SMALL
from tiny import tiny_model, tiny_processor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from prefixvlm import AutoModelForVision2Seq, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.cli import main
from prefixvlm.inference.loading import load
from prefixvlm.train.recipes.schema import LoraRecipe, load_recipe
from prefixvlm.train.recipes.stages import Stage
from prefixvlm.train.training import lora, run

peft = pytest.importorskip("peft")

INPUTS = {
    "input_ids": torch.tensor([[1, 1, 1, 1, 9, 8]]),
    "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
}
RATES = {"vision_tower_lr": 0.0, "projector_lr": 1e-2, "language_model_lr": 1e-2}


def write_start(folder: Path) -> Path:
    """A `prefix` model, and rows to train on."""
    tiny_model().save_pretrained(folder / "start")
    tiny_processor().save_pretrained(folder / "start")
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"what {i}?", "answer": f"it is {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_recipe(folder: Path, stages: dict[int, dict], name: str = "out", **values) -> str:
    """A recipe that trains adapters from `folder`/start in `folder`/`name`."""
    stage = {
        "data": {"source": "vqa", "path": str(folder / "rows.jsonl")},
        "batch_size": 4,
        "device_batch_size": 4,
        "max_steps": 3,
        **RATES,
    }
    recipe = {
        "model": {"start": str(folder / "start")},
        "lora": {"r": 4, "dropout": 0.1},
        "save_steps": 2,
        "output": str(folder / name),
        **values,
        "stages": {number: {**stage, **changes} for number, changes in stages.items()},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same model, bit for bit."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and configs[0]["attention_mode"] == configs[1]["attention_mode"]
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`out/stage-2` and `out/stage-3`: adapters trained `causal`, one after the other, from a `prefix` model."""
    folder = write_start(tmp_path_factory.mktemp("trained"))
    causal = {"attention_mode": "causal"}
    run.run_recipe(load_recipe(write_recipe(folder, {2: causal, 3: causal})))
    return folder


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def on_base(folder: Path, **kwargs):
    return peft.PeftModel.from_pretrained(
        PrefixVLMForConditionalGeneration.from_pretrained(base_of(folder)), folder, **kwargs
    )


def load_later(folder: Path):
    model = PrefixVLMForConditionalGeneration.from_pretrained(base_of(folder))
    model.load_adapter(str(folder))
    return model


WAYS = {
    "load": lambda folder: load(str(folder))[0],
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained,
    "AutoModelForVision2Seq": AutoModelForVision2Seq.from_pretrained,
    "load_adapter": load_later,
    "PeftModel": on_base,
    "PeftModel on the meta device": lambda folder: on_base(folder, low_cpu_mem_usage=True),
    "AutoPeftModel": lambda folder: peft.AutoPeftModel.from_pretrained(folder, dtype=torch.float32),
    "AutoPeftModelForCausalLM": lambda folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["adapter", "checkpoint-2"])
def test_an_adapter_loads_in_the_mode_it_was_trained_in(trained, name, way):
    model = WAYS[way](trained / "out" / "stage-3" / name)
    assert model.config.attention_mode == "causal"
    if name == "adapter":
        whole = PrefixVLMForConditionalGeneration.from_pretrained(trained / "out" / "stage-3")
        torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)


def test_an_adapter_loads_in_its_mode_as_remote_code(trained, tmp_path):
    code = """
import sys, torch
sys.modules["prefixvlm"] = None
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, base, result = sys.argv[1:]
auto = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(auto).__module__.startswith("transformers_modules.")
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
on_base = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
on_base = PeftModel.from_pretrained(on_base, folder)
peft = AutoPeftModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
torch.save([model.config.attention_mode for model in (auto, on_base, peft)], result)
"""
    folder = trained / "out" / "stage-3" / "adapter"
    command = [sys.executable, "-c", code, str(folder), base_of(folder), str(tmp_path / "result.pt")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "result.pt") == ["causal"] * 3


def test_an_adapter_on_the_hub_loads_in_its_mode(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--adapter"
    shutil.copytree(trained / "out" / "stage-3" / "adapter", cache / "snapshots" / ("1" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1" * 40)
    assert load("someone/adapter", cache_dir=tmp_path)[0].config.attention_mode == "causal"
    with pytest.raises(ValueError, match="nobody/adapter is not a PrefixVLM that can be loaded"):
        load("nobody/adapter", cache_dir=tmp_path)


@pytest.mark.parametrize("name", [".", "checkpoint-2"])
def test_an_adapter_alone_loads_in_its_mode(tmp_path, name):
    folder = write_start(tmp_path)
    path = write_recipe(folder, {3: {"attention_mode": "prefix_all_images"}}, lora={"r": 4, "merge": False})
    run.run_recipe(load_recipe(path))
    folder = folder / "out" / "stage-3" / name
    assert load(str(folder))[0].config.attention_mode == "prefix_all_images"
    assert on_base(folder).config.attention_mode == "prefix_all_images"


@pytest.mark.parametrize("way", ["PeftModel", "AutoModelForImageTextToText"])
def test_an_adapter_that_is_saved_again_keeps_its_mode(trained, tmp_path, way):
    WAYS[way](trained / "out" / "stage-3" / "adapter").save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert load(str(tmp_path))[0].config.attention_mode == "causal"
    assert on_base(tmp_path).config.attention_mode == "causal"


def test_an_adapter_that_transformers_adds_has_the_mode_of_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.config.attention_mode = "causal"
    model.save_pretrained(tmp_path / "adapter")
    assert AutoModel.from_pretrained(tmp_path / "adapter").config.attention_mode == "causal"
    assert on_base(tmp_path / "adapter").config.attention_mode == "causal"


def test_an_adapter_that_peft_makes_has_the_mode_that_it_is_given(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        auto_mapping={"attention_mode": "causal"},
        target_modules=lora.target_pattern(["language_model"]),
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for way in ("AutoModelForImageTextToText", "PeftModel", "AutoPeftModelForCausalLM"):
        assert WAYS[way](tmp_path / "adapter").config.attention_mode == "causal"


def test_adapters_of_two_modes_do_not_mix(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained / "out" / "stage-3" / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["auto_mapping"]["attention_mode"] = "prefix"
    (other / "adapter_config.json").write_text(json.dumps(config))
    model = on_base(trained / "out" / "stage-3" / "adapter")
    with pytest.raises(
        ValueError, match="cannot have adapters of different attention modes: default in causal and b in prefix"
    ):
        model.load_adapter(other, adapter_name="b")
    model = load_later(trained / "out" / "stage-3" / "adapter")
    with pytest.raises(ValueError, match="different attention modes"):
        model.load_adapter(str(other), adapter_name="b")


def test_a_stage_names_the_model_that_it_was_trained_on(trained):
    assert base_of(trained / "out" / "stage-2" / "adapter") == str(trained / "start")
    assert base_of(trained / "out" / "stage-3" / "adapter") == str(trained / "out" / "stage-2")


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_stage_by_stage_is_as_in_one_run(tmp_path, quantize):
    if quantize:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = write_start(tmp_path)
    settings = {"r": 4, "dropout": 0.1, "quantize": quantize}
    modes = {
        number: {"attention_mode": mode} for number, mode in enumerate(["bidirectional", "prefix", "causal", "prefix"])
    }
    run.run_recipe(load_recipe(write_recipe(folder, modes, "together", lora=settings)))
    alone = load_recipe(write_recipe(folder, modes, "alone", lora=settings))
    for number in range(4):
        run.run_recipe(alone, [number])
    for number in range(4):
        one, other = (folder / name / f"stage-{number}" for name in ("together", "alone"))
        assert same(one, other), number
        weights = [load_file(stage / "adapter" / "adapter_model.safetensors") for stage in (one, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        # each adapter is merged into the model that its stage started from, and nothing else
        start = folder / "start" if number == 0 else folder / "together" / f"stage-{number - 1}"
        base, _ = load(str(start))
        expected = lora.merged(one / "adapter", base)
        saved = PrefixVLMForConditionalGeneration.from_pretrained(one)
        assert saved.config.attention_mode == modes[number]["attention_mode"] == expected.config.attention_mode
        assert not hasattr(saved.config, "quantization_config")
        assert all(torch.equal(value, saved.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_every_stage_trains_on_a_quantised_model(tmp_path, monkeypatch, kind):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    seen = []
    original = Stage.prepare

    def prepare(self, model):
        layer = model.get_base_model().get_decoder().layers[0].mlp.up_proj.base_layer
        seen.append(type(layer).__name__)
        original(self, model)

    monkeypatch.setattr(Stage, "prepare", prepare)
    folder = write_start(tmp_path)
    run.run_recipe(load_recipe(write_recipe(folder, {2: {}, 3: {}}, lora={"r": 4, "quantize": kind})))
    assert seen == [{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]] * 2


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_on_new_weights_leave_those_in_start(tmp_path, quantize):
    if quantize:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    folder = write_start(tmp_path)
    path = write_recipe(folder, {2: {}}, model=SMALL["model"], lora={"r": 2, "quantize": quantize})
    run.run_recipe(load_recipe(path))
    adapter = folder / "out" / "stage-2" / "adapter"
    assert base_of(adapter) == str(folder / "out" / "start")
    assert main(["merge", str(adapter), "--output", str(folder / "whole")]) == 0
    assert same(folder / "whole", folder / "out" / "stage-2")


def test_an_adapter_is_no_start_for_a_stage(trained):
    adapter = trained / "out" / "stage-3" / "adapter"
    path = write_recipe(trained, {3: {}}, "onwards", model={"start": str(adapter)})
    with pytest.raises(
        ValueError, match=f"^{adapter} is an adapter; make a whole model of it first: prefixvlm merge {adapter}"
    ):
        run.run_recipe(load_recipe(path))


def test_adapters_and_a_new_mask_token_do_not_go_together(trained):
    path = write_recipe(trained, {2: {"noise": 0.2, "noise_token": "mask"}}, "noised")
    with pytest.raises(ValueError, match=r"^Stage 2: noise_token: mask would add a token .* an adapter does not hold"):
        run.run_recipe(load_recipe(path))


def test_merge_makes_a_whole_model(trained, tmp_path, capsys):
    stage = trained / "out" / "stage-3"
    assert main(["merge", str(stage / "adapter"), "--output", str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().out == f"Saved to {tmp_path / 'whole'}\n"
    assert same(tmp_path / "whole", stage)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {
        "README.md",
        "modeling_prefix_vlm.py",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
    } <= names
    assert "attention mode `causal`" in (tmp_path / "whole" / "README.md").read_text()
    PrefixVLMProcessor.from_pretrained(tmp_path / "whole")

    assert main(["merge", str(stage / "checkpoint-2"), "--output", str(tmp_path / "earlier")]) == 0
    earlier = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "earlier")
    assert earlier.config.attention_mode == "causal"
    torch.testing.assert_close(logits(earlier), logits(on_base(stage / "checkpoint-2")), rtol=1e-5, atol=1e-5)
    assert not same(tmp_path / "earlier", stage)


def test_merge_keeps_the_precision_of_the_base_model(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    base = PrefixVLMForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    stage = Stage(3, "causal", "conversation", 0.0, 1e-2, 1e-2)
    lora.add_adapters(base, LoraRecipe(r=2), stage).save_pretrained(tmp_path / "adapter")
    for arguments, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        output = tmp_path / str(dtype)
        assert main(["merge", str(tmp_path / "adapter"), "--output", str(output), *arguments]) == 0
        assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {dtype}


def test_merge_takes_another_base_where_the_old_one_has_moved(trained, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "out" / "stage-2" / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "a" / "gone")})
    )
    assert main(["merge", str(adapter), "--output", str(tmp_path / "whole")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"prefixvlm merge: The model that {adapter} was trained on cannot be loaded ({tmp_path / 'a' / 'gone'}"
    )
    assert said.endswith("name it with --base.")
    assert main(["merge", str(adapter), "--output", str(tmp_path / "whole"), "--base", str(trained / "start")]) == 0
    assert same(tmp_path / "whole", trained / "out" / "stage-2")


def truncate(folder: Path) -> None:
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, folder / "adapter_model.safetensors")


def cut_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file(weights | {name: weights[name][:-1].contiguous()}, folder / "adapter_model.safetensors")


def change(key: str, value):
    def apply(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "cannot be put into its base model"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be put into its base model"),
        (lose_a_weight, "does not fit its base model: 1 weights, such as base_model"),
        (cut_a_weight, "cannot be put into its base model"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter: it has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (
            change("base_model_name_or_path", None),
            "does not say which model the adapter was trained on); name it with --base",
        ),
        (lambda folder: change("base_model_name_or_path", str(folder))(folder), "is an adapter too; merge that first"),
        (lambda folder: (folder / "config.json").write_text("{}"), "says that the folder is a whole model); name it with"),
    ],
)
def test_merge_says_what_is_wrong_with_an_adapter(trained, tmp_path, damage, says, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "out" / "stage-3" / "adapter", adapter)
    damage(adapter)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "whole")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prefixvlm merge: ")
    assert says in last
    assert not (tmp_path / "whole").exists()


def test_merge_says_where_the_adapter_is(trained, tmp_path, capsys):
    stage = trained / "out" / "stage-3"
    assert main(["merge", str(stage), "--output", str(tmp_path / "whole")]) == 2
    assert f"it has no adapter_config.json; there is one in {stage / 'adapter'}" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "gone"), "--output", str(tmp_path / "whole")]) == 2
    assert f"{tmp_path / 'gone'}: there is no such file or folder" in capsys.readouterr().err
    assert main(["merge", str(stage / "adapter"), "--output", str(stage)]) == 2
    assert f"{stage} exists; choose another output" in capsys.readouterr().err
    assert main(["merge", str(stage / "adapter"), "--output", str(tmp_path / "w"), "--dtype", "float31"]) == 2
    assert "The dtype is 'float31'; choose one of" in capsys.readouterr().err
