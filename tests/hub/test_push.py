"""What arrives on the Hub, whichever way it is pushed: all that a loader needs, and nothing of the training."""

import pytest
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, RepoUrl, hf_api
from huggingface_hub.errors import EntryNotFoundError
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import hub

from prefixvlm.cli import main

REPO = "someone/vlm"
CODE = {f"{name}_prefix_vlm.py" for name in ("configuration", "modeling", "masking", "loss", "cpu", "processing", "images")}
OF_THE_MODEL = {"config.json", "generation_config.json", "model.safetensors", "README.md"} | CODE
OF_THE_PROCESSOR = {
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
} | CODE
if transformers.__version__.startswith("4."):
    OF_THE_PROCESSOR.add("special_tokens_map.json")  # tokenizers of 5.x keep this in their configuration
OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "complete.json")


@pytest.fixture
def pushed(monkeypatch) -> dict[str, bytes]:
    """The files of the repository; grows with each commit that would have gone to the Hub."""
    files = {}

    def create_repo(self, repo_id, **kwargs):
        assert repo_id == REPO
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        assert repo_id == REPO
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        url = f"https://huggingface.co/{repo_id}/commit/{'1' * 40}"
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="1" * 40)

    def load_card(*args, **kwargs):
        if "README.md" not in files:
            raise EntryNotFoundError("no card")
        return ModelCard(files["README.md"].decode())

    for name, stand_in in {"create_repo": create_repo, "create_commit": create_commit}.items():
        monkeypatch.setattr(HfApi, name, stand_in)
        # 4.x calls functions of the module, which belong to an object made at its import
        monkeypatch.setattr(hub, name, lambda *args, call=stand_in, **kwargs: call(None, *args, **kwargs), raising=False)
    # else 1.x of huggingface_hub uploads by parts, with other calls
    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False, raising=False)
    # the Hub itself would check the head of the card
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda self, content, **kwargs: ModelCard(content).data)
    monkeypatch.setattr(hub.ModelCard, "load", load_card)
    return files


def test_the_command_pushes_all_that_a_loader_needs_and_nothing_of_the_training(pushed, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "checkpoint-7"):
        tiny_model().save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        for name in OF_TRAINING:
            (folder / name).write_bytes(b"training")
    assert main(["push", str(tmp_path), REPO]) == 0
    assert REPO in capsys.readouterr().out
    assert pushed.keys() == OF_THE_MODEL | OF_THE_PROCESSOR
    assert b"# A PrefixVLM checkpoint" in pushed["README.md"]
    assert pushed["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_model_and_processor_push_the_same_repository_together(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model(), tiny_processor()
    model.push_to_hub(REPO)
    assert pushed.keys() == OF_THE_MODEL
    processor.push_to_hub(REPO)
    assert pushed.keys() == OF_THE_MODEL | OF_THE_PROCESSOR
    assert b"# A PrefixVLM checkpoint" in pushed["README.md"]
    assert not any(tmp_path.iterdir())


def test_what_was_pushed_loads(pushed, tmp_path):
    tiny_model().push_to_hub(REPO)
    tiny_processor().push_to_hub(REPO)
    for name, content in pushed.items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    assert processor.num_image_tokens == model.config.num_image_tokens
