"""What stands before transformers' server: no request reaches it that is too large, is one too many, or cannot be answered.

Every refusal is a sentence in the form of OpenAI's errors. The guard is an ASGI application around another one.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from prefixvlm.serve_engine import CHARACTERS_A_TOKEN, Engine, Job
from prefixvlm.serve_requests import CHAT, LOAD, RESPONSES, Asked, WrongModelError, read_object, read_request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

ROUTES = {CHAT: "POST", RESPONSES: "POST", LOAD: "POST", "/v1/models": "GET", "/health": "GET"}
BODY_SECONDS = 60  # for a whole request to arrive
SEND_SECONDS = 60  # for a client to take the next piece of its answer
RETRY_SECONDS = 5
MANY_BYTES = 8  # so many times the limit are read and thrown away, so that the client hears why


class RefusedError(Exception):
    """A request that is answered with a sentence.

    Args:
        status: of HTTP.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class RequestLimits:
    """What requests may be.

    Args:
        bytes: of one.
        waiting: how many wait for their turn; the next one is refused.
    """

    bytes: int = 32 * 2**20
    waiting: int = 16


class Guard:
    """Reads, bounds and queues the requests of an application that serves a model; its answers pass unchanged.

    Args:
        application: gets requests that ask for nothing but protocol; what they ask of the model is the engine's `job`.
        engine: the model.
        limits: of the requests.
    """

    def __init__(self, application: Application, engine: Engine, limits: RequestLimits):
        self.application, self.engine, self.limits = application, engine, limits
        self._inside = 0
        self._turn, self._reading = asyncio.Lock(), asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the beginning and the end of the server
            await self.application(scope, receive, send)
            return
        is_begun = False

        async def sent(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await asyncio.wait_for(send(message), SEND_SECONDS)

        try:
            self._refuse_other_routes(scope)
            if scope["method"] == "POST":
                await self._answer(scope, receive, sent)
            else:
                await self.application(scope, receive, sent)
        except RefusedError as error:
            await send_error(sent, error.status, str(error))
        except asyncio.TimeoutError:  # nobody reads the answer; the connection ends with this call
            return
        except asyncio.CancelledError:  # Ctrl-C, some time ago
            if not is_begun:
                await send_error(sent, 503, "The server is closing.")

    def _refuse_other_routes(self, scope: Message) -> None:
        method = ROUTES.get(scope["path"])
        if method is None:
            raise RefusedError(404, f"There is nothing at {scope['path'][:60]!r}; this server has {', '.join(ROUTES)}.")
        if scope["method"] != method:
            raise RefusedError(405, f"{scope['path']} takes {method} alone.")

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._inside > self.limits.waiting:
            raise RefusedError(
                503, f"The server is busy: {self.limits.waiting} requests wait for their turn; try again in a while."
            )
        self._inside += 1
        try:
            body = await self._body(scope, receive)
            if scope["path"] == LOAD:  # `transformers chat` has a server load its model first
                await self._or_refuse(read_object, body, self.engine.name)
                await send_loaded(send, self.engine.name)
                return
            async with self._reading:  # JSON takes ten times its bytes while it is read
                asked = await self._or_refuse(self._read, scope["path"], body)
            del body
            client = _Client(receive)
            try:
                async with self._turn:
                    if not client.is_gone.is_set():
                        await self._run(scope, asked, client, send)
            finally:
                client.leave()
        finally:
            self._inside -= 1

    async def _run(self, scope: Message, asked: Asked, client: "_Client", send: Send) -> None:
        """Has the application answer a request, alone."""
        job = await self._or_refuse(self.engine.prepare, asked)
        client.job = job
        if client.is_gone.is_set():
            return
        self.engine.job = job

        body = json.dumps(stand_in(scope["path"], self.engine.name, job)).encode()
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")]
        headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        try:
            await self.application({**scope, "headers": headers}, client.receiving(body), send)
        finally:
            job.stop.set()

    async def _or_refuse(self, function: Callable, *arguments):
        """What a function returns, from a thread; its ValueErrors refuse the request."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except WrongModelError as error:
            raise RefusedError(404, str(error)) from error
        except ValueError as error:
            raise RefusedError(400, " ".join(str(error).split())) from error

    def _read(self, path: str, body: bytes) -> Asked:
        context = self.engine.context
        characters = CHARACTERS_A_TOKEN * context
        return read_request(path, body, self.engine.name, self.engine.limits.count, context, characters)

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # also because a page of another site may send any other type unasked
            raise RefusedError(415, "A request is JSON; send it with the header Content-Type: application/json.")
        try:
            return await asyncio.wait_for(self._received(headers, receive), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise RefusedError(408, f"The request did not arrive within {BODY_SECONDS} seconds.") from error

    async def _received(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self.limits.bytes
        announced = int(headers.get(b"content-length", b"0"))
        body, length, more = bytearray(), 0, announced <= MANY_BYTES * limit
        too_large = announced > limit
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "The request ended before its end.")
            length += len(message.get("body", b""))
            too_large = too_large or length > limit
            if too_large:
                body.clear()
            else:
                body += message.get("body", b"")
            more = message.get("more_body", False) and length <= MANY_BYTES * limit
        if too_large:
            raise RefusedError(413, f"The request is too large: it may have {limit:,} bytes; shrink its pictures.")
        return bytes(body)


class _Client:
    """Who waits for an answer; if they leave, their job stops."""

    def __init__(self, receive: Receive):
        self.is_gone = asyncio.Event()
        self.job: Job | None = None
        self._task = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_gone.set()
        if self.job is not None:
            self.job.stop.set()

    def receiving(self, body: bytes) -> Receive:
        """A `receive` that gives a body, and then waits until the client is gone."""
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self.is_gone.wait()
            return {"type": "http.disconnect"}

        return receive

    def leave(self) -> None:
        self._task.cancel()


def stand_in(path: str, model: str, job: Job) -> dict:
    """A request that says of itself only how it is to be answered."""
    if path == RESPONSES:
        asks = {"input": [{"role": "user", "content": ""}], "max_output_tokens": job.settings["max_new_tokens"]}
    else:
        asks = {"messages": [{"role": "user", "content": ""}], "max_tokens": job.settings["max_new_tokens"]}
    return {"model": model, "stream": job.stream, **asks}


def error_body(status: int, sentence: str) -> dict:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}


async def send_loaded(send: Send, model: str) -> None:
    """Says that a model is there already, as an event of the stream that tells how loading goes on."""
    event = json.dumps({"status": "ready", "model": model, "cached": True})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode()})


async def send_error(send: Send, status: int, sentence: str) -> None:
    body = json.dumps(error_body(status, sentence)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    if status in (408, 413):  # some of the request may still be on its way
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
