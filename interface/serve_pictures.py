"""Pictures that strangers send to the server: opened from data URLs and from hosts that are allowed, within limits.

Nothing here reads a file, and no address inside a network is asked unless it is allowed by itself.
"""

import base64
import binascii
import io
import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image, UnidentifiedImageError

from prefixvlm.processing.images_prefix_vlm import load_image

# of Pillow's, those that people take and send pictures in; the rarer a decoder, the less it has been attacked
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
DATA_URL = re.compile(r"data:[\w.+/;=-]*;base64,", re.IGNORECASE)
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
WAIT_SECONDS, FETCH_SECONDS = 10, 30  # for the next bytes, and for a whole picture
PIECE = 64 * 1024
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of IPv4, seen from IPv6


@dataclass(frozen=True)
class PictureLimits:
    """What the pictures of one request may be.

    Args:
        count: how many.
        bytes: of each, as a file.
        pixels: of all together, since they are in memory together.
        hosts: whose pictures are fetched, as `host` or `host:port`; an address of a private network counts only if it is
            itself among them.
    """

    count: int = 16
    bytes: int = 16 * 2**20
    pixels: int = 64_000_000
    hosts: frozenset[str] = frozenset()


def open_pictures(addresses: Iterable[str], limits: PictureLimits) -> list[Image.Image]:
    """Opens and decodes the pictures of a request, one after another.

    Returns:
        RGB images, as `load_image` makes them.

    Raises:
        ValueError: for an address that is not allowed, or for what is no picture or too large, naming the picture.
    """
    pictures, left = [], limits.pixels
    for number, address in enumerate(addresses, start=1):
        name = f"Picture {number}"
        picture = decoded(content(address, name, limits), name, left)
        left -= picture.width * picture.height
        pictures.append(picture)
    return pictures


def decoded(data: bytes, name: str, pixels: int) -> Image.Image:
    """Decodes a picture whose header says that it has at most so many pixels.

    Raises:
        ValueError: for any other picture, and for what is none.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large ({str(error).rstrip('.')}); shrink it.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read; send one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # damaged headers raise errors of many kinds
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{name} cannot be read ({reason}); replace it.") from error
    if image.width * image.height > pixels:
        raise ValueError(
            f"{name} is too large: it has {image.width} x {image.height} pixels, and {pixels:,} are left for this request; "
            "shrink it."
        )
    return load_image(image, name)


def content(address: str, name: str, limits: PictureLimits) -> bytes:
    """The bytes of a picture that is given as a data URL or as the address of an allowed host.

    Raises:
        ValueError: for any other address, and for more bytes than are allowed.
    """
    if head := DATA_URL.match(address):
        encoded = address[head.end() :]
        if len(encoded) * 3 // 4 > limits.bytes + 2:
            raise ValueError(too_many_bytes(name, limits))
        try:
            data = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name} is not in base64 ({error}).") from error
        if len(data) > limits.bytes:
            raise ValueError(too_many_bytes(name, limits))
        return data
    if address.lower().startswith(("http://", "https://")):
        try:
            return fetched(address, name, limits)
        except (OSError, HTTPException) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise ValueError(f"{name} cannot be fetched from {address[:100]!r} ({reason}).") from error
    raise ValueError(
        f"{name} is given as {address[:60]!r}; send the picture itself as a data URL (data:image/png;base64,...). Files of "
        "this server are not opened."
    )


def too_many_bytes(name: str, limits: PictureLimits) -> str:
    return f"{name} is too large: a picture may have {limits.bytes:,} bytes; shrink it."


def fetched(address: str, name: str, limits: PictureLimits) -> bytes:
    """Fetches a picture, directly and not through a proxy; each redirection is checked as the first address was.

    Raises:
        ValueError: for a host or an address that is not allowed, too many bytes, or an answer that has none.
        OSError, HTTPException: if the way there fails.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            url = urlsplit(address)
            port = url.port or PORTS.get(url.scheme)
        except ValueError as error:
            raise ValueError(f"{name} has an address that cannot be read ({error}).") from error
        if url.scheme not in PORTS:
            raise ValueError(f"{name} leads on to {address[:60]!r}; only addresses of http and https are fetched.")
        refuse_host(url, port, name, limits)
        connection = (_Tls if url.scheme == "https" else _Plain)(url.hostname or "", port, timeout=WAIT_SECONDS)
        connection.allowed, connection.name = limits.hosts, name
        try:
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("GET", path, headers={"User-Agent": "PrefixVLM", "Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status in REDIRECTS:
                address = urljoin(address, answer.headers.get("Location", ""))
                continue
            if answer.status != 200:
                raise ValueError(f"{name} cannot be fetched: {url.hostname} answers {answer.status}.")
            return _read(answer, name, limits, deadline)
        finally:
            connection.close()
    raise ValueError(f"{name} cannot be fetched: its address leads on more than {MAX_REDIRECTS} times.")


def refuse_host(url: SplitResult, port: int | None, name: str, limits: PictureLimits) -> None:
    """Raises a ValueError unless pictures of this host, at this port, are allowed."""
    host = (url.hostname or "").rstrip(".")
    with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if port is None or not ({with_port} | ({host} if port == PORTS[url.scheme] else set())) & limits.hosts:
        raise ValueError(
            f"{name} is at {with_port!r}, which this server may not ask; send the picture itself as a data URL "
            "(data:image/png;base64,...), or have the server started with --allow-host."
        )


def is_public(address: str) -> bool:
    """Whether an IP address is of the Internet: not private, loopback, link-local or reserved, also inside another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if wrapped is None and ip in NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    return ip.is_global and not ip.is_multicast


class _Plain(HTTPConnection):
    """A connection that asks only addresses that may be asked; the address that is checked is the one that is used."""

    allowed: frozenset[str]
    name: str

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(place[0]) for *_, place in found]
        if refused := [one for one in addresses if not is_public(one) and not self._is_allowed(one)]:
            raise ValueError(
                f"{self.name} is at {self.host!r}, whose address {refused[0]} is of a private network; the server may ask "
                f"it only if it is started with --allow-host {refused[0]}."
            )
        self.sock = socket.create_connection((addresses[0], self.port), self.timeout)

    def _is_allowed(self, address: str) -> bool:
        return bool({address, f"{address}:{self.port}", f"[{address}]:{self.port}"} & self.allowed)


class _Tls(HTTPSConnection, _Plain):
    def connect(self) -> None:
        _Plain.connect(self)
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)  # type: ignore[attr-defined]


def _read(answer: HTTPResponse, name: str, limits: PictureLimits, deadline: float) -> bytes:
    data = bytearray()
    while piece := answer.read1(PIECE):
        data += piece
        if len(data) > limits.bytes:
            raise ValueError(too_many_bytes(name, limits))
        if time.monotonic() > deadline:
            raise ValueError(f"{name} cannot be fetched: it takes longer than {FETCH_SECONDS} seconds.")
    return bytes(data)
