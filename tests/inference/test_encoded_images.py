"""Questions about images that were encoded once, held to separate prompts."""

import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from prefixvlm import EncodedImages
from prefixvlm.inference.asking import generate_texts, prompt_inputs, user_messages

QUESTIONS = ["red?", "what shape is it", "", "is there an <|image_pad|> or <|im_end|>?", "red?"]
NEW_TOKENS = 6


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (20, 20), (50 * number, 30, 200)) for number in range(1, count + 1)]


def separately(model, processor, images, question: str, **generation) -> str:
    inputs = prompt_inputs(processor, [user_messages(images, question)])
    return generate_texts(model, processor, inputs, max_new_tokens=NEW_TOKENS, **generation)[0]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["causal", "prefix", "prefix_all_images"])
def test_answers_are_those_of_separate_prompts(mode, count, beams):
    model, processor = tiny_model(mode).double(), tiny_processor()
    images = pictures(count)
    expected = [separately(model, processor, images, question, num_beams=beams) for question in QUESTIONS]
    encoded = EncodedImages(model, processor, images)
    assert encoded.ask(QUESTIONS, NEW_TOKENS, num_beams=beams) == expected
    assert [encoded.ask(question, NEW_TOKENS, num_beams=beams) for question in QUESTIONS] == expected
    assert len(set(expected)) > 1


def test_the_encoder_runs_once():
    model, processor = tiny_model(), tiny_processor()
    calls = []
    model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(args), with_kwargs=True)
    decoder_lengths = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: decoder_lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    encoded = EncodedImages(model, processor, pictures(1)[0])
    encoded.ask("red?", 1)
    encoded.ask(["red?", "green or blue?"], 1)
    assert len(calls) == 1
    shared, *rests = decoder_lengths
    assert shared == 4  # the image, which the template puts first
    assert len(rests) == 2
    assert rests[1] - rests[0] == len("green or blue?") - len("red?")  # a token a letter; the image is not read again


def test_a_rest_does_not_see_what_is_padded():
    """Beside a long question a short one has the same logits as alone."""
    model, processor = tiny_model().double(), tiny_processor()
    encoded = EncodedImages(model, processor, pictures(1))
    options = {"return_dict_in_generate": True, "output_logits": True}
    generated = []
    generate = model.generate
    model.generate = lambda **kwargs: generated.append(generate(**kwargs, **options)) or generated[-1].sequences
    encoded.ask("red?", 3)
    encoded.ask(["red?", "is it a very long and winding question?"], 3)
    for alone, beside in zip(generated[0].logits, generated[1].logits, strict=True):
        torch.testing.assert_close(beside[0], alone[0], rtol=1e-9, atol=1e-9)


def test_no_questions_are_refused():
    encoded = EncodedImages(tiny_model(), tiny_processor(), pictures(1))
    with pytest.raises(ValueError, match="no questions"):
        encoded.ask([])


def test_a_template_with_the_question_first_is_refused():
    processor = tiny_processor()
    processor.chat_template = (
        "{% for message in messages %}{% for part in message.content | reverse %}"
        "{{ part.text if part.type == 'text' else '<|image_pad|>' }}{% endfor %}{% endfor %}"
    )
    encoded = EncodedImages(tiny_model(), processor, pictures(1))
    with pytest.raises(ValueError, match="questions before the images"):
        encoded.ask("red?")


def test_a_bidirectional_model_is_refused():
    with pytest.raises(ValueError, match="cannot use a cache"):
        EncodedImages(tiny_model("bidirectional"), tiny_processor(), pictures(1))


@pytest.mark.parametrize("name", ["num_return_sequences", "return_dict_in_generate", "generation_config"])
def test_what_asks_for_more_than_a_text_is_refused(name):
    encoded = EncodedImages(tiny_model(), tiny_processor(), pictures(1))
    with pytest.raises(ValueError, match=name):
        encoded.ask("red?", **{name: 2})


def test_beams_of_the_models_own_settings_do_not_matter():
    model, processor = tiny_model(), tiny_processor()
    expected = EncodedImages(model, processor, pictures(1)).ask("red?", NEW_TOKENS)
    model.generation_config.num_beams = 3
    assert EncodedImages(model, processor, pictures(1)).ask("red?", NEW_TOKENS) == expected
