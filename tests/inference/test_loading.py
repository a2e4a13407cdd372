"""Loading: on the device that is there, from the disk before the network, with transformers' own options."""

import pytest
import torch
from tiny import tiny_model, tiny_processor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

from prefixvlm import PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.inference import environment, loading
from prefixvlm.inference.environment import bf16_note, choose_device, fast_dtype
from prefixvlm.inference.loading import load, refuse_missing_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_first_device_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert choose_device().type == expected


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ValueError, match=r"device .* cannot be used here|The device is"):
        choose_device(name)


def test_bfloat16_where_it_is_fast(monkeypatch):
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, here=here: here)
        assert fast_dtype(torch.device("cuda")) == (torch.bfloat16 if here else torch.float32)
    for product in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(environment, "product_dtype", lambda dtype, device, product=product: product)
        assert fast_dtype(torch.device("cpu")) == product
        assert (bf16_note(torch.device("cpu")) is None) is (product == torch.bfloat16)
    assert bf16_note(torch.device("cuda")) is None
    assert fast_dtype(torch.device("mps")) == torch.float32


def test_the_default_dtype_is_the_fast_one(saved, monkeypatch):
    monkeypatch.setattr(loading, "fast_dtype", lambda device: torch.bfloat16)
    assert load(saved, dtype=None, device=torch.device("cpu"))[0].dtype == torch.bfloat16
    assert load(saved)[0].dtype == torch.float32


def test_a_loaded_model_stops_where_its_tokenizer_says(saved):
    """Whoever made and saved it from a configuration has told it nothing of turns."""
    assert PrefixVLMForConditionalGeneration.from_pretrained(saved).generation_config.eos_token_id == 0
    model, processor = load(saved)
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]


def test_transformers_own_options_reach_it(saved, monkeypatch):
    seen = []
    hub = {"revision": "draft", "token": "secret", "cache_dir": "/tmp/cache"}
    for owner in (PrefixVLMForConditionalGeneration, PrefixVLMProcessor):
        real = owner.from_pretrained

        def from_pretrained(name, real=real, **options):
            seen.append(options)
            return real(name, **{key: value for key, value in options.items() if key not in hub})

        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)
    load(saved, device_map="cpu", **hub)
    of_the_model, of_the_processor = seen
    assert of_the_model.items() >= (hub | {"device_map": "cpu"}).items()
    assert of_the_processor.items() == hub.items()


@pytest.mark.parametrize("name", ["/nope", "./nope", "no/such/model", "../nope", "nope/", "C:\\nope", "a\\b"])
def test_a_path_that_leads_to_nothing_is_refused_without_the_network(name):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        refuse_missing_path(name)


@pytest.mark.parametrize("name", ["someone/model", "gpt2", "google/siglip-so400m-patch14-224"])
def test_what_may_be_a_hub_id_is_asked_for(name):
    assert refuse_missing_path(name) is None


def test_a_folder_without_configuration_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="is not a PrefixVLM"):
        load(str(tmp_path))


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("halves"), tiny_model()
    model.vision_tower.save_pretrained(folder / "vision") if hasattr(model.vision_tower, "save_pretrained") else (
        model.vision_tower.vision_model.save_pretrained(folder / "vision")
    )
    model.language_model.save_pretrained(folder / "text")
    tiny_processor().tokenizer.save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def test_transformers_own_options_reach_both_backbones(halves, monkeypatch):
    seen = {}
    hub = {"revision": "draft", "token": "secret", "cache_dir": "/tmp/cache"}
    for owner in (AutoConfig, AutoTokenizer, AutoModelForCausalLM, SiglipVisionModel):

        def from_pretrained(name, real=owner.from_pretrained, of=owner.__name__, **options):
            seen.setdefault((of, name), options)
            return real(name, **{key: value for key, value in options.items() if key not in hub})

        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)
    vision, text = halves
    PrefixVLMForConditionalGeneration.from_backbones(vision, text, device_map="cpu", **hub)
    of_weights = [("SiglipVisionModel", vision), ("AutoModelForCausalLM", text)]
    for call in (("AutoConfig", vision), ("AutoConfig", text), ("AutoTokenizer", text), *of_weights):
        assert seen[call].items() >= hub.items(), call
    assert all(seen[call]["device_map"] == "cpu" for call in of_weights)
