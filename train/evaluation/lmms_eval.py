"""Runs lmms-eval's tasks on a saved PrefixVLM: lmms-eval's own command line, with `prefixvlm` as one more model.

    python -m prefixvlm.train.evaluation.lmms_eval --model prefixvlm --model_args pretrained=FOLDER --tasks mme

The Auto classes load the folder's own code and weights.
"""

from itertools import groupby

import torch
from lmms_eval.api.model import lmms
from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from prefixvlm.inference.asking import generate_texts, prompt_inputs
from prefixvlm.inference.environment import choose_device

NAME = "prefixvlm"
SAMPLING = ("temperature", "top_p", "top_k")


class PrefixVLM(lmms):
    """A saved folder or a model on the Hub that answers lmms-eval's requests.

    Args:
        pretrained: folder or Hub id; its code is run.
        device: by default the first there is of cuda, Apple's mps and cpu.
        batch_size: questions per batch.
        dtype: of weights and activations; `auto` keeps the checkpoint's.
        max_new_tokens: the limit for tasks that set none.
    """

    is_simple = False  # tasks pass messages, which the chat template renders

    def __init__(self, pretrained: str, device: str | None = None, batch_size=1, dtype="auto", max_new_tokens: int = 256):
        super().__init__()
        model = AutoModelForImageTextToText.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
        self.model = model.to(choose_device(device)).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests) -> list[str]:
        """Answers in the order of the requests, each as its task's `generation_kwargs` ask."""

        def settings(index: int) -> str:
            return repr(requests[index].args[2])

        # a batch shares its settings and holds questions of similar length, so that little of it is padding
        order = sorted(range(len(requests)), key=lambda index: (settings(index), len(requests[index].args[0])))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for _, same in groupby(order, key=settings):
                indices = list(same)
                for start in range(0, len(indices), self.batch_size):
                    chosen = indices[start : start + self.batch_size]
                    messages = [self._messages(requests[index]) for index in chosen]
                    texts = self._generate(messages, **requests[chosen[0]].args[2])
                    for index, text in zip(chosen, texts, strict=True):
                        answers[index] = text
                    progress.update(len(chosen))
        return answers

    def _messages(self, request) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()

    def _generate(self, messages: list[list[dict]], until=None, do_sample: bool = True, **settings) -> list[str]:
        """Ignores `settings` that transformers does not know, such as other models' image options."""
        # tasks ask for greedy decoding by either of the two, and some name a temperature that then has no effect
        do_sample = bool(do_sample and settings.get("temperature"))
        texts = generate_texts(
            self.model,
            self.processor,
            prompt_inputs(self.processor, messages),
            max_new_tokens=settings.get("max_new_tokens") or self.max_new_tokens,
            num_beams=settings.get("num_beams") or 1,
            do_sample=do_sample,
            **{name: settings.get(name) if do_sample else None for name in SAMPLING},
        )
        stops = [until] if isinstance(until, str) else until or []
        for stop in filter(None, stops):
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    def loglikelihood(self, requests):
        raise ValueError("Tasks that score given answers are not supported; choose one of type generate_until.")

    def generate_until_multi_round(self, requests):
        raise ValueError("Multi-round tasks are not supported; choose one of type generate_until.")


def register() -> None:
    """Registers the model `prefixvlm` with lmms-eval in this process."""
    path = f"prefixvlm.train.evaluation.lmms_eval.{PrefixVLM.__name__}"  # __module__ is __main__ when this file is run
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, chat_class_path=path), overwrite=True)


if __name__ == "__main__":
    register()
    main()
