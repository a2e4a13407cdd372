"""The model that is served, as transformers' server sees it: one request at a time, each with inputs that are ready.

That server makes inputs, settings and threads of its own, differently in each version. It is given two stand-ins instead,
which answer its calls with what a `Job` holds, so that only its protocol remains: routes, events and streaming.

Shapes: T tokens of the prompt, I images.
"""

import threading
import time
import uuid
from typing import Any

import torch
from transformers import BatchFeature, StoppingCriteriaList

from prefixvlm.inference.asking import Stopped, prompt_inputs
from prefixvlm.serve_pictures import PictureLimits, open_pictures
from prefixvlm.serve_requests import Asked, with_pictures

MAX_CONTEXT = 8192  # unless more is asked for: the mask of longer prompts takes gigabytes
CHARACTERS_A_TOKEN = 16  # more than any language has; what is longer is not even tokenized


class Job:
    """One request on its way through the model.

    Args:
        inputs: of the model, `input_ids` and `attention_mask` (1, T), and `pixel_values` (I, C, H, W) if there are images.
        settings: arguments of `generate`.
        seed: for sampling.
        stream: whether the answer is sent piece by piece.
    """

    def __init__(self, inputs: BatchFeature, settings: dict[str, Any], seed: int | None, stream: bool):
        self.inputs, self.settings, self.seed, self.stream = inputs, settings, seed, stream
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.stop = threading.Event()  # nobody waits for the answer any more
        self.is_done = threading.Event()
        self.new_tokens = 0
        self.error: Exception | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended because it may not be longer."""
        return self.new_tokens >= self.settings["max_new_tokens"]


class Engine:
    """A model and its processor, for one job at a time.

    Args:
        model: a PrefixVLM.
        processor: its processor.
        name: under which it is served.
        limits: of the pictures of a request.
        max_new_tokens: of an answer.
        context: the most tokens of a prompt and its answer together; by default what the model reads, up to `MAX_CONTEXT`.

    Raises:
        ValueError: for a context that is longer than the model's.
    """

    def __init__(self, model, processor, name: str, limits: PictureLimits, max_new_tokens: int, context: int | None = None):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.limits, self.max_new_tokens = limits, max_new_tokens
        longest = getattr(model.config.text_config, "max_position_embeddings", None) or MAX_CONTEXT
        if context is not None and context > longest:
            raise ValueError(f"The context is {context}, but the model reads {longest} tokens; choose no more.")
        self.context = min(longest, MAX_CONTEXT) if context is None else context
        self.job: Job | None = None
        self._created = int(time.time())
        self._turn = threading.Lock()

    def prepare(self, asked: Asked) -> Job:
        """Opens the pictures of a request and makes the model's inputs of it.

        Raises:
            ValueError: for a picture that cannot be used, or a request that is too long.
        """
        pictures = open_pictures(asked.pictures, self.limits)
        inputs = prompt_inputs(self.processor, [with_pictures(asked.messages, pictures.__getitem__)])
        room = self.context - inputs["input_ids"].shape[1]
        wanted = asked.settings.get("max_new_tokens", min(self.max_new_tokens, max(room, 1)))
        if wanted > self.max_new_tokens:
            raise ValueError(f"An answer of {wanted} tokens is asked for; the most is {self.max_new_tokens}.")
        if wanted > room:
            raise ValueError(
                f"The request has {self.context - room} tokens, and its answer may have {wanted}, but the model reads "
                f"{self.context} in all; shorten the messages, or ask for a shorter answer."
            )
        # a bidirectional (stage 0) model cannot use a cache
        use_cache = self.model.config.attention_mode != "bidirectional"
        settings = {**asked.settings, "max_new_tokens": wanted, "use_cache": use_cache}
        return Job(inputs, settings, asked.seed, asked.stream)

    def generate(self, job: Job, **given):
        """The model's `generate` for a job; what is `given` besides comes from the server, such as a streamer.

        Returns:
            Token ids (1, T and the answer), or what `generate` returns instead.
        """
        with self._turn, torch.inference_mode():
            if job.seed is not None:
                torch.manual_seed(job.seed)
            output = self.model.generate(
                **job.inputs.to(self.model.device),
                **job.settings,
                **given,
                stopping_criteria=StoppingCriteriaList([Stopped(job.stop)]),
            )
        job.new_tokens = getattr(output, "sequences", output).shape[1] - job.prompt_tokens
        return output

    def stand_ins(self, ends_streams: bool = False) -> tuple["ModelOfJob", "ProcessorOfJob"]:
        """A model and a processor for the present job, as the server takes them.

        Args:
            ends_streams: whether an error has to end the stream, for a server that would wait for its end.
        """
        assert self.job is not None
        return ModelOfJob(self, self.job, ends_streams), ProcessorOfJob(self.processor, self.job)

    def listed(self) -> list[dict]:
        """The answer to who asks which models there are."""
        return [{"id": self.name, "object": "model", "created": self._created, "owned_by": "prefixvlm"}]

    def close(self) -> None:
        """Ends the present job, and waits for its thread: left alone, it would abort an interpreter that goes away."""
        if self.job is not None:
            self.job.stop.set()
        with self._turn:
            pass


class ModelOfJob:
    """Generates what a job asks for, whatever its caller made of the request; all else is the model's."""

    def __init__(self, engine: Engine, job: Job, ends_streams: bool):
        self._engine, self._job, self._ends_streams = engine, job, ends_streams

    def __getattr__(self, name: str):
        return getattr(self._engine.model, name)

    def generate(self, streamer=None, return_dict_in_generate: bool = False, **_):
        try:
            output = self._engine.generate(self._job, streamer=streamer, return_dict_in_generate=return_dict_in_generate)
            if return_dict_in_generate:
                output.past_key_values = None  # the server would keep it
            return output
        except Exception as error:
            self._job.error = error
            if self._ends_streams and streamer is not None:
                streamer.end()
            raise
        finally:
            self._job.is_done.set()


class ProcessorOfJob:
    """Gives the inputs of a job, whatever it is asked to make inputs of; all else is the processor's."""

    def __init__(self, processor, job: Job):
        self._processor, self._job = processor, job

    def __getattr__(self, name: str):
        return getattr(self._processor, name)

    def apply_chat_template(self, conversation, return_dict: bool = False, **_):
        return self._job.inputs if return_dict else self._job.inputs["input_ids"]
