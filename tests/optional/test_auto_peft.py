"""peft's AutoPeftModel opens adapters together with the model below them, once it may import that model's code."""

import subprocess
import sys

import pytest
from tiny import tiny_model, tiny_processor

pytest.importorskip("peft", reason="peft is not installed; pip install peft")

pytestmark = pytest.mark.slow

# both in processes that do not have us, as people's own are
MAKES = """
import sys, torch
sys.modules["prefixvlm"] = None
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
base, adapter = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
adapted.save_pretrained(adapter)
print(adapted(input_ids=torch.tensor([[9, 8, 7]])).logits.sum().item())
"""
OPENS = """
import sys, torch
sys.modules["prefixvlm"] = None
from peft import AutoPeftModel
from transformers import AutoProcessor
base, adapter, *allowed = sys.argv[1:]
processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
model = AutoPeftModel.from_pretrained(adapter, trust_remote_code=True, import_allowlist=allowed or None)
print(model(input_ids=torch.tensor([[9, 8, 7]])).logits.sum().item())
"""


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model's folder, the adapter's, and what the adapted model says."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny_model().save_pretrained(folder / "base")
    tiny_processor().save_pretrained(folder / "base")
    done = run(MAKES, folder / "base", folder / "adapter")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "base", folder / "adapter", done.stdout


def test_an_adapter_is_opened_with_its_model(made):
    base, adapter, said = made
    done = run(OPENS, base, adapter, "transformers_modules")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == said


def test_without_the_allowlist_peft_says_what_it_would_import(made):
    base, adapter, _ = made
    done = run(OPENS, base, adapter)
    assert done.returncode == 1
    assert "is not in the import allowlist" in done.stderr
