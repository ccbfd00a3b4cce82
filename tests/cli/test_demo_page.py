"""`vlm demo`: the page in a browser, from a dropped picture to a map over it; its answers; its errors, each one line."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from vlm.cli import run
from vlm.demo import COLOURS, answers, heat, looked
from vlm.looking import Look
from vlm.saving import save

DEFAULTS = (8, 0.0, 1.0)  # longest answer, temperature, top-p
START_SECONDS, WAIT_SECONDS = 180, 60


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_model, make_processor) -> str:
    """A saved tiny model with open gates."""
    folder = tmp_path_factory.mktemp("run") / "model"
    save(make_model(gate_init=1.0), make_processor(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def talker(model_folder) -> vlm.VLM:
    """It, loaded."""
    return vlm.load(model_folder, device="cpu")


@pytest.fixture
def gallery(tmp_path, make_picture) -> list[tuple[str, None]]:
    """Two pictures as the page's gallery gives them."""
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        make_picture(index).save(path)
    return [(str(path), None) for path in paths]


# In the browser


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture
def served(model_folder) -> Iterator[int]:
    """The port of a running `vlm demo`."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'vlm[demo]'")
    port = free_port()
    command = [str(Path(sys.executable).parent / "vlm"), "demo", model_folder, "--port", str(port), "--device", "cpu"]
    nowhere = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")  # nobody listens there, nor is asked
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | nowhere)
    try:
        assert select.select([server.stdout], [], [], START_SECONDS)[0], "it did not start in time"
        assert server.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        yield port
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    """A headless Chromium that finds no address but this machine's, and notes what it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver is not here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1280,900",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def asked_for(browser: Any) -> set[str]:
    """Every address that the page has asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}


def test_drop_ask_watch_click(browser, served, gallery, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    def found(selector: str, count: int = 1) -> list[Any]:
        return WebDriverWait(browser, WAIT_SECONDS, poll_frequency=0.1).until(
            lambda _: len(there := browser.find_elements("css selector", selector)) >= count and there
        )

    def opacity(layer: str) -> str:
        return browser.find_element("css selector", layer).value_of_css_property("opacity")

    browser.get(f"http://127.0.0.1:{served}")
    found("#ask")[0].click()
    assert found(".answer .fault")[0].text == "the question is empty; write at least one word"
    found("#pictures input[type=file]")[0].send_keys("\n".join(path for path, _ in gallery))
    found("#pictures img", 2)
    found("#question textarea")[0].send_keys("What is it?")
    found("#ask")[0].click()
    word = found(".answer .said label")[0]
    assert word.text and not browser.find_elements("css selector", ".answer .caret"), "it has come to its end"
    layers = found(".answer .heat")
    assert all(layer.get_property("naturalWidth") for layer in layers), "every map is a picture"
    assert (opacity(".lookall"), opacity(".look0")) == ("1", "0")
    word.click()
    WebDriverWait(browser, WAIT_SECONDS).until(lambda _: (opacity(".lookall"), opacity(".look0")) == ("0", "1"))
    first, second = found(".answer figure")
    assert "no word of the answer looked here" in first.text and not second.text
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    own, urls = f"http://127.0.0.1:{served}/", asked_for(browser)
    assert own in urls and {url for url in urls if url.startswith(("http", "ws")) and not url.startswith(own)} == set()
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", served))  # as from another machine: only 127.0.0.1 is listened at


# Its answers


def test_an_answer_comes_piece_by_piece_and_ends_with_its_words(talker, gallery):
    *coming, last = answers(talker, gallery, "What <b>is</b> it?", *DEFAULTS)
    said = [re.search(r'class="said">(.*?)<span class="caret">', page)[1] for page in coming]
    assert len(said) > 1 and all(later.startswith(earlier) for earlier, later in zip(said, said[1:], strict=False))
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in last and "<b>" not in last
    words = re.search(r'class="said">(.*?)</p>', last)[1]
    assert re.sub("<[^>]*>", "", words).strip() == said[-1].strip()
    assert talker.answer([path for path, _ in gallery], "What <b>is</b> it?", max_new_tokens=8) == said[-1].strip()
    assert last.count("<label") == last.count('class="heat') == len(words.split("<label")[1:]) + 1, "and all together"


def test_what_the_model_says_is_no_html(talker, gallery, monkeypatch):
    monkeypatch.setattr(talker, "stream", lambda *_, **__: iter(["<i>", " x"]))
    pages = list(answers(talker, gallery, "What is it?", *DEFAULTS))
    assert len(pages) == 3 and all("&lt;i&gt;" in page and "<i>" not in page for page in pages)


def test_no_question_asks_for_a_caption_and_no_picture_has_no_map(talker, gallery):
    *_, captioned = answers(talker, gallery[:1], " ", *DEFAULTS)
    assert talker.processor.caption_prompt in captioned and 'class="heat' in captioned
    *_, blind = answers(talker, None, "What is it?", *DEFAULTS)
    assert "No picture was given" in blind and "<img" not in blind


@pytest.mark.parametrize(("temperature", "top_p"), [(1.5, 1.0), (1.5, 0.3)])
def test_sampling_takes_its_settings(talker, gallery, temperature, top_p):
    paths, sampled = [path for path, _ in gallery], set()
    for seed in range(3):
        torch.manual_seed(seed)
        *_, page = answers(talker, gallery, "What is it?", 8, temperature, top_p)
        torch.manual_seed(seed)
        wanted = talker.answer(paths, "What is it?", max_new_tokens=8, temperature=temperature, top_p=top_p)
        words = re.search(r'class="said">(.*?)</p>', page, re.DOTALL)
        said = unescape(re.sub("<[^>]*>", "", words[1])).strip() if words else ""
        assert said == wanted
        sampled.add(said)
    assert len(sampled) > 1


def test_a_wrong_picture_is_one_line(talker, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    for name, told in (
        ("notes.png", "notes.png: not a JPEG, PNG or WebP file; convert it to one of these"),
        ("huge.png", "huge.png: 9000×8000 pixels, the limit is 64000000; make it smaller"),
    ):
        (page,) = answers(talker, [(str(tmp_path / name), None)], "What is it?", *DEFAULTS)
        assert re.search(r'<p class="fault">(.*)</p>', page)[1] == told
    assert re.search('class="fault">the text has .* tokens', *answers(talker, [], "a" * 300, *DEFAULTS))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_map_lies_over_what_the_model_saw(talker, gallery, make_picture, mode):
    """A processor that cuts: the cut is shown, for the map is of it alone."""
    prepared = talker.processor.image_processor
    prepared.crop_mode, prepared.crop_pct = mode, 0.5
    try:
        *_, page = answers(talker, gallery[:1], "What is it?", *DEFAULTS)
        seen = talker.processor.pixels([make_picture(0)])[0].permute(1, 2, 0).numpy() * 0.5 + 0.5
    finally:
        prepared.crop_mode, prepared.crop_pct = "squash", 1.0
    data = re.search('alt="picture 1" src="data:image/png;base64,(.*?)"', page)[1]
    shown = np.asarray(Image.open(io.BytesIO(b64decode(data))))
    np.testing.assert_array_equal(shown, (seen * 255).round().astype(np.uint8))
    assert "--wide: 1.0000" in page


def test_a_map_glows_where_the_model_looked():
    def drawn(weights: torch.Tensor, peak: float) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(heat(weights, peak))).convert("RGBA")).astype(int)

    def colour(number: int) -> list[int]:
        *shades, opacity = COLOURS[number]
        return [*shades, round(opacity * 255)]

    even = drawn(torch.full((2, 3), 1 / 6), 2 / 6)
    assert even.shape[:2] == (24, 36) and (even == colour(0)).all(), "looking everywhere is looking nowhere"
    weights = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    one = drawn(weights, 1.0)
    assert one[18, 30].tolist() == colour(-1) and one[6, 6].tolist() == colour(0)
    assert (drawn(weights, 2.0)[18, 30] != colour(-1)).any(), "half of the peak glows less"


def test_words_are_text_and_shut_gates_are_told():
    page = looked([Look("<i>a", None, None), Look(" b", None, None)], [vlm.demo.Picture("data:,", 1.5)])
    assert "&lt;i&gt;a b</p>" in page and "The gates of its adapters are shut" in page and "heat" not in page
    assert "The answer is empty." in looked([], [])


# What it refuses to start with


@pytest.fixture
def refused(capsys):
    """Runs `vlm demo`, which must exit with 2 and say one line; gives it."""

    def call(*arguments: str) -> str:
        assert run(["demo", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told.strip()

    return call


def test_a_start_that_can_not_be(refused, model_folder, make_model, make_processor, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'vlm[demo]'")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(model_folder, "--port", str(port))
    assert told == f"error: port {port} can not be had; choose another with --port"
    assert re.search("'--port'.*65535", refused(model_folder, "--port", "99999"))
    save(make_model("bert"), make_processor(), tmp_path / "bert")
    assert "family 'bert' reads both ways and cannot generate" in refused(str(tmp_path / "bert"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused(model_folder) == "error: vlm demo: Gradio is not installed; pip install 'vlm[demo]'"
