"""Opens a saved model to programs that speak OpenAI's protocol: transformers' own server, behind a guard."""

import socket
from collections.abc import Callable, Sequence

from PIL import Image

from prefixvlm.inference.environment import choose_device
from prefixvlm.inference.int8 import quantize_int8
from prefixvlm.inference.loading import load
from prefixvlm.serve_engine import Engine
from prefixvlm.serve_guard import Guard, RequestLimits
from prefixvlm.serve_pictures import PictureLimits
from prefixvlm.serve_transformers import application

SHUTDOWN_SECONDS = 5  # that answers have to end after Ctrl-C
MIB = 2**20


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    int8: bool = False,
    allow_host: Sequence[str] = (),
    max_new_tokens: int = 1024,
    max_context: int | None = None,
    max_pictures: int = 16,
    max_picture_mb: int = 16,
    max_megapixels: int = 64,
    max_request_mb: int = 32,
    queue: int = 16,
    say: Callable[[str], None] = print,
) -> None:
    """Serves a model until it is interrupted.

    Args:
        model: folder or Hub id.
        host, port: where; port 0 is any that is free.
        name: that requests call it by; by default `model`.
        device, dtype: as for `load`; by default what is fast.
        int8: whether the decoder's weights become 8-bit integers.
        allow_host: hosts whose pictures are fetched, `host` or `host:port`.
        max_new_tokens: of an answer.
        max_context: of a request and its answer together, in tokens; by default as in `Engine`.
        max_pictures, max_megapixels: of a request.
        max_picture_mb, max_request_mb: MiB of a picture as a file, and of a request.
        queue: how many requests wait for their turn; the next one is refused.
        say: is told where the server is.

    Raises:
        ValueError: for a limit that is not positive, a place that cannot be had, or a model that cannot be loaded.
        ModuleNotFoundError: without the packages of the extra [serve].
    """
    import fastapi  # noqa: F401
    import openai  # noqa: F401
    import uvicorn

    least = {"max_new_tokens": max_new_tokens, "max_context": max_context, "max_pictures": max_pictures}
    least |= {"max_picture_mb": max_picture_mb, "max_megapixels": max_megapixels, "max_request_mb": max_request_mb}
    for option, value in least.items():
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    if queue < 0:
        raise ValueError(f"--queue is {queue}; it must be at least 0.")
    readable = (Image.MAX_IMAGE_PIXELS or 10**9) // 10**6
    if max_megapixels > readable:
        raise ValueError(f"--max-megapixels is {max_megapixels}; Pillow reads at most {readable}.")
    pictures = PictureLimits(max_pictures, max_picture_mb * MIB, max_megapixels * 10**6, allowed_hosts(allow_host))
    with listening(host, port) as place:
        loaded, processor = load(model, dtype, device=choose_device(device))
        if int8:
            quantize_int8(loaded)
        engine = Engine(loaded, processor, name or model, pictures, max_new_tokens, max_context)
        guard = Guard(application(engine), engine, RequestLimits(max_request_mb * MIB, queue))
        config = uvicorn.Config(guard, http="h11", ws="none", log_level="info", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        shown = f"[{host}]" if ":" in host else host
        say(f"Serving {engine.name!r} at http://{shown}:{place.getsockname()[1]}/v1 (Ctrl-C ends it)")
        try:
            uvicorn.Server(config).run(sockets=[place])
        finally:
            engine.close()


def allowed_hosts(given: Sequence[str]) -> frozenset[str]:
    """Hosts as requests are compared with them.

    Raises:
        ValueError: for an address of a page in place of a host.
    """
    for host in given:
        if "/" in host or not host.strip():
            raise ValueError(f"--allow-host is {host!r}; give a host such as images.example.org, or a host:port.")
    return frozenset(host.strip().lower().rstrip(".") for host in given)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded in vain.

    Raises:
        ValueError: if the place cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{host}:{port} cannot be listened on ({reason}); choose another --host or --port.") from error
