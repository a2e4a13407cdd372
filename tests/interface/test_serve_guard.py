"""The guard before the server: whose turn it is, who is too slow, and what is said when the model fails."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_processor

from prefixvlm import serve_guard
from prefixvlm.serve_engine import Engine, Job
from prefixvlm.serve_guard import Guard, RequestLimits
from prefixvlm.serve_pictures import PictureLimits
from prefixvlm.serve_requests import CHAT, RESPONSES

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


class Visitor:
    """Somebody who asks, and keeps what comes back. It never leaves, unless `leave` is called."""

    def __init__(self, guard, body: dict | None = BODY, path: str = CHAT, reads: bool = True):
        self.guard, self.path, self.reads = guard, path, reads
        self.sent: list[dict] = []
        self.inbox: asyncio.Queue = asyncio.Queue()
        if body is not None:
            self.inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    async def visit(self) -> "Visitor":
        scope = {"type": "http", "method": "POST", "path": self.path, "query_string": b"", "root_path": ""}
        scope |= {
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "client": None,
            "server": None,
        }
        scope |= {"scheme": "http", "raw_path": self.path.encode(), "asgi": {"version": "3.0"}}
        await self.guard(scope, self.inbox.get, self._send)
        return self

    async def _send(self, message) -> None:
        if not self.reads:
            await asyncio.sleep(60)
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def stub_engine() -> SimpleNamespace:
    engine = SimpleNamespace(name="tiny", context=64, limits=PictureLimits(), job=None, jobs=[])

    def prepare(asked) -> Job:
        engine.jobs.append(Job({"input_ids": torch.zeros(1, 3)}, {"max_new_tokens": 3}, None, False))
        return engine.jobs[-1]

    engine.prepare = prepare
    return engine


async def say(send, text: str) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


def test_requests_take_turns():
    async def check():
        at_work, most = 0, 0

        async def application(scope, receive, send):
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.02)
            at_work -= 1
            await say(send, "done")

        guard = Guard(application, stub_engine(), RequestLimits(waiting=2))
        visitors = await asyncio.gather(*(Visitor(guard).visit() for _ in range(4)))
        assert most == 1
        assert sorted(visitor.status for visitor in visitors) == [200, 200, 200, 503]
        assert (await Visitor(guard).visit()).status == 200

    asyncio.run(check())


def test_what_the_application_gets_asks_for_nothing_but_protocol():
    async def check():
        async def application(scope, receive, send):
            await say(send, (await receive())["body"].decode())

        guard = Guard(application, stub_engine(), RequestLimits())
        secret = [{"type": "text", "text": "a secret"}]
        messages = [{"role": "user", "content": secret}]
        answer = json.loads((await Visitor(guard, {"messages": messages, "user": "me"}).visit()).text)
        assert answer == {
            "model": "tiny",
            "stream": False,
            "messages": [{"role": "user", "content": ""}],
            "max_tokens": 3,
        }

    asyncio.run(check())


def test_who_leaves_stops_their_job_and_gives_up_their_turn():
    async def check():
        begun = []

        async def application(scope, receive, send):
            begun.append(scope)
            await receive()
            assert await receive() == {"type": "http.disconnect"}
            while not engine.jobs[0].stop.is_set():  # as a thread that generates
                await asyncio.sleep(0.01)

        engine = stub_engine()
        guard = Guard(application, engine, RequestLimits())
        first, second = Visitor(guard), Visitor(guard)
        tasks = [asyncio.create_task(visitor.visit()) for visitor in (first, second)]
        while not begun:
            await asyncio.sleep(0.01)
        second.leave()  # before its turn
        await asyncio.sleep(0.05)
        assert not engine.jobs[0].stop.is_set()
        first.leave()
        _, late = await asyncio.wait(tasks, timeout=10)
        assert not late
        assert len(begun) == 1

    asyncio.run(check())


def test_a_request_that_does_not_arrive_gives_up_its_place(monkeypatch):
    monkeypatch.setattr(serve_guard, "BODY_SECONDS", 0.05)

    async def check():
        guard = Guard(lambda scope, receive, send: say(send, "done"), stub_engine(), RequestLimits(waiting=0))
        slow = await Visitor(guard, body=None).visit()
        assert slow.status == 408
        assert "did not arrive" in slow.text
        assert (await Visitor(guard).visit()).status == 200

    asyncio.run(check())


def test_who_does_not_read_gives_up_their_place(monkeypatch):
    monkeypatch.setattr(serve_guard, "SEND_SECONDS", 0.05)

    async def check():
        engine = stub_engine()
        guard = Guard(lambda scope, receive, send: say(send, "done"), engine, RequestLimits(waiting=0))
        _, late = await asyncio.wait([asyncio.create_task(Visitor(guard, reads=False).visit())], timeout=10)
        assert not late
        assert engine.jobs[0].stop.is_set()
        assert (await Visitor(guard).visit()).status == 200

    asyncio.run(check())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in 4.57's own thread
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_told_in_a_sentence(path, stream, monkeypatch, capsys):
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason="of the extra [serve]")
    from prefixvlm.serve_transformers import application

    engine = Engine(tiny_model(), tiny_processor(), "tiny", PictureLimits(), max_new_tokens=8)
    guard = Guard(application(engine), engine, RequestLimits())
    body = {"input": "hello", "stream": stream} if path == RESPONSES else {**BODY, "stream": stream}

    def fail(**_):
        raise RuntimeError("out of memory")

    async def visit(visitor: Visitor) -> Visitor:
        with contextlib.suppress(RuntimeError):  # the error itself goes on to the server's log
            await asyncio.wait_for(visitor.visit(), 30)
        return visitor

    async def check():
        with monkeypatch.context() as broken:
            broken.setattr(engine.model, "generate", fail)
            failed = await visit(Visitor(guard, body, path))
        assert failed.status == (200 if stream else 500)
        assert "out of memory" in failed.text
        assert "error" in failed.text
        assert (await visit(Visitor(guard, body, path))).status == 200

    asyncio.run(check())
