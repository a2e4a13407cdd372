"""Many questions about one image: `EncodedImages` against a prompt of its own for each question."""

from PIL import Image

from benchmarks import common
from benchmarks.common import Setup, alternate, emit, ratio, summary
from prefixvlm import EncodedImages
from prefixvlm.inference.asking import generate_texts, prompt_inputs, user_messages

COUNTS = (1, 2, 4, 8)
NEW_TOKENS = 8
QUESTIONS = (
    "What is in the picture?",
    "How many people are there?",
    "Which colour is the car on the left side of the street?",
    "Is it raining?",
    "What does the sign above the door say?",
    "Where was this taken?",
    "Is there a dog?",
    "What time of the day is it, and how can one tell?",
)


def run(setup: Setup) -> list[dict]:
    rate = common.gemm_rate(setup)
    one, least = (common.forward_flops(common.paper_config(depth), 1, 256, 256 + 32) for depth in (1.0, 0.0))
    # each count reads the image once together, and as often as it has questions alone
    reads = sum(count + 1 for count in COUNTS) * (common.REPEATS + 1)
    depth = setup.depth(reads * one, reads * least, rate)
    model = common.prefix_vlm(setup, depth)
    processor = common.processor_for(QUESTIONS, 600, model)
    picture = Image.effect_noise((640, 480), 64).convert("RGB")
    results = []
    for count in COUNTS:
        questions = list(QUESTIONS[:count])
        calls = {
            "together": lambda questions=questions: EncodedImages(model, processor, picture).ask(questions, NEW_TOKENS),
            "separately": lambda questions=questions: [ask(model, processor, picture, question) for question in questions],
        }
        seconds = alternate(calls, setup.device)
        results.append(
            emit(
                "questions about one image",
                setup,
                depth=round(depth, 3),
                questions=count,
                new_tokens=NEW_TOKENS,
                **{name: summary(values) for name, values in seconds.items()},
                faster_together=ratio(seconds["separately"], seconds["together"]),
            )
        )
    return results


def ask(model, processor, picture, question: str) -> str:
    """The answer to a prompt of its own."""
    inputs = prompt_inputs(processor, [user_messages([picture], question)])
    return generate_texts(model, processor, inputs, max_new_tokens=NEW_TOKENS)[0]
