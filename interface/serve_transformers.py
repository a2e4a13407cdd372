"""transformers' own OpenAI-compatible server for one model that is loaded already, on 4.57 and on 5."""

import asyncio
import inspect
import json
import logging
from types import SimpleNamespace

import transformers

from prefixvlm.serve_engine import Engine, Job
from prefixvlm.serve_guard import Application, Message, Receive, Send, error_body, send_error
from prefixvlm.serve_requests import CHAT

VERSIONS = "4.57.6 and 5.23.0"  # that are tested


def application(engine: Engine) -> Application:
    """The server as an ASGI application.

    Raises:
        ValueError: if this version of transformers has no server that is known here.
    """
    try:
        return _of_4(engine) if transformers.__version__.startswith("4.") else _of_5(engine)
    except (ImportError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(
            f"The server of transformers {transformers.__version__} cannot be opened ({reason}); install one that "
            f"this is tested with, {VERSIONS}."
        ) from error


def _of_5(engine: Engine) -> Application:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, Modality

    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of every request

    class OneModel:
        """What the handlers ask of transformers' ModelManager, which would load whatever a request names."""

        force_model = None

        def process_model_name(self, name: str) -> str:
            return name

        def load_model_and_processor(self, *_, **__):
            return engine.stand_ins()

        def get_model_modality(self, *_, **__):
            return Modality.VLM

        def get_gen_models(self) -> list[dict]:
            return engine.listed()

        def shutdown(self) -> None:
            engine.close()

    manager, state = OneModel(), GenerationState()
    parts = {
        "model_manager": manager,
        "chat_handler": ChatCompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
        "generation_state": state,
        "enable_cors": False,
    }
    # the handlers of other routes, which the guard does not let pass, differ between versions
    server = build_server(**{name: parts.get(name) for name in inspect.signature(build_server).parameters})
    server.add_exception_handler(Exception, _answer_error)
    return server


def _of_4(engine: Engine) -> Application:
    from transformers.commands import serving

    class OneModel(serving.ServeCommand):
        def process_model_name(self, model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str):
            return engine.stand_ins(ends_streams=True)

        @staticmethod
        def get_model_modality(model):
            return serving.Modality.VLM

        def get_gen_models(self) -> list[dict]:
            return engine.listed()

    engine.model.config.architectures = [type(engine.model).__name__]  # read, but a model need not be saved with it
    # `run` builds the application and hands it to uvicorn at once
    built, uvicorn = [], serving.uvicorn
    serving.uvicorn = SimpleNamespace(run=lambda application, **_: built.append(application))
    try:
        OneModel(serving.ServeArguments(log_level="error")).run()
    finally:
        serving.uvicorn = uvicorn
    built[0].add_exception_handler(Exception, _answer_error)
    return CompleteAnswers(built[0], engine)


async def _answer_error(request, error: Exception):
    """The answer to a request that failed within the server; the error itself goes to its log."""
    from fastapi.responses import JSONResponse

    return JSONResponse(error_body(500, _sentence(error)), status_code=500)


def _sentence(error: Exception) -> str:
    return f"The server failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})."


class CompleteAnswers:
    """Completes the answers of transformers 4.57, which streams all of them, and says neither why one ended nor how long
    it is: what is not to be streamed becomes one JSON object.

    Args:
        application: the server.
        engine: whose job it answers.
    """

    def __init__(self, application: Application, engine: Engine):
        self.application, self.engine = application, engine

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        job = self.engine.job
        if scope["type"] != "http" or scope["method"] != "POST" or job is None:
            await self.application(scope, receive, send)
            return
        is_chat, rest, is_stream = scope["path"] == CHAT, b"", False
        events: list[dict] = []

        async def completed(message: Message) -> None:
            nonlocal rest, is_stream
            if message["type"] == "http.response.start":
                is_stream = message["status"] == 200
            if not is_stream or (message["type"] == "http.response.start" and job.stream):
                await send(message)
            if not is_stream or message["type"] == "http.response.start":
                return
            *lines, rest = (rest + message.get("body", b"")).split(b"\n\n")
            new = [await _completed(json.loads(line.removeprefix(b"data: ")), job) for line in lines]
            events.extend(new)
            is_last = not message.get("more_body", False)
            if job.stream:
                body = "".join(f"data: {json.dumps(event)}\n\n" for event in new)
                body += "data: [DONE]\n\n" if is_last and is_chat else ""
                await send({**message, "body": body.encode()})
            elif is_last:
                await _send_whole(events, is_chat, job, send)

        await self.application(scope, receive, completed)


async def _completed(event: dict, job: Job) -> dict:
    """An event of a stream with what it lacks, or an error in its place."""
    choices = event.get("choices")
    if choices:
        event["id"] = job.id  # all have the same one
    ends_chat = bool(choices and choices[0].get("finish_reason"))
    if not ends_chat and event.get("type") != "response.completed":
        return event
    await asyncio.to_thread(job.is_done.wait)  # the stream ends a little earlier
    if job.error is not None:
        sequence = {} if ends_chat else {"type": "error", "sequence_number": event["sequence_number"]}
        return {**sequence, **error_body(500, _sentence(job.error))}
    prompt, new = job.prompt_tokens, job.new_tokens
    if ends_chat:
        event["choices"][0]["finish_reason"] = "length" if job.is_cut else "stop"
        event["usage"] = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    else:
        event["response"]["usage"] = {
            "input_tokens": prompt,
            "output_tokens": new,
            "total_tokens": prompt + new,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
    return event


async def _send_whole(events: list[dict], is_chat: bool, job: Job, send: Send) -> None:
    last = events[-1] if events else {}
    if "usage" not in (last if is_chat else last.get("response", {})):
        await send_error(send, 500, _sentence(job.error or RuntimeError("the answer has no end")))
        return
    body = json.dumps(_whole_chat(events) if is_chat else last["response"]).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _whole_chat(chunks: list[dict]) -> dict:
    """One chat completion of its pieces."""
    choices, last = [chunk["choices"][0] for chunk in chunks], chunks[-1]
    message = {"role": "assistant", "content": "".join(choice["delta"].get("content") or "" for choice in choices)}
    choice = {"index": 0, "message": message, "finish_reason": choices[-1]["finish_reason"]}
    return {
        **{name: last[name] for name in ("id", "created", "model", "usage")},
        "object": "chat.completion",
        "choices": [choice],
    }
