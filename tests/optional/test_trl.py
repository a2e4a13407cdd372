"""TRL's SFTTrainer trains a saved folder on images and conversations, with nothing of ours but what the folder brings."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

trl = pytest.importorskip("trl", reason="TRL is not installed; pip install trl")

STEPS = 24
IMAGE, END = "<|image_pad|>", "<|im_end|>"
QUESTION = "which colour?"
LEARNT = {"red": Image.new("RGB", (16, 16), "red"), "blue": Image.new("RGB", (16, 16), "blue")}

# how a person may hand over conversations
WHOLE, COMPLETION, ANSWERS = "messages", "prompt and completion", "messages with assistant_only_loss"
TOO_OLD = Version(transformers.__version__) < Version("5.18")
ANSWERS_IF_NEW = pytest.param(
    ANSWERS, marks=pytest.mark.skipif(TOO_OLD, reason="TRL takes assistant_only_loss with images from transformers 5.18 on")
)


def asked(*turns: str) -> list[dict]:
    """Question, answer, question, answer, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def dataset(form: str, rows: list[tuple[list, list[dict]]]) -> Dataset:
    """Rows of images and messages."""
    columns = {"images": [images for images, _ in rows]}
    if form == COMPLETION:
        columns |= {"prompt": [turns[:-1] for _, turns in rows], "completion": [turns[-1:] for _, turns in rows]}
    else:
        columns["messages"] = [turns for _, turns in rows]
    return Dataset.from_dict(columns)


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def sft_trainer(folder, form: str, rows, output):
    model, processor = load(folder)
    arguments = trl.SFTConfig(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        assistant_only_loss=form == ANSWERS,
    )
    return trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset(form, rows), processing_class=processor)


def answers(model, processor) -> dict[str, str]:
    """What the model says of each image that it was taught."""
    given = {}
    for colour, image in LEARNT.items():
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.eval().generate(**inputs, max_new_tokens=len(colour) + 1, do_sample=False)
        given[colour] = processor.decode(output[0, inputs["input_ids"].shape[1] :])
    return given


@pytest.fixture(scope="module", autouse=True)
def _a_process_that_does_not_know_us():
    with pytest.MonkeyPatch.context() as patch:
        # transformers 5 prefers classes that somebody registered in this process to the code in the folder
        for mapping in (CONFIG_MAPPING, PROCESSOR_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            patch.setattr(mapping, "_extra_content", {})
        # TRL trains in bfloat16, and transformers 4 would leave that here to whoever trains next
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found_on_the_hub")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[WHOLE, COMPLETION, ANSWERS_IF_NEW])
def training(request, folder, tmp_path_factory):
    """Two images, one question, two answers, learnt by heart."""
    rows = [([image], asked(QUESTION, colour)) for colour, image in LEARNT.items()]
    trainer = sft_trainer(folder, request.param, rows, tmp_path_factory.mktemp("trl"))
    model = trainer.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    encoded = []
    hook = model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    return SimpleNamespace(trainer=trainer, before=before, encoded=encoded)


def test_it_is_the_code_of_the_folder_that_trains(training):
    for thing in (training.trainer.model, training.trainer.model.config, training.trainer.processing_class):
        assert type(thing).__module__.startswith("transformers_modules.")


def test_the_loss_falls(training):
    losses = [entry["loss"] for entry in training.trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] / 20


def test_every_step_sees_the_pixels_of_its_images(training):
    expected = training.trainer.processing_class(images=list(LEARNT.values()), return_tensors="pt")["pixel_values"]
    assert len(training.encoded) >= STEPS
    for pixels in training.encoded:
        assert torch.equal(pixels, expected) or torch.equal(pixels, expected.flip(0))


@pytest.mark.parametrize("part", ["patch_embedding.weight", "projector.linear_1.weight", "embed_tokens.weight"])
def test_the_gradient_reaches_the_beginning_of_every_part(training, part):
    (change,) = [
        (weight - training.before[name]).abs().max()
        for name, weight in training.trainer.model.named_parameters()
        if name.endswith(part)
    ]
    assert change > 1e-3


def test_only_the_image_tells_the_answers_apart(training):
    trainer = training.trainer
    assert answers(trainer.model, trainer.processing_class) == {colour: colour + END for colour in LEARNT}


def test_the_checkpoint_is_again_a_folder_for_the_auto_classes(training):
    trainer = training.trainer
    model, processor = load(f"{trainer.args.output_dir}/checkpoint-{STEPS}")
    assert type(model).__module__.startswith(f"transformers_modules.checkpoint_hyphen_{STEPS}.")
    weights = trainer.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert answers(model, processor) == {colour: colour + END for colour in LEARNT}


MIXED = [
    ([LEARNT["red"]], asked("which?", "red", "really?", "yes")),
    ([LEARNT["red"], LEARNT["blue"]], asked("and these two?", "red and blue, in this order")),
    ([], asked("no image?", "none")),
]


def first_batch(folder, form: str, output):
    """The batch that TRL's own collator makes of rows with one, two and no images, and the processor it used."""
    trainer = sft_trainer(folder, form, MIXED, output)
    return next(iter(trainer.get_eval_dataloader(trainer.train_dataset))), trainer.processing_class


@pytest.mark.parametrize("form", [WHOLE, COMPLETION, ANSWERS_IF_NEW])
def test_each_row_keeps_its_images(folder, form, tmp_path):
    batch, processor = first_batch(folder, form, tmp_path)
    pixels = [processor(images=image, return_tensors="pt")["pixel_values"] for images, _ in MIXED for image in images]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    tokens = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert tokens.tolist() == [len(images) * processor.num_image_tokens for images, _ in MIXED]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # with what the template writes after the end of a turn
        (COMPLETION, [f"yes{END}\n", f"red and blue, in this order{END}\n", f"none{END}\n"]),
        pytest.param(
            ANSWERS,
            [f"red{END}yes{END}", f"red and blue, in this order{END}", f"none{END}"],
            marks=ANSWERS_IF_NEW.marks,
        ),
    ],
)
def test_labels_are_the_answers(folder, form, expected, tmp_path):
    batch, processor = first_batch(folder, form, tmp_path)
    labels, ids = batch["labels"], batch["input_ids"]
    assert [processor.decode(row[row != -100]) for row in labels] == expected
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (labels[(batch["attention_mask"] == 0) | (ids == processor.image_token_id)] == -100).all()


def test_labels_of_whole_messages_are_all_text_and_no_padding(folder, tmp_path):
    batch, processor = first_batch(folder, WHOLE, tmp_path)
    rendered = processor.apply_chat_template([turns for _, turns in MIXED])
    # TRL asks for the image tokens, too, here: whether it does is its affair
    text = [row[(row != -100) & (row != processor.image_token_id)] for row in batch["labels"]]
    assert [processor.decode(row) for row in text] == rendered
    assert (batch["attention_mask"] == 0).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
