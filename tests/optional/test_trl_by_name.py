"""TRL's preference and reinforcement trainers take a saved folder by name, once their configuration trusts its code."""

import math

import pytest
from datasets import Dataset
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

trl = pytest.importorskip("trl", reason="TRL is not installed; pip install trl")

IMAGES = [[Image.new("RGB", (16, 16), colour)] for colour in ("red", "blue")]
ASKED = [[{"role": "user", "content": "which colour?"}]] * 2
SAID, OTHER = (
    [[{"role": "assistant", "content": colour}] for colour in order] for order in (("red", "blue"), ("blue", "red"))
)
ROLLOUTS = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}


def lengths(completions, **_) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


KINDS = {
    "DPO": ({"prompt": ASKED, "chosen": SAID, "rejected": OTHER}, {}, {}),
    "KTO": ({"prompt": ASKED * 2, "completion": SAID + OTHER, "label": [True, True, False, False]}, {}, {}),
    "GRPO": ({"prompt": ASKED}, ROLLOUTS, {"reward_funcs": lengths}),
    "RLOO": ({"prompt": ASKED}, ROLLOUTS, {"reward_funcs": lengths}),
}


@pytest.fixture(scope="module", autouse=True)
def _a_process_that_does_not_know_us():
    with pytest.MonkeyPatch.context() as patch:
        # transformers 5 prefers classes that somebody registered in this process to the code in the folder
        for mapping in (CONFIG_MAPPING, PROCESSOR_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            patch.setattr(mapping, "_extra_content", {})
        # which transformers 4 would leave to whoever trains next
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found_by_name")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def trainer(kind: str, folder, output, **settings):
    columns, own, arguments = KINDS[kind]
    columns = {"images": (IMAGES * 2)[: len(columns["prompt"])], **columns}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(output),
        max_steps=1,
        per_device_train_batch_size=len(columns["prompt"]),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        **own,
        **settings,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=str(folder),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoProcessor.from_pretrained(folder, trust_remote_code=True),
        **arguments,
    )


@pytest.mark.parametrize("kind", ["DPO", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("KTO", "GRPO", "RLOO"))])
def test_a_step_trains_the_code_of_the_folder_beside_a_frozen_copy(kind, folder, tmp_path):
    trains = trainer(kind, folder, tmp_path, trust_remote_code=True)
    encoded = []
    trains.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    trains.train()
    for model in (trains.model, trains.ref_model):
        assert type(model).__module__.startswith("transformers_modules.")
    assert encoded
    (loss,) = [entry["loss"] for entry in trains.state.log_history if "loss" in entry]
    assert math.isfinite(loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_trust_the_folder_is_not_opened(kind, folder, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        trainer(kind, folder, tmp_path)
