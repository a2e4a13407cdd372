"""Which pictures a stranger may have opened: no file, no address inside a network, none that is too large."""

import base64
import io
import socket

import pytest
from PIL import Image

from prefixvlm.serve_pictures import FORMATS, PictureLimits, is_public, open_pictures


def data_url(image: Image.Image, kind: str = "PNG", **options) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


RED = Image.new("RGB", (8, 6), "red")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_promised_is_read(kind):
    (opened,) = open_pictures([data_url(RED, kind)], PictureLimits())
    assert opened.size == RED.size
    assert opened.getpixel((3, 3))[0] > 240


def test_a_format_that_is_not_promised_is_refused():
    with pytest.raises(ValueError, match="Picture 1 is no picture that can be read"):
        open_pictures([data_url(RED, "PPM")], PictureLimits())


def test_pixels_are_counted_over_all_pictures():
    limits = PictureLimits(pixels=2 * 48 + 47)
    assert len(open_pictures([data_url(RED)] * 2, limits)) == 2
    with pytest.raises(ValueError, match=r"Picture 3 is too large: it has 8 x 6 pixels, and 47 are left"):
        open_pictures([data_url(RED)] * 3, limits)


def test_bytes_are_counted_for_each_picture():
    url = data_url(RED)
    size = len(base64.b64decode(url.partition(",")[2]))
    assert open_pictures([url, url], PictureLimits(bytes=size))
    with pytest.raises(ValueError, match="Picture 1 is too large"):
        open_pictures([url], PictureLimits(bytes=size - 1))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses_inside_a_network_are_known(address, expected):
    assert is_public(address) is expected


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "::1", "10.0.0.8"])
def test_a_name_that_leads_inside_is_refused_before_it_is_asked(inside, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("it was asked")

    outside = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))
    monkeypatch.setattr(socket, "create_connection", never)
    found = [outside, (socket.AF_INET, socket.SOCK_STREAM, 6, "", (inside, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    for url in ("http://images.example.org/a.png", "https://images.example.org/a.png"):
        with pytest.raises(
            ValueError, match=f"Picture 1 is at 'images.example.org', whose address {inside} is of a private"
        ):
            open_pictures([url], PictureLimits(hosts=frozenset({"images.example.org"})))


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch):
    """A name that leads elsewhere the second time is looked up once."""
    asked, answers = [], iter(["93.184.215.14", "127.0.0.1"])

    def connect(address, *rest):
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", connect)
    look_up = lambda *arguments, **options: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 80))]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ValueError, match="Picture 1 cannot be fetched"):
        open_pictures(["http://images.example.org/a.png"], PictureLimits(hosts=frozenset({"images.example.org"})))
    assert asked == [("93.184.215.14", 80)]


@pytest.mark.parametrize(
    ("url", "hosts", "is_allowed"),
    [
        ("http://a.example/x", {"a.example"}, True),
        ("https://A.example./x", {"a.example"}, True),
        ("http://a.example:8080/x", {"a.example"}, False),
        ("http://a.example:8080/x", {"a.example:8080"}, True),
        ("http://a.example/x", {"a.example:8080"}, False),
        ("http://b.a.example/x", {"a.example"}, False),
        ("http://a.example.evil.example/x", {"a.example"}, False),
        ("http://a.example@evil.example/x", {"a.example"}, False),
    ],
)
def test_hosts_are_compared_whole(url, hosts, is_allowed, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ValueError, match="no network here" if is_allowed else "may not ask"):
        open_pictures([url], PictureLimits(hosts=frozenset(hosts)))
