"""What arrives on the Hub, whichever way it is pushed: all that a loader needs, and nothing of the training."""

from functools import partial

import pytest
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, RepoUrl, hf_api
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import hub
from travelling import CODE

from prefixvlm.cli import main
from prefixvlm.configuration.configuration_prefix_vlm import AUTO_MAP

REPO = "someone/vlm"
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
        for module in (hub, transformers.trainer):
            call = partial(stand_in, None)
            monkeypatch.setattr(module, name, call, raising=False)
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


SAVERS = {"configuration": lambda: tiny_model().config, "model": tiny_model, "processor": tiny_processor}
AUTO = {"configuration": "AutoConfig", "model": "AutoModelForImageTextToText", "processor": "AutoProcessor"}


def as_remote_code(kind, folder):
    """What the Auto classes load without this package; with it, 5.x would take the package's own class."""
    remote = get_class_from_dynamic_module(AUTO_MAP[AUTO[kind]], str(folder))
    assert remote.__module__.startswith("transformers_modules.")
    remote.register_for_auto_class(AUTO[kind])
    return remote.from_pretrained(folder)


class KilledError(Exception):
    """Stands for the end of the process."""


def train_until_it_is_killed(model, processor, output):
    """A plain `Trainer` that pushes each save, killed at the second step, after the first push."""
    batch = dict(processor(images=Image.new("RGB", (9, 9)), text="red", return_labels=True, return_tensors="pt"))
    arguments = TrainingArguments(
        str(output),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        max_steps=3,
        save_steps=1,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )

    class KilledTrainer(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                self._finish_current_push()
                raise KilledError
            return super().training_step(*args, **kwargs)

    trainer = KilledTrainer(
        model, arguments, train_dataset=[0] * 4, data_collator=lambda rows: batch, processing_class=processor
    )
    with pytest.raises(KilledError):
        trainer.train()


@pytest.mark.parametrize("remote", [True, False], ids=["remote code", "the package"])
def test_each_push_of_an_unfinished_run_is_a_whole_repository(pushed, tmp_path, remote):
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    if remote:
        model, processor = (as_remote_code(kind, tmp_path / "start") for kind in ("model", "processor"))
    else:
        model, processor = tiny_model(), tiny_processor()
    train_until_it_is_killed(model, processor, tmp_path / "run")
    # who trains without this package has no card to fill in
    assert pushed.keys() - {".gitattributes"} >= (OF_THE_MODEL | OF_THE_PROCESSOR) - ({"README.md"} if remote else set())
    (tmp_path / "pushed").mkdir()
    for name, content in pushed.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "pushed", trust_remote_code=True)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert AutoProcessor.from_pretrained(tmp_path / "pushed", trust_remote_code=True).num_image_tokens == 4


@pytest.mark.parametrize("kind", SAVERS)
def test_each_class_saves_all_the_code_alone_and_as_remote_code(kind, tmp_path):
    """Whichever part is loaded and saved alone, what it is saved beside can be loaded."""
    SAVERS[kind]().save_pretrained(tmp_path / f"{kind}-first")
    as_remote_code(kind, tmp_path / f"{kind}-first").save_pretrained(tmp_path / "second")
    for name in (f"{kind}-first", "second"):
        assert {path.name for path in (tmp_path / name).glob("*.py")} == CODE
