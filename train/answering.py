"""Answers to many questions about images by real generation, in batches of similar length.

Shapes: B batch, T tokens.
"""

import torch
from tqdm.auto import tqdm

from prefixvlm.train.conversation import Conversation


@torch.inference_mode()
def answer(model, processor, questions: list[Conversation], batch_size: int = 256, max_new_tokens: int = 8) -> list[str]:
    """Greedy answers, in the order of `questions` (conversations that end with a user turn).

    Args:
        model: a PrefixVLM; it is put into evaluation mode.
        processor: its processor.
        batch_size: questions generated for at once.
        max_new_tokens: where an answer is cut.
    """
    model.eval()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].turns[-1][1]))
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", unit="batch"):
        chosen = order[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [questions[index].messages() for index in chosen],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers
