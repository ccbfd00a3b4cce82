"""Clients that mean harm by pictures: addresses, bombs, damage; each is refused and costs little."""

from __future__ import annotations

import base64
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bombs import saved
from peak import peak_above_now
from PIL import PngImagePlugin

MEGABYTES = 50
pytestmark = pytest.mark.usefixtures("unharmed")


# Addresses


CONNECTIONS: list[object] = []
WATCHING = threading.Event()


def _watch(event: str, arguments: tuple) -> None:
    if WATCHING.is_set() and event in ("socket.connect", "socket.getaddrinfo", "open"):
        CONNECTIONS.append((event, threading.current_thread().name, arguments))


sys.addaudithook(_watch)


@pytest.fixture
def trap() -> Iterator[socket.socket]:
    """A port of this machine that nobody may come to, over IPv4 or IPv6."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        listening.settimeout(0)
        yield listening


def addresses(port: int, file: Path) -> list[str]:
    """Where a picture may not be taken from."""
    hosts = [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::]",
    ]
    hosts += ["10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "user@127.0.0.1"]
    urls = [f"{scheme}://{host}:{port}/a.png" for scheme in ("http", "https", "HTTP", "ftp") for host in hosts]
    urls += [
        f"http://127.0.0.1:{port}/redirect?to=file:///etc/passwd",
        f"//127.0.0.1:{port}/a.png",
        "gopher://localhost",
    ]
    urls += [
        str(file),
        f"file://{file}",
        f"file:{file}",
        f"FILE://localhost{file}",
        f"../{file.name}",
        f" {file}",
        f"~{file}",
    ]
    urls += [
        f"data:image/png;base64,{file}",
        f"data:text/plain,{file}",
        f"data:image/png,{file}",
        f"data:{file}",
        "data:",
        "",
    ]
    urls += [
        f"data:image/png;base64,\n{file}",
        f"s3://bucket{file}",
        f"memory:/{file}",
        f"pipe:cat {file}",
        "\0",
        f"\0{file}",
    ]
    return urls


def test_no_address_is_ever_fetched(server, trap, tmp_path, make_picture, image_part):
    file = tmp_path / "picture.png"
    make_picture(0).save(file)
    urls = addresses(trap.getsockname()[1], file)
    CONNECTIONS.clear()
    WATCHING.set()
    try:
        for url in urls:
            answer = server.chat([image_part(url)])
            assert answer.status == 400 and answer.error["code"] == "invalid_image", url
            assert answer.error["param"] == "messages.0.content.0.image_url.url"
            embedded = server.post("/v1/embeddings", {"input": [image_part(url)]})
            assert embedded.status == 400 and embedded.error["param"] == "input.0.image_url.url", url
    finally:
        WATCHING.clear()
    own = threading.current_thread().name
    assert any(event == "socket.connect" and thread == own for event, thread, _ in CONNECTIONS)  # the hook sees them
    assert not [
        found for found in CONNECTIONS if found[1] != own and (found[0] != "open" or file.name in str(found[2]))
    ]
    with pytest.raises(BlockingIOError):
        trap.accept()


def test_pictures_in_other_forms_are_refused(server, tmp_path, make_picture):
    file = tmp_path / "picture.png"
    make_picture(0).save(file)
    for part in (
        {"type": "image", "image": str(file)},
        {"type": "image", "path": str(file)},
        {"type": "image_url", "image_url": str(file)},
        {"type": "image_url", "image_url": {"url": "data:,", "path": str(file)}},
        {"type": "image_url", "url": str(file)},
        {"type": "input_image", "image_url": str(file)},
        {"type": "video_url", "video_url": {"url": f"file://{file}"}},
        {"type": "text", "text": "Hi", "image": str(file)},
    ):
        assert server.chat([part]).status == 400 and server.chat([part]).error
    assert server.chat([{"type": "text", "text": f"<img src='{file}'>"}]).status == 200


# Bombs


def test_image_bombs_are_refused_before_they_go_off(server, made_bombs, image_part, make_picture):
    server.chat([image_part(make_picture(0)), {"type": "text", "text": "Hi"}])
    for name, data in made_bombs.items():
        encoded = image_part(data)
        memory = peak_above_now()
        next(memory)
        answer = server.chat([encoded, {"type": "text", "text": "Hi"}])
        assert next(memory) < MEGABYTES, name
        assert answer.status == 400 and answer.error["type"] == "invalid_request_error", name
        assert server.post("/v1/embeddings", {"input": [encoded]}).status == 400, name


def test_what_a_picture_carries_beside_its_pixels_is_left_out(server, image_part, make_picture):
    """Texts and profiles may be compressed as much as pixels."""
    info = PngImagePlugin.PngInfo()
    for number in range(60):
        info.add_itxt(f"key{number}", "a" * 1_000_000, zip=True)
    heavy, light = saved(make_picture(3), "PNG", pnginfo=info), saved(make_picture(3), "PNG")
    assert len(heavy) > len(light) + 50_000
    memory = peak_above_now()
    next(memory)
    answer = server.chat([image_part(heavy), {"type": "text", "text": "Hi"}])
    assert next(memory) < MEGABYTES
    expected = server.chat([image_part(light), {"type": "text", "text": "Hi"}]).json["choices"]
    assert answer.json["choices"] == expected
    webp = saved(make_picture(3), "WEBP", lossless=True, xmp=b"a" * 100_000, icc_profile=b"b" * 999)
    assert server.chat([image_part(webp), {"type": "text", "text": "Hi"}]).json["choices"] == expected


def test_damaged_base64_is_refused(server, make_picture):
    good = base64.b64encode(saved(make_picture(0), "PNG")).decode()
    for bad in (
        good[:-1],
        good + "=",
        good + "====",
        "=" + good,
        good[:99] + "\n" + good[99:],
        good + "é",
        good[:40] + "-_",
    ):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{bad}"}}
        assert server.chat([part]).status == 400, bad[-10:]
